"""What a file holds, layer by layer: every key accounted for, every tensor in memory and finite."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
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
_INTEGERS = {"I64", "I32", "I16", "I8", "U8"}
_GUIDANCE = re.compile(r"(time_text_embed[._]guidance_embedder|guidance_in)[._]")
_LISTED_KEYS = 8


@dataclass(frozen=True)
class LayerParts:
    """What a file holds for one layer.

    Args:
        name: what one of the keys says.
        parts: the tensors by their part of an update.
        alpha: as the file gives it, if it does.
        alpha_key: the key that holds it.
    """

    name: Name
    parts: Mapping[str, Part]
    alpha: float | None = None
    alpha_key: str | None = None


def account_for(header: Header, shapes: Shapes) -> tuple[dict[str, Name], dict[str, str]]:
    """What each key says, and why the others change nothing.

    Raises:
        FormatError: a key is neither known nor known to be irrelevant, or has a type that is no number.
    """
    reader = Names(shapes)
    names, ignored, unknown = {}, {}, []
    has_guidance = any("guidance_embedder" in parameter for parameter in shapes.get("transformer", ()))
    for key, info in header.tensors.items():
        if name := reader.read(key):
            if info.dtype not in _FLOATS and not (name.part == "alpha" and info.dtype in _INTEGERS):
                raise FormatError(f"{key!r} has the type {info.dtype}, from which no update can be computed")
            names[key] = name
        elif not has_guidance and _GUIDANCE.search(key):
            ignored[key] = "the served model has no guidance embedder"
        else:
            unknown.append(key)
    if unknown:
        listed = ", ".join(shown(key) for key in sorted(unknown)[:_LISTED_KEYS])
        more = f" and {len(unknown) - _LISTED_KEYS:,} more" if len(unknown) > _LISTED_KEYS else ""
        raise FormatError(f"{len(unknown):,} of its {len(header.tensors):,} keys are not known: {listed}{more}")
    return names, ignored


def load(path: Path, names: Mapping[str, Name]) -> list[LayerParts]:
    """Copy the named tensors into host memory, in the file's own types.

    Raises:
        FormatError: a tensor holds NaN or numbers that are infinite in float32, or two keys name the same one.
    """
    layers: dict[tuple[str, str], dict[str, Part]] = defaultdict(dict)
    samples: dict[tuple[str, str], Name] = {}
    with safe_open(path, framework="pt") as file:
        for key, name in names.items():
            tensor = file.get_tensor(key).clone()
            if not _finite(tensor):
                raise FormatError(f"{key!r} holds NaN or numbers that are infinite in float32")
            layer = (name.component, name.layer.name)
            if name.part in layers[layer]:
                raise FormatError(f"{key!r} and {layers[layer][name.part].key!r} are two names of one tensor")
            layers[layer][name.part] = Part(key, tensor)
            samples[layer] = name
    return [_layer_parts(samples[layer], parts) for layer, parts in layers.items()]


def _finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    numbers = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has few operations of its own
    extremes = torch.stack(numbers.aminmax())  # many times faster than isfinite of each
    return bool(extremes.float().isfinite().all())


def _layer_parts(name: Name, parts: dict[str, Part]) -> LayerParts:
    alpha = parts.pop("alpha", None)
    if alpha is None:
        return LayerParts(name, parts)
    if not parts:
        raise FormatError(f"{alpha.key!r} is there without anything that it could scale")
    if alpha.tensor.numel() != 1:
        raise FormatError(f"{alpha.key!r} has shape {list(alpha.tensor.shape)} and must be one number")
    return LayerParts(name, parts, float(alpha.tensor), alpha.key)
