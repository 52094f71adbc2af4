"""From the parts that a file holds for one layer to the updates they mean.

The sources are the trainers' forward passes: sd-scripts ``networks/lora_flux.py`` and ``oft_flux.py``, LyCORIS
``lycoris/modules``, PEFT ``tuners/lora``, ``oft`` and ``boft``, OneTrainer ``modules/module``, ai-toolkit
``toolkit/models``. Each scales once, by α/r. (LyCORIS's ``get_diff_weight`` scales LoKr and LoHa twice; the forward
pass that trained them does not.)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flux_lora.errors import FormatError
from flux_lora.lora.deltas import Direction, Full, Hadamard, Kronecker, LowRank, Magnitude, Update, Whole
from flux_lora.lora.formats.layouts import Layer
from flux_lora.lora.rotations import (
    PeftOft,
    Rotation,
    block_size,
    kohya,
    lycoris,
    lycoris_order,
    peft_boft,
    peft_order,
)


@dataclass(frozen=True)
class Part:
    """One tensor of a file and its key, and whether it is known to be all zeros."""

    key: str
    tensor: Tensor
    zero: bool = False


@dataclass(frozen=True)
class Given:
    """What an algorithm may ask about its layer; a number that none asks for is not judged.

    Args:
        factor: from an update's rank to the number that scales it.
        constraint: alpha as it stands in the file, if it does: sd-scripts and LyCORIS bound OFT with it.
        oft: how PEFT made its rotations.
    """

    factor: Callable[[int], float]
    constraint: Callable[[], float | None]
    oft: PeftOft


@dataclass(frozen=True)
class Made:
    """What an algorithm makes of a layer's parts; ``zero`` if its updates are known to change nothing."""

    updates: tuple[Update, ...]
    rank: int | None = None
    zero: bool = False
    reads_alpha: bool = False


@dataclass(frozen=True)
class Built:
    """The updates of one layer, the algorithms that made them, its rank (None: it has none), and whether alpha counts.

    Updates that are known to change nothing are not among them.
    """

    updates: tuple[Update, ...]
    algorithm: str
    rank: int | None
    reads_alpha: bool


Parts = dict[str, Part]


def build(layer: Layer, parts: Mapping[str, Part], given: Given) -> Built:
    """The updates that the parts of one layer mean.

    Raises:
        FormatError: a part is missing, has the wrong shape, or does not go with the others; or a number is not finite.
    """
    rest = dict(parts)
    made = [(name, result) for name, make in _ALGORITHMS if (result := make(layer, rest, given))]
    ranks = [result.rank for _, result in made if result.rank]
    if magnitudes := [name for name in _EPSILON if name in rest]:
        part = rest.pop(magnitudes[0])
        if len(made) != 1 or len(magnitudes) != 1:
            raise FormatError(f"{part.key!r} needs exactly one update of its layer to go with")
        [(name, result)] = made
        made = [(f"{name} with DoRA", _with_magnitude(result, layer, part, _EPSILON[magnitudes[0]]))]
    if "up_bias" in rest and "up" in parts:
        part = rest.pop("up_bias")
        made.append(("bias", Made((Full(layer.bias, _bias(layer, part), given.factor(ranks[0])),), zero=part.zero)))
    if "diff_b" in rest:
        part = rest.pop("diff_b")
        made.append(("bias", Made((Full(layer.bias, _bias(layer, part)),), zero=part.zero)))
    for name, rows, fit in (("whole", layer.weight, _weight), ("whole_bias", layer.bias, _bias)):
        if name in rest:
            part = rest.pop(name)
            if any(update.target[0].parameter == rows[0].parameter for _, result in made for update in result.updates):
                raise FormatError(f"{part.key!r} is all of its layer, and an update of it is there, too")
            made.append(("whole layer", Made((Whole(rows, fit(layer, part)),))))
    if rest:
        keys = ", ".join(sorted(part.key for part in rest.values()))
        raise FormatError(f"{keys} cannot be used without further tensors, or together with those that are there")
    effective = [(name, result) for name, result in made if not result.zero]
    return Built(
        tuple(update for _, result in effective for update in result.updates),
        " and ".join(dict.fromkeys(name for name, _ in effective or made)),
        ranks[0] if ranks else None,
        any(result.reads_alpha for _, result in made),
    )


def _low_rank(layer: Layer, rest: Parts, given: Given) -> Made | None:
    if not (taken := _take(rest, "down", "up")):
        return None
    down, up = taken
    rank = _rank(down)
    rows, columns = _matrix_shape(layer, down)
    _check_rank(layer, down, rank)
    return _product(layer, _shaped(up, rows, rank), _shaped(down, rank, columns), given, zero=up.zero or down.zero)


def _low_rank_of_a_table(layer: Layer, rest: Parts, given: Given) -> Made | None:
    """PEFT's of an embedding, whose factors lie the other way round."""
    if not (taken := _take(rest, "table_down", "table_up")):
        return None
    down, up = taken
    rank = _rank(down)
    rows, columns = _matrix_shape(layer, down)
    _check_rank(layer, down, rank)
    return _product(layer, _shaped(down, rank, rows).T, _shaped(up, columns, rank).T, given, zero=up.zero or down.zero)


def _product(layer: Layer, up: Tensor, down: Tensor, given: Given, *, zero: bool) -> Made:
    rank = len(down)
    return Made((LowRank(layer.weight, up, down, given.factor(rank)),), rank, zero, reads_alpha=True)


def _hadamard(layer: Layer, rest: Parts, given: Given) -> Made | None:
    if not (taken := _take(rest, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")):
        return None
    rows, columns = _matrix_shape(layer, taken[0])
    cores = [rest.pop(core, None) for core in ("hada_t1", "hada_t2")]
    w1 = _factors(taken[0], taken[1], cores[0], rows, columns)
    w2 = _factors(taken[2], taken[3], cores[1], rows, columns)
    zero = any(part.zero for part in (*taken, *filter(None, cores)))
    rank = _rank(taken[1])
    _check_rank(layer, taken[1], rank)
    return Made((Hadamard(layer.weight, w1, w2, given.factor(rank)),), rank, zero, reads_alpha=True)


def _kronecker(layer: Layer, rest: Parts, given: Given) -> Made | None:
    """Two full factors have no rank, and no alpha: LyCORIS, ai-toolkit and OneTrainer all train them at scale 1."""
    w1 = rest.get("lokr_w1") or rest.get("lokr_w1_a")
    w2 = rest.get("lokr_w2") or rest.get("lokr_w2_a")
    if not w1 or not w2:
        return None
    rows, columns = _matrix_shape(layer, w1)
    ranks = [_rank(rest[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in rest]
    zero = any(part.zero for name, part in rest.items() if name.startswith("lokr_"))
    products = [_kronecker_factor(rest, "lokr_w1", None), _kronecker_factor(rest, "lokr_w2", "lokr_t2")]
    (a, c), (b, d) = ((product[0].shape[0], product[-1].shape[1]) for product in products)
    if (a * b, c * d) != (rows, columns):
        raise FormatError(f"{w1.key!r} and {w2.key!r} give an update of shape {[a * b, c * d]}, {_needs(layer)}")
    factor = given.factor(ranks[0]) if ranks else 1.0
    update = Kronecker(layer.weight, products[0], products[1], factor)
    return Made((update,), ranks[0] if ranks else None, zero, reads_alpha=bool(ranks))


def _kronecker_factor(rest: Parts, name: str, core: str | None) -> tuple[Tensor, ...]:
    if whole := rest.pop(name, None):
        return (_matrix(whole),)
    a, b = _take(rest, f"{name}_a", f"{name}_b")
    middle = rest.pop(core, None) if core else None
    return _factors(a, b, middle, _matrix(a).shape[1 if middle else 0], _matrix(b).shape[1])


def _full(layer: Layer, rest: Parts, _: Given) -> Made | None:
    if not (taken := _take(rest, "diff")):
        return None
    return Made((Full(layer.weight, _shaped(taken[0], *layer.shape)),), zero=taken[0].zero)


def _kohya_oft(layer: Layer, rest: Parts, given: Given) -> Made | None:
    """Of the layers that diffusers has in parts, each part by itself."""
    names = [f"oft_blocks.{index}" for index in range(len(layer.weight))]
    if names[0] not in rest:
        return None
    names = names if set(names) <= rest.keys() else names[:1]
    taken = [rest.pop(name) for name in names]
    _matrix_shape(layer, taken[0])
    bound = given.constraint()
    updates = []
    for part, target in zip(
        taken, [(rows,) for rows in layer.weight] if len(taken) > 1 else [layer.weight], strict=True
    ):
        size = sum(rows.stop - rows.start for rows in target)
        skew = _blocks(part, size, 3)
        if not _symmetric(skew):
            updates.append(Rotation(target, "rows", skew, kohya(math.inf if bound is None else bound * size)))
    return Made(tuple(updates), zero=not updates, reads_alpha=True)


def _lycoris_oft(layer: Layer, rest: Parts, given: Given) -> Made | None:
    """Diag-OFT."""
    return _of_lycoris(layer, rest, given, 3)


def _lycoris_boft(layer: Layer, rest: Parts, given: Given) -> Made | None:
    return _of_lycoris(layer, rest, given, 4)


def _of_lycoris(layer: Layer, rest: Parts, given: Given, dimensions: int) -> Made | None:
    if "oft_blocks" not in rest or rest["oft_blocks"].tensor.ndim != dimensions:
        return None
    part = rest.pop("oft_blocks")
    rows, _ = _matrix_shape(layer, part)
    skew = _blocks(part, rows, dimensions)
    orders = _orders(part, lycoris_order) if dimensions == 4 else (None,)
    magnitude = _column(rest.pop("rescale", None), rows)
    make = lycoris((given.constraint() or 0.0) * rows)
    update = Rotation(layer.weight, "rows", skew, make, orders, magnitude)
    return Made((update,), zero=_symmetric(skew) and magnitude is None, reads_alpha=True)


def _peft_oft(layer: Layer, rest: Parts, given: Given) -> Made | None:
    if (part := rest.pop("oft_R", None)) is None:
        return None
    _, columns = _matrix_shape(layer, part)
    vectors = _matrix(part)
    size = block_size(vectors.shape[1])
    if not size or columns % size or len(vectors) not in (1, columns // size):
        raise FormatError(f"{part.key!r} has shape {list(part.tensor.shape)}, which are no blocks of {columns} inputs")
    make = replace(given.oft, scaled=rest.pop("oft_scaled", None) is not None)
    return Made((Rotation(layer.weight, "columns", vectors, make),), zero=part.zero)


def _peft_boft(layer: Layer, rest: Parts, _: Given) -> Made | None:
    if (part := rest.pop("boft_R", None)) is None:
        return None
    rows, columns = _matrix_shape(layer, part)
    skew = _blocks(part, columns, 4)
    magnitude = _column(rest.pop("boft_s", None), rows)
    update = Rotation(layer.weight, "columns", skew, peft_boft, _orders(part, peft_order), magnitude)
    return Made((update,), zero=_symmetric(skew) and magnitude is None)


_ALGORITHMS = (
    ("LoRA", _low_rank),
    ("LoRA", _low_rank_of_a_table),
    ("LoHa", _hadamard),
    ("LoKr", _kronecker),
    ("full difference", _full),
    ("OFT", _kohya_oft),
    ("OFT", _lycoris_oft),
    ("OFT", _peft_oft),
    ("BOFT", _lycoris_boft),
    ("BOFT", _peft_boft),
)

_EPSILON = {"magnitude": 0.0, "dora_scale": torch.finfo(torch.float32).eps}
"""What PEFT and ai-toolkit, and what LyCORIS and OneTrainer, add to DoRA's norm."""


def _with_magnitude(made: Made, layer: Layer, part: Part, epsilon: float) -> Made:
    """The axis follows the shape: (out,) and (out, 1) go with each row's norm, (1, in) with each column's."""
    rows, columns = _matrix_shape(layer, part)
    tensor = part.tensor[:, None] if part.tensor.ndim == 1 else _matrix(part)
    if tuple(tensor.shape) not in ((rows, 1), (1, columns)):
        raise _wrong_shape(part, [rows, 1], [1, columns])
    direction = made.updates[0] if made.updates else None
    if not isinstance(direction, Direction):
        raise FormatError(f"{part.key!r} needs an update of its layer that has a direction")
    return replace(made, updates=(Magnitude(direction, tensor, epsilon),), zero=False)


def _blocks(part: Part, size: int, dimensions: int) -> Tensor:
    """Square blocks along an axis of a weight, for each stage of BOFT."""
    shape = part.tensor.shape
    if len(shape) != dimensions or shape[-1] != shape[-2] or shape[-3] * shape[-1] != size or not part.tensor.numel():
        raise FormatError(f"{part.key!r} has shape {list(shape)} and must be square blocks, {size} rows in all")
    return part.tensor


def _orders(part: Part, order: Callable[[int, int, int], Tensor]) -> tuple[Tensor | None, ...]:
    """How each stage of BOFT orders the axis."""
    stages, count, block, _ = part.tensor.shape
    size = count * block
    if stages > 1 and (block % 2 or size % (2 ** (stages - 1) * block)):
        raise FormatError(f"{part.key!r} has shape {list(part.tensor.shape)}, which are no stages of one axis")
    return tuple(order(size, block, stage) for stage in range(stages))


def _symmetric(blocks: Tensor) -> bool:
    """Whether nothing skew-symmetric is in them, so that they turn nothing."""
    numbers = blocks.float()
    return torch.equal(numbers, numbers.mT)


def _column(part: Part | None, rows: int) -> Tensor | None:
    """What each row is multiplied with; None if that is 1."""
    if part is None or (part.tensor.numel() == rows and bool((part.tensor.float() == 1).all())):
        return None
    if part.tensor.shape[:1] != (rows,) or part.tensor.numel() != rows:
        raise _wrong_shape(part, [rows, 1])
    return part.tensor.reshape(rows, 1)


def _weight(layer: Layer, part: Part) -> Tensor:
    return _shaped(part, *layer.shape)


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


def _check_rank(layer: Layer, part: Part, rank: int) -> None:
    """No matrix has a higher rank than it has rows or columns; of a fused layer, each part may have its own factors."""
    most = sum(min(rows.stop - rows.start, layer.shape[1]) for rows in layer.weight)
    if rank > most:
        raise FormatError(f"{part.key!r} has rank {rank:,}, {_needs(layer)} and so at most rank {most:,}")


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
