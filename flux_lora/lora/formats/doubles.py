"""One update under two names: a file that holds two of its layouts at once would apply it twice.

Whether two layers of a file, say BFL's fused qkv and diffusers' to_q, mean the same is asked of what they do: ΔW times
some random vectors, which tells apart any two that differ, and costs little for a low-rank product. What depends on the
base weights is computed from random ones, since they are not at hand.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from zlib import crc32

import torch
from torch import Tensor

from flux_lora.errors import FormatError
from flux_lora.lora.deltas import LowRank, Magnitude, Update
from flux_lora.lora.formats.layouts import Shapes
from flux_lora.lora.formats.summary import Adapted

_VECTORS = 8
_TOLERANCE = 0.02
"""Of a row of ΔW: two copies of one update may have been rounded to bfloat16 after being scaled differently."""

_HOST = torch.device("cpu")


def without_doubles(layers: Sequence[Adapted], shapes: Shapes) -> tuple[list[Adapted], dict[str, str]]:
    """The layers without what others of them do already, and the keys that are left out with the reason.

    Raises:
        FormatError: two layers change the same weight, each in its own way.
    """
    kept: dict[int, Adapted] = {}
    owners: dict[tuple[str, str], Adapted] = {}  # the first layer that changes a parameter
    ignored: dict[str, str] = {}
    largest_first = sorted(range(len(layers)), key=lambda index: -len(_parameters(layers[index].updates)))
    for index in largest_first:
        layer = layers[index]
        component = layer.name.component
        doubled = {name for name in _parameters(layer.updates) if (component, name) in owners}
        for owner in {id(owners[component, name]): owners[component, name] for name in doubled}.values():
            _check_same(owner, layer, shapes[component])
        rest = tuple(update for update in layer.updates if not doubled & _parameters([update]))
        owners |= {(component, name): layer for name in _parameters(rest)}
        if doubled and not rest:
            ignored |= dict.fromkeys(layer.keys, "the same update is there under another name")
        kept[index] = replace(layer, updates=rest)
    return [kept[index] for index in range(len(layers))], ignored


def _parameters(updates: Iterable[Update]) -> set[str]:
    return {rows.parameter for update in updates for rows in update.target}


def _check_same(one: Adapted, other: Adapted, shapes: Mapping[str, tuple[int, ...]]) -> None:
    ours, theirs = _effect(one.updates, shapes), _effect(other.updates, shapes)
    for name in ours.keys() & theirs.keys():
        size = torch.maximum(ours[name].norm(dim=1), theirs[name].norm(dim=1))
        apart = (ours[name] - theirs[name]).norm(dim=1)
        if (apart > _TOLERANCE * size + 1e-4 * size.max()).any():
            both = (*one.updates, *other.updates)
            dora = any(isinstance(update, Magnitude) for update in both)
            raise FormatError(
                f"{name} has {'a DoRA update and another one' if dora else 'two updates that differ'}: "
                f"{one.keys[0]!r} and {other.keys[0]!r}; remove the keys of the one that you do not want"
            )


def _effect(updates: Iterable[Update], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """ΔW times random vectors, for each parameter; of a bias or a norm ΔW itself, as a column."""
    effects = {name: torch.zeros(shapes[name][0], _VECTORS) for name in _parameters(updates)}
    for update in updates:
        parameters = [shapes[rows.parameter] for rows in update.target]
        rows, columns = sum(part.stop - part.start for part in update.target), parameters[0][1:]
        if not columns:
            change = _dense(update, (rows,), shapes)[:, None].expand(-1, _VECTORS)
        else:
            vectors = torch.randn(columns[0], _VECTORS, generator=torch.Generator().manual_seed(0))
            if isinstance(update, LowRank):
                change = _dense(replace(update, down=update.down.float() @ vectors), (rows, _VECTORS), shapes)
            else:
                change = _dense(update, (rows, columns[0]), shapes) @ vectors
        start = 0
        for part in update.target:
            stop = start + part.stop - part.start
            effects[part.parameter][part.start : part.stop] += change[start:stop]
            start = stop
    return effects


def _dense(update: Update, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    def random_weights() -> Tensor:
        return torch.cat([_random(part.parameter, shapes)[part.start : part.stop] for part in update.target])

    out = torch.zeros(shape)
    update.delta(_HOST, random_weights).add_rows(out, 0, shape[0], 1.0)
    return out


def _random(parameter: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    return torch.randn(shapes[parameter], generator=torch.Generator().manual_seed(crc32(parameter.encode())))
