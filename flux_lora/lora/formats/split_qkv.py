"""Files of sd-scripts that were trained with ``split_qkv=True``, and how to tell them.

The trainer (``networks/lora_flux.py``) then has an adapter of rank r for each of q, k, v (and mlp) of a fused layer. It
saves the n of them as one: ``lora_down`` (n·r, in), ``lora_up`` block-diagonal, alpha as trained. Its forward pass
scaled by α/r, so α/(n·r), which sd-scripts, ComfyUI and diffusers all use when they load the file, is n times too weak.

Converters (``networks/convert_flux_lora.py``, OneTrainer before its format choice) write the same shapes for adapters
that were separate to begin with, and multiply alpha by n: there α/(n·r) is right. So the metadata decides, else how
alpha compares with that of the other layers. Where neither tells, as in a file of qkv layers alone, an alpha that is
the n·r columns of ``lora_up`` is a converter's, which writes that for every file without alphas (ai-toolkit's,
diffusers'); any other alpha means split, as the trainer is the more frequent writer of such files.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flux_lora.lora.formats.layouts import Layer


@dataclass(frozen=True, eq=False)
class Fused:
    """A low-rank update in BFL's layout that has an alpha: its layer, ``lora_up`` (out, columns) and alpha."""

    layer: Layer
    up: Tensor
    alpha: float

    @property
    def parts(self) -> int:
        """How many projections it covers."""
        return len(self.layer.weight)


def trained_split(updates: list[Fused], metadata: Mapping[str, str]) -> tuple[set[str], str]:
    """The names of the layers whose rank is that of one part, and the choice with what told; empty without any."""
    diagonal = [update for update in updates if _block_diagonal(update)]
    if not diagonal:
        return set(), ""
    split, reason = _by_metadata(diagonal, metadata) or _by_alpha(diagonal, updates) or _by_factors(diagonal)
    if not split:
        return set(), f"not split qkv, by {reason}"
    return {update.layer.name for update in diagonal}, f"split qkv, by {reason}"


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


def _by_alpha(diagonal: list[Fused], updates: list[Fused]) -> tuple[bool, str] | None:
    """One alpha serves a whole training, so it is the reading under which all layers have the same."""
    alphas = {update.alpha for update in updates}
    unsplit = {update.alpha / (update.parts if update in diagonal else 1) for update in updates}
    if (len(alphas) == 1) == (len(unsplit) == 1):
        return None
    return len(alphas) == 1, "alpha"


def _by_factors(diagonal: list[Fused]) -> tuple[bool, str]:
    if all(update.alpha == update.up.shape[1] for update in diagonal):
        return False, "alpha, which is the whole rank"
    return True, "the block-diagonal lora_up"


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
