"""Adapter files of every trainer of FLUX.1: read, checked, and turned into updates of the served weights.

The judge of what a file means is its trainer's own forward pass, on the layers as the trainer lays them out. Every key
is applied, or known to be irrelevant, or the file is refused.

Keys are read by our own tables. diffusers' converters fit 19 and 38 blocks of the full width and plain LoRAs only, and
differ from the trainers in places: they drop ``dora_scale`` and the alphas of ``final_layer``, and like ComfyUI and
sd-scripts' own inference they scale what was trained with ``split_qkv`` too weakly (see `split_qkv`).
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from flux_lora.checkpoint.header import Header, TensorFileError, read_header
from flux_lora.errors import FormatError
from flux_lora.lora.deltas import Update
from flux_lora.lora.formats import foreign
from flux_lora.lora.formats.algorithms import Given, build
from flux_lora.lora.formats.contents import LayerParts, account_for, load, only_number
from flux_lora.lora.formats.doubles import without_doubles
from flux_lora.lora.formats.layouts import BFL, Shapes
from flux_lora.lora.formats.metadata import Scaling, own_name, scaling
from flux_lora.lora.formats.outline import check_shapes
from flux_lora.lora.formats.split_qkv import Fused, trained_split
from flux_lora.lora.formats.summary import Adapted, family, summarize, without_effect
from flux_lora.lora.formats.triggers import trigger_words

_HASHED_AT_ONCE = 2**22
"""Bytes."""


@dataclass(frozen=True)
class Adapter:
    """A fine-tune, ready to be merged.

    Args:
        digest: SHA-256 of the file's bytes, in hexadecimal.
        data_digest: SHA-256 of the tensors' bytes, all that follows the header; kohya's tools know a file by it.
        name: what the file calls itself in its metadata; empty when it says nothing.
        family: who writes such files.
        updates: by component: transformer, text_encoder (CLIP), text_encoder_2 (T5).
        ignored: keys that change nothing, and why.
        summary: one line for the log.
        nbytes: host memory that the updates hold at most.
        triggers: words of which any calls up what it was trained on, as far as its metadata says.
    """

    digest: str
    data_digest: str
    name: str
    family: str
    updates: Mapping[str, tuple[Update, ...]]
    ignored: Mapping[str, str]
    summary: str
    nbytes: int
    triggers: tuple[str, ...] = ()


def read(path: Path, shapes: Shapes, name: str | None = None) -> Adapter:
    """Read an adapter file for modules of the given shapes.

    Args:
        path: the file.
        shapes: of the served parameters.
        name: what messages call the file; its path when not given.

    Raises:
        FormatError: the file cannot be applied; the message has its name, what it looks like, and the reason.
    """
    refused = f"{name or path} cannot be applied to FLUX.1"
    header = None
    try:
        before = version(path)
        header = read_header(path)
        adapter = _read(path, header, shapes)
        if version(path) != before:
            raise FormatError("it changed while it was read; try again")
    except (FormatError, TensorFileError, SafetensorError, OSError) as error:
        what = foreign.recognise(header, shapes) if header else None
        reason = error.strerror or "it cannot be read" if isinstance(error, OSError) else error
        looks, advice = (f"it looks like {what}; ", foreign.advice(what)) if what else ("", None)
        raise FormatError(f"{refused}: {looks}{reason}.{f' {advice}.' if advice else ''}") from None
    return adapter


def version(path: Path) -> tuple[int, ...]:
    """What differs once a path leads to another file or other contents.

    Raises:
        OSError: the file is not there.
    """
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(path: Path, header: Header, shapes: Shapes) -> Adapter:
    names, ignored = account_for(header, shapes)
    if not names:
        raise FormatError("it holds nothing to apply")
    if what := foreign.of_another_model(header.metadata, {name.component for name in names.values()}):
        raise FormatError(f"its metadata says that it is {what}")
    check_shapes(header, names)
    digest, data_digest = _digests(path, header.data_start)
    contents, doubled = load(path, names)
    split, told_by = trained_split(_fused(contents), header.metadata)
    scalings = {component: scaling(header.metadata, component) for component in shapes}
    layers = [_adapt(layer, scalings[layer.name.component], layer.name.layer.name in split) for layer in contents]
    zero = {key: "zeros" for layer in layers if not layer.updates for key in layer.keys}
    unread = {
        parts.alpha.key: "an alpha that its layer does not use"
        for parts, layer in zip(contents, layers, strict=True)
        if parts.alpha and not layer.reads_alpha
    }
    layers, repeated = without_doubles(layers, shapes)
    ignored |= doubled | unread | zero | repeated
    layers = [layer for layer in layers if layer.updates] or layers
    sibling, triggers = foreign.relative(header.metadata), trigger_words(header.metadata)
    notes = (
        sibling and f"trained on {sibling}",
        f"trigger word {' or '.join(map(repr, triggers))}" if triggers else None,
        told_by,
        without_effect(ignored),
        f"sha256 {digest}",
    )
    return Adapter(
        digest,
        data_digest,
        own_name(header.metadata),
        family(layer.name for layer in layers),
        {component: _updates(layers, component) for component in shapes},
        ignored,
        summarize(layers, shapes, notes),
        sum(part.tensor.nbytes for layer in contents for part in layer.parts.values()),
        triggers,
    )


def _digests(path: Path, data_start: int) -> tuple[str, str]:
    """SHA-256 of a whole file, and of what begins at ``data_start``: read once, and hashed side by side."""
    whole, data = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file, ThreadPoolExecutor(max_workers=1) as beside:
        whole.update(file.read(data_start))
        while chunk := file.read(_HASHED_AT_ONCE):
            hashing = beside.submit(whole.update, chunk)
            data.update(chunk)
            hashing.result()
    return whole.hexdigest(), data.hexdigest()


def _adapt(layer: LayerParts, scaling: Scaling, split: bool) -> Adapted:
    """Alpha 0 means the rank, as in sd-scripts, LyCORIS and ai-toolkit; so does no alpha at all."""
    ranks_in_one = len(layer.name.layer.weight) if split else 1
    alphas: list[float | None] = []  # what was used, if anything was

    def stored() -> float | None:
        return None if layer.alpha is None else only_number(layer.alpha)

    def factor(rows: int) -> float:
        rank = rows // ranks_in_one
        alpha = scaling.alpha_of(layer.name.layer.name) if layer.alpha is None else stored() or None
        alphas.append(alpha)
        return scaling.factor(rank if alpha is None else alpha, rank)

    built = build(layer.name.layer, layer.parts, Given(factor, stored, scaling.oft))
    return Adapted(
        layer.name,
        layer.keys,
        built.updates,
        built.algorithm,
        built.rank and built.rank // ranks_in_one,
        alphas[0] if alphas else None,
        built.reads_alpha,
    )


def _fused(contents: Iterable[LayerParts]) -> list[Fused]:
    return [
        Fused(layer.name.layer, layer.parts["up"].tensor, alpha)
        for layer in contents
        if layer.name.layer.layout == BFL
        and "up" in layer.parts
        and layer.alpha
        and (alpha := only_number(layer.alpha))
    ]


def _updates(layers: Iterable[Adapted], component: str) -> tuple[Update, ...]:
    return tuple(update for layer in layers if layer.name.component == component for update in layer.updates)
