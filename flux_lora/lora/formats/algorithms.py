"""From the parts that a file holds for one layer to the updates they mean.

The sources are the trainers' forward passes: sd-scripts ``networks/lora_flux.py``, LyCORIS ``lycoris/modules``,
PEFT ``tuners/lora``, OneTrainer ``modules/module/LoRAModule.py``, ai-toolkit ``toolkit/models``. Each scales once, by
α/r. (LyCORIS's ``get_diff_weight`` scales LoKr and LoHa twice; the forward pass that trained them does not.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_lora.errors import FormatError
from flux_lora.lora.deltas import Direction, Full, Hadamard, Kronecker, LowRank, Magnitude, Update
from flux_lora.lora.formats.layouts import Layer

Factor = Callable[[int], float]
"""From an update's rank to the number that scales it."""


@dataclass(frozen=True)
class Part:
    """One tensor of a file and its key."""

    key: str
    tensor: Tensor


@dataclass(frozen=True)
class Built:
    """The updates of one layer, the algorithm that made them, and its rank; None when it has none."""

    updates: tuple[Update, ...]
    algorithm: str
    rank: int | None


Parts = dict[str, Part]
Made = tuple[Direction, int | None]


def build(layer: Layer, parts: Mapping[str, Part], factor: Factor) -> Built:
    """The updates that the parts of one layer mean.

    Raises:
        FormatError: a part is missing, has the wrong shape, or does not go with the others.
    """
    rest = dict(parts)
    made = {name: result for name, make in _ALGORITHMS.items() if (result := make(layer, rest, factor))}
    updates: list[Update] = [direction for direction, _ in made.values()]
    names = list(made)
    if magnitudes := [name for name in _EPSILON if name in rest]:
        if len(made) != 1 or len(magnitudes) != 1:
            raise FormatError(f"{rest[magnitudes[0]].key!r} needs exactly one update of its layer to go with")
        [(direction, _)] = made.values()
        updates = [_with_magnitude(direction, layer, rest.pop(magnitudes[0]), _EPSILON[magnitudes[0]])]
        names = [f"{names[0]} with DoRA"]
    ranks = [rank for _, rank in made.values() if rank]
    if "up_bias" in rest and "LoRA" in made:
        updates.append(Full(layer.bias, _bias(layer, rest.pop("up_bias")), factor(ranks[0])))
    if "diff_b" in rest:
        updates.append(Full(layer.bias, _bias(layer, rest.pop("diff_b"))))
        names.append("bias")
    if rest:
        keys = ", ".join(sorted(part.key for part in rest.values()))
        raise FormatError(f"{keys} cannot be used without further tensors, or together with those that are there")
    return Built(tuple(updates), " and ".join(names), ranks[0] if ranks else None)


def _low_rank(layer: Layer, rest: Parts, factor: Factor) -> Made | None:
    if not (taken := _take(rest, "down", "up")):
        return None
    down, up = taken
    rank = _rank(down)
    rows, columns = _matrix_shape(layer, down)
    return LowRank(layer.weight, _shaped(up, rows, rank), _shaped(down, rank, columns), factor(rank)), rank


def _hadamard(layer: Layer, rest: Parts, factor: Factor) -> Made | None:
    if not (taken := _take(rest, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")):
        return None
    rows, columns = _matrix_shape(layer, taken[0])
    products = [
        _factors(a, b, rest.pop(core, None), rows, columns)
        for a, b, core in ((taken[0], taken[1], "hada_t1"), (taken[2], taken[3], "hada_t2"))
    ]
    rank = _rank(taken[1])
    return Hadamard(layer.weight, products[0], products[1], factor(rank)), rank


def _kronecker(layer: Layer, rest: Parts, factor: Factor) -> Made | None:
    """Two full factors have no rank, and no alpha: LyCORIS, ai-toolkit and OneTrainer all train them at scale 1."""
    w1 = rest.get("lokr_w1") or rest.get("lokr_w1_a")
    w2 = rest.get("lokr_w2") or rest.get("lokr_w2_a")
    if not w1 or not w2:
        return None
    rows, columns = _matrix_shape(layer, w1)
    ranks = [_rank(rest[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in rest]
    products = [_kronecker_factor(rest, "lokr_w1", None), _kronecker_factor(rest, "lokr_w2", "lokr_t2")]
    (a, c), (b, d) = ((product[0].shape[0], product[-1].shape[1]) for product in products)
    if (a * b, c * d) != (rows, columns):
        raise FormatError(f"{w1.key!r} and {w2.key!r} give an update of shape {[a * b, c * d]}, {_needs(layer)}")
    rank = ranks[0] if ranks else None
    return Kronecker(layer.weight, products[0], products[1], factor(rank) if rank else 1.0), rank


def _kronecker_factor(rest: Parts, name: str, core: str | None) -> tuple[Tensor, ...]:
    if whole := rest.pop(name, None):
        return (_matrix(whole),)
    a, b = _take(rest, f"{name}_a", f"{name}_b")
    middle = rest.pop(core, None) if core else None
    return _factors(a, b, middle, _matrix(a).shape[1 if middle else 0], _matrix(b).shape[1])


def _full(layer: Layer, rest: Parts, _: Factor) -> Made | None:
    if not (taken := _take(rest, "diff")):
        return None
    return Full(layer.weight, _shaped(taken[0], *layer.shape)), None


_ALGORITHMS = {"LoRA": _low_rank, "LoHa": _hadamard, "LoKr": _kronecker, "full difference": _full}

_EPSILON = {"magnitude": 0.0, "dora_scale": torch.finfo(torch.float32).eps}
"""What PEFT and ai-toolkit, and what LyCORIS and OneTrainer, add to DoRA's norm."""


def _with_magnitude(direction: Direction, layer: Layer, part: Part, epsilon: float) -> Magnitude:
    """The axis follows the shape: (out,) and (out, 1) go with each row's norm, (1, in) with each column's."""
    rows, columns = _matrix_shape(layer, part)
    tensor = part.tensor[:, None] if part.tensor.ndim == 1 else _matrix(part)
    if tuple(tensor.shape) not in ((rows, 1), (1, columns)):
        raise _wrong_shape(part, [rows, 1], [1, columns])
    return Magnitude(direction, tensor, epsilon)


def _bias(layer: Layer, part: Part) -> Tensor:
    if not layer.bias:
        raise FormatError(f"{part.key!r} is for a bias, and {layer.name} of FLUX.1 has none")
    return _shaped(part, sum(rows.stop - rows.start for rows in layer.bias))


def _factors(a: Part, b: Part, core: Part | None, rows: int, columns: int) -> tuple[Tensor, ...]:
    """Matrices whose product is (rows, columns): a @ b, or aᵀ @ core @ b with LyCORIS's Tucker core."""
    rank = _rank(b)
    right = _shaped(b, rank, columns)
    if core is None:
        return _shaped(a, rows, rank), right
    return _shaped(a, rank, rows).T, _shaped(core, rank, rank), right


def _take(rest: Parts, *names: str) -> list[Part]:
    """Take the named parts; an empty list when none is there.

    Raises:
        FormatError: some are there and some are not.
    """
    there = [name for name in names if name in rest]
    if there and len(there) < len(names):
        missing = ", ".join(_IN_FILES.get(name, name) for name in names if name not in rest)
        raise FormatError(f"{rest[there[0]].key!r} is there without its {missing}")
    return [rest.pop(name) for name in there]


_IN_FILES = {"down": "lora_A (or lora_down)", "up": "lora_B (or lora_up)"}


def _rank(part: Part) -> int:
    """The rank of a factor whose rows are the rank's."""
    return _matrix(part).shape[0]


def _matrix(part: Part) -> Tensor:
    """The part as a matrix; (out, in, 1, 1) of a convolution counts as (out, in)."""
    if part.tensor.ndim < 2 or not part.tensor.numel():
        raise FormatError(f"{part.key!r} has shape {list(part.tensor.shape)} and must be a matrix")
    return part.tensor.flatten(1)


def _matrix_shape(layer: Layer, part: Part) -> tuple[int, int]:
    if len(layer.shape) != 2:
        raise FormatError(f"{part.key!r} is part of a matrix, {_needs(layer)}")
    return layer.shape[0], layer.shape[1]


def _shaped(part: Part, *shape: int) -> Tensor:
    tensor = _matrix(part) if part.tensor.ndim > 2 else part.tensor
    if tuple(tensor.shape) != shape:
        raise _wrong_shape(part, list(shape))
    return tensor


def _wrong_shape(part: Part, *shapes: list[int]) -> FormatError:
    return FormatError(
        f"{part.key!r} has shape {list(part.tensor.shape)} where FLUX.1 needs {' or '.join(map(str, shapes))}"
    )


def _needs(layer: Layer) -> str:
    return f"where {layer.name} of FLUX.1 has shape {list(layer.shape)}"
