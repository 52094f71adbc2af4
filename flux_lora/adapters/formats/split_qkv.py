"""Files of sd-scripts that were trained with ``split_qkv=True``, and how to tell them.

The trainer (``networks/lora_flux.py``) then has an adapter of rank r for each of q, k, v (and mlp) of a fused layer. It
saves the n of them as one: ``lora_down`` (n·r, in), ``lora_up`` block-diagonal, alpha as trained. Its forward pass
scaled by α/r, so α/(n·r), which sd-scripts, ComfyUI and diffusers all use when they load the file, is n times too weak.

Converters (``networks/convert_flux_lora.py``, OneTrainer before its format choice) write the same shapes for adapters
that were separate to begin with, and multiply alpha by n: there α/(n·r) is right. So block-diagonal factors alone say
nothing; the metadata decides, or how alpha compares with that of the other layers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flux_lora.adapters.formats.layouts import Layer
from flux_lora.errors import FormatError


@dataclass(frozen=True, eq=False)
class Fused:
    """A low-rank update in sd-scripts' layout: its layer, ``lora_up`` (out, rows) and alpha."""

    layer: Layer
    up: Tensor
    alpha: float | None

    @property
    def parts(self) -> int:
        return len(self.layer.weight)


def trained_split(updates: list[Fused], metadata: Mapping[str, str]) -> tuple[set[str], str]:
    """The names of the layers whose rank is that of one part, and what told; empty when there are none.

    Raises:
        FormatError: the file does not tell.
    """
    diagonal = [update for update in updates if _block_diagonal(update)]
    if not diagonal:
        return set(), ""
    split, reason = _by_metadata(diagonal, metadata) or _by_alpha(diagonal, updates)
    return ({update.layer.name for update in diagonal}, f"split qkv, by {reason}") if split else (set(), "")


def _by_metadata(diagonal: list[Fused], metadata: Mapping[str, str]) -> tuple[bool, str] | None:
    try:
        arguments = json.loads(metadata.get("ss_network_args", "null"))
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict) and "split_qkv" in arguments:
        return arguments["split_qkv"] == "True", "ss_network_args"
    dimension = metadata.get("ss_network_dim")
    if all(dimension == str(update.up.shape[1]) for update in diagonal):
        return False, "ss_network_dim"
    if all(dimension == str(update.up.shape[1] // update.parts) for update in diagonal):
        return True, "ss_network_dim"
    return None


def _by_alpha(diagonal: list[Fused], updates: list[Fused]) -> tuple[bool, str]:
    """One alpha serves a whole training, so it is the reading under which all layers have the same."""
    if None in (alphas := {update.alpha for update in updates}):
        return False, "the absence of alpha"
    unsplit = {update.alpha / (update.parts if update in diagonal else 1) for update in updates if update.alpha}
    if (len(alphas) == 1) == (len(unsplit) == 1):
        raise FormatError(
            f"{diagonal[0].layer.name} and others have block-diagonal factors, as sd-scripts' split_qkv=True and "
            "converters both write them, and neither metadata nor alphas tell which; train with metadata or convert it"
        )
    return len(alphas) == 1, "alpha"


def _block_diagonal(update: Fused) -> bool:
    """Whether each part's rows of ``lora_up`` use only that part's columns; False for zeros, which mean nothing."""
    if update.parts == 1 or update.up.ndim != 2 or update.up.shape[1] % update.parts or not update.up.any():
        return False
    rows, columns = update.up.shape
    rank, start = columns // update.parts, 0
    for index, target in enumerate(update.layer.weight):
        stop = start + target.stop - target.start
        block = update.up[start:stop]
        if block[:, : index * rank].any() or block[:, (index + 1) * rank :].any():
            return False
        start = stop
    return start == rows
