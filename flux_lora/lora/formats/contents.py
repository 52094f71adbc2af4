"""What a file holds, layer by layer: every key accounted for, every tensor that is used in memory and finite."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from flux_lora.checkpoint.header import Header, shown
from flux_lora.errors import FormatError
from flux_lora.lora.formats.algorithms import Part
from flux_lora.lora.formats.layouts import Shapes
from flux_lora.lora.formats.names import Name, Names

_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
_INTEGERS = {"I64", "I32", "I16", "I8", "U8", "BOOL"}
NUMBERS = ("alpha", "oft_scaled")
"""Parts that are one number of any type, and are judged where they are used."""

_GUIDANCE = re.compile(r"(time_text_embed[._]guidance_embedder|guidance_in)[._]")
_UNUSED = re.compile(
    r"(text_encoders[._]clip_l|text_encoder|lora_te1?)[._](transformer[._])?(text_model[._])?"
    r"(text_projection|logit_scale|embeddings[._]position_ids)([._].*)?|"
    r"(text_encoders[._]t5xxl|text_encoder_2|lora_te[23])[._](transformer[._])?(logit_scale|lm_head|decoder)([._].*)?"
)
"""Of the text encoders, what FLUX.1 never computes with; ComfyUI's extraction writes it like the rest."""

_WORD = re.compile(r"bundle_emb\.(.+?)\.(clip_[lg]|t5|t5xxl|string_to_param|[^.]+$).*")
_LISTED_KEYS = 8
PIECE = 2**22
"""Numbers that are judged at a time: float8 becomes four times as large for it."""


@dataclass(frozen=True)
class LayerParts:
    """What a file holds for one layer under one spelling of its name.

    Args:
        name: what one of the keys says.
        parts: the tensors by their part of an update.
        alpha: the number that the file has beside them, if it does.
    """

    name: Name
    parts: Mapping[str, Part]
    alpha: Part | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Its keys in the file; alpha's comes last."""
        return tuple(part.key for part in (*self.parts.values(), *([self.alpha] if self.alpha else [])))


def account_for(header: Header, shapes: Shapes) -> tuple[dict[str, Name], dict[str, str]]:
    """What each key says, and why the others change nothing.

    Raises:
        FormatError: a key is neither known nor known to be irrelevant, or has a type that is no number.
    """
    _check_whole_file(header)
    reader = Names(shapes)
    names: dict[str, Name] = {}
    others: list[str] = []
    for key in header.tensors:
        if name := reader.read(key):
            names[key] = name
        else:
            others.append(key)
    if all(name.part.startswith("plain") for name in names.values()):  # a checkpoint, not an adapter
        others, names = list(header.tensors), {}
    ignored = {key: "P of BOFT is no parameter" for key, name in names.items() if name.part == "boft_P"}
    has_guidance = any("guidance_embedder" in parameter for parameter in shapes.get("transformer", ()))
    with_more = {_stem(key) for key in header.tensors if not _is_alpha(key)}
    unknown = []
    for key in others:
        if not has_guidance and _GUIDANCE.search(key):
            ignored[key] = "the served model has no guidance embedder"
        elif _UNUSED.fullmatch(key):
            ignored[key] = "FLUX.1 never uses what they change"
        elif _is_alpha(key) and _stem(key) not in with_more:
            ignored[key] = "alpha of nothing"
        else:
            unknown.append(key)
    if unknown:
        listed = ", ".join(shown(key) for key in sorted(unknown)[:_LISTED_KEYS])
        more = f" and {len(unknown) - _LISTED_KEYS:,} more" if len(unknown) > _LISTED_KEYS else ""
        raise FormatError(f"{len(unknown):,} of its {len(header.tensors):,} keys are not known: {listed}{more}")
    names = {
        key: replace(name, part=name.part.replace("plain", "whole"))
        for key, name in names.items()
        if key not in ignored
    }
    for key, name in names.items():
        kind = header.tensors[key].dtype
        if kind not in _FLOATS and not (name.part in NUMBERS and kind in _INTEGERS):
            raise FormatError(f"{key!r} has the type {kind}, from which no update can be computed")
    return names, ignored


def _check_whole_file(header: Header) -> None:
    words = {match[1]: None for key in header.tensors if (match := _WORD.fullmatch(key))}
    if words:
        listed = ", ".join(shown(word) for word in list(words)[:_LISTED_KEYS])
        raise FormatError(
            f"it teaches the text encoders new words ({listed}), which are not taken; for a file without them, switch "
            "off OneTrainer's 'Bundle Embeddings' and save it again, or remove its keys that begin with 'bundle_emb.'"
        )
    if empty := [key for key, info in header.tensors.items() if info.shape == (0,)]:
        raise FormatError(
            f"{len(empty):,} of its {len(header.tensors):,} tensors have shape [0], as {shown(empty[0])} has: its "
            "trainer saved nothing there, which happens with DeepSpeed's ZeRO-3 if the weights are not gathered first; "
            "gather them and save it again"
        )


def _is_alpha(key: str) -> bool:
    return key.endswith((".alpha", ".lora_alpha"))


def _stem(key: str) -> str:
    """What comes before the part of an update, as far as that can be told of any key."""
    return key.removesuffix(".weight").rpartition(".")[0]


def load(path: Path, names: Mapping[str, Name]) -> tuple[list[LayerParts], dict[str, str]]:
    """Copy the named tensors into host memory, in the file's own types, and say which were there twice.

    Raises:
        FormatError: a tensor holds NaN or numbers that are infinite in float32, or two keys name the same one.
    """
    spellings: dict[tuple[str, str], dict[str, dict[str, Part]]] = defaultdict(lambda: defaultdict(dict))
    samples: dict[tuple[str, str, str], Name] = {}
    ignored = {}
    with safe_open(path, framework="pt") as file:
        for key, name in names.items():
            part = _part(key, file.get_tensor(key).clone(), name)
            parts = spellings[name.component, name.layer.name][name.stem]
            if name.part not in parts:
                parts[name.part] = part
                samples[name.component, name.layer.name, name.stem] = name
            elif torch.equal(parts[name.part].tensor.float(), part.tensor.float()):
                ignored[key] = "the same is there under another name"
            else:
                raise _two_names(parts[name.part], part)
    layers = [
        LayerParts(samples[*layer, stem], parts, parts.pop("alpha", None))
        for layer, by_stem in spellings.items()
        for stem, parts in separate(by_stem).items()
    ]
    stray = [key for layer in layers if not layer.parts for key in layer.keys]
    layers = [layer for layer in layers if layer.parts]
    if stray and not layers:
        raise FormatError(f"{stray[0]!r} is there without anything that it could scale")
    return layers, ignored | dict.fromkeys(stray, "alpha of nothing")


def _part(key: str, tensor: Tensor, name: Name) -> Part:
    if name.part in NUMBERS or not tensor.numel():
        return Part(key, tensor)
    extremes = _extremes(tensor)
    if not extremes.isfinite().all():
        raise FormatError(f"{key!r} holds NaN or numbers that are infinite in float32")
    return Part(key, tensor, zero=not extremes.any())


def _extremes(tensor: Tensor) -> Tensor:
    """Its smallest and largest numbers, or NaN, in float32: many times faster than to ask of each if it is finite."""
    found = []
    for piece in torch.split(tensor.flatten(), PIECE):
        numbers = piece.float() if piece.element_size() == 1 else piece  # float8 has few operations of its own
        found.append(torch.stack(numbers.aminmax()).float())
    return torch.cat(found)


def separate(spellings: Mapping[str, dict[str, Part]]) -> dict[str, dict[str, Part]]:
    """The parts of one layer by how its name is spelled; spellings that complete each other are one.

    Raises:
        FormatError: two spellings share some parts only.
    """
    apart: dict[str, dict[str, Part]] = {}
    for stem, parts in sorted(spellings.items(), key=lambda item: -len(item[1])):
        for known in apart.values():
            shared = parts.keys() & known.keys()
            if shared - {"alpha"} and parts.keys() - {"alpha"} != known.keys() - {"alpha"}:
                part = min(shared - {"alpha"})
                raise _two_names(known[part], parts[part])
            if not shared and parts.keys() <= {"alpha", "magnitude", "dora_scale"}:
                known |= parts
                break
        else:
            apart[stem] = dict(parts)
    return apart


def _two_names(one: Part, other: Part) -> FormatError:
    return FormatError(f"{other.key!r} and {one.key!r} are two names of one tensor")


def only_number(part: Part) -> float:
    """The number that a part is.

    Raises:
        FormatError: it is not one number, or it is NaN or infinite in float32.
    """
    if part.tensor.numel() != 1:
        raise FormatError(f"{part.key!r} has shape {list(part.tensor.shape)} and must be one number")
    if not part.tensor.float().isfinite().all():
        raise FormatError(f"{part.key!r} holds NaN or numbers that are infinite in float32")
    return float(part.tensor)
