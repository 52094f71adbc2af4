"""Merging adapters into the weights in place: W' = W + Σ s·ΔW, exact and reversible.

The pristine weight and its contributions, in the order of their adapters' digests, are summed in float32 and rounded
once to the weight's type, or quantized once. Nothing is ever subtracted: every state is computed from pristine weights,
so it depends on nothing but the adapters and scales in it, on one device. Where every contribution is low-rank, one
program of `fused` does it on a GPU.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_lora.device import devices
from flux_lora.device.transfers import Lane
from flux_lora.lora import fused
from flux_lora.lora.deltas import Delta, Update, full_float32
from flux_lora.lora.formats import Adapter
from flux_lora.speed.quantization import QuantizedLinear, quantized_layers

HOST = torch.device("cpu")

AdapterSet = Sequence[tuple[Adapter, float]]
State = tuple[tuple[str, float], ...]
"""What is merged into a module: (digest, scale) in order of the digests; empty: the base model."""

BLOCK_ELEMENTS = {"cpu": 2**19}
"""Elements of a weight that are merged at a time: on a CPU what stays in its cache, elsewhere all of them."""

KEPT_FREE_BYTES = {"cuda": 6 * 2**30, "cpu": 2**30}
"""Memory that pristine weights leave to the work of a prediction, on a device and in the host.

On a device that is more than any memory plan counts for its work and for the slots that blocks are streamed through.
"""

ReadPristine = Callable[[], Tensor]
Base = Callable[[str], Tensor | ReadPristine | None]
"""Where a parameter's base weights are beside the parameter itself, if they have such a place."""

Weight = Tensor | QuantizedLinear
"""What a merged weight is written into, row by row."""


@dataclass(frozen=True)
class Contribution:
    """Rows [start, stop) of a parameter get rows from ``offset`` of an adapter's update, times ``scale``."""

    digest: str
    update: Update
    scale: float
    start: int
    stop: int
    offset: int


class MergedModule:
    """A module whose weights hold a set of adapters, and can be brought to any other set."""

    def __init__(
        self,
        component: str,
        module: torch.nn.Module,
        stored: Mapping[str, ReadPristine],
        *,
        device: torch.device | None = None,
        base: Base = lambda _: None,
        programs: bool | None = None,
    ) -> None:
        """Take a module that holds the base weights, or whose quantized layers stand for them.

        Args:
            component: the adapters' name for it: transformer, text_encoder or text_encoder_2.
            module: changed in place from now on, and by nothing else.
            stored: read a parameter's base weights once more from its file, for where memory has no room to keep them.
            device: where sums are computed, wherever the weights live: a sum's last bits depend on it. None: where the
                weights are.
            base: asked for a parameter's base weights before any room is taken to keep them.
            programs: whether low-rank updates are merged by `fused`; None: where its programs are compiled.
        """
        self._component = component
        self._stored = stored
        self._device = device
        self._base = base
        self._programs = programs
        # Of what is, or may be, changed, and of all that is quantized.
        self._pristine: dict[str, Tensor | ReadPristine] = {}
        self._held: dict[str, State] = {}  # what is merged into each of those
        self._torn: set[str] = set()  # those that an interrupted merge may have left half written
        self._parameters: dict[str, Weight] = {**dict(module.named_parameters()), **quantized_layers(module)}
        self._state: State | None = ()  # None when parameters differ, or a merge was interrupted: never served

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by its name."""
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    @property
    def state(self) -> State | None:
        """What is merged now; None after a merge that was interrupted, until the next `bring`."""
        return self._state

    def state_of(self, adapters: AdapterSet) -> State:
        """The state that a set of adapters means for this module: those that change it, in canonical order."""
        return tuple(sorted((adapter.digest, scale) for adapter, scale in adapters if scale and self._updates(adapter)))

    def bring(self, adapters: AdapterSet) -> bool:
        """Bring the weights to a set of adapters; True when that took any work.

        Interrupted at any point (cancelled, out of memory), the next call starts again from pristine weights.
        """
        wanted = self.state_of(adapters)
        if wanted == self._state:
            return False
        self._state = None
        contributions = self._contributions(adapters)
        with torch.no_grad(), full_float32():
            for name in self._held.keys() - contributions.keys():
                self._torn.add(name)
                _write(self._parameters[name], 0, self._read_pristine(name))
                self._torn.remove(name)
                del self._held[name]
                if isinstance(self._parameters[name], Tensor):  # of quantized weights nothing else holds the base
                    del self._pristine[name]
            stale = [
                [name for name in group if name in self._torn or self._held.get(name) != _in_order(contributions[name])]
                for group in _groups(contributions)
            ]
            bases = self._uploaded([name for group in stale for name in group])
            for group in stale:
                self._held |= {name: _in_order(contributions[name]) for name in group}
                self._torn.update(group)
                self._merge_group({name: contributions[name] for name in group}, bases)
                self._torn.difference_update(group)
        self._state = wanted
        return True

    def forget(self, names: Iterable[str]) -> None:
        """Take note that parameters no longer hold what was merged: when they return, they hold the base weights."""
        for name in names:
            self._pristine.pop(name, None)
            self._torn.discard(name)
            if self._held.pop(name, None):
                self._state = None

    def where(self) -> str:
        """Where the pristine weights live, for the log."""
        sizes: dict[str, int] = defaultdict(int)
        for name, kept in self._pristine.items():
            place = f"on {kept.device}" if isinstance(kept, Tensor) else "in their files"
            sizes[place] += _nbytes(self._parameters[name])
        places = ", ".join(f"{size / 2**20:,.0f} MiB {place}" for place, size in sorted(sizes.items()))
        return f"pristine weights kept: {places}" if places else "no pristine weights kept"

    def _updates(self, adapter: Adapter) -> list[Update]:
        updates = adapter.updates.get(self._component, ())
        return [update for update in updates if all(rows.parameter in self._parameters for rows in update.target)]

    def _contributions(self, adapters: AdapterSet) -> Mapping[str, list[Contribution]]:
        by_parameter: dict[str, list[Contribution]] = defaultdict(list)
        for adapter, scale in sorted(adapters, key=lambda item: (item[0].digest, item[1])):
            for update in self._updates(adapter) if scale else ():
                offset = 0
                for rows in update.target:
                    by_parameter[rows.parameter].append(
                        Contribution(adapter.digest, update, scale, rows.start, rows.stop, offset)
                    )
                    offset += rows.stop - rows.start
        return by_parameter

    def _merge_group(self, contributions: Mapping[str, list[Contribution]], bases: Iterator[Tensor]) -> None:
        """Merge parameters that share updates: an update over a fused projection is computed once for its parts.

        Args:
            contributions: by parameter.
            bases: gives the base weights of each of them, in their order.
        """
        bound: dict[int, Delta] = {}
        for name, items in contributions.items():
            parameter, pristine = self._parameters[name], next(bases)
            device = self._sums_on(name)
            programs = fused.runs_on(device) if self._programs is None else self._programs
            if programs and fused.merge(parameter, pristine, items, device):
                continue
            for item in items:
                if id(item.update) not in bound:
                    bound[id(item.update)] = self._bind(item.update, device)
            rows = _rows_at_a_time(parameter, device)
            sums = torch.empty((rows, *parameter.shape[1:]), dtype=torch.float32, device=device)
            for start in range(0, parameter.shape[0], rows):
                stop = min(start + rows, parameter.shape[0])
                total = sums[: stop - start].copy_(pristine[start:stop].to(device))
                for item in items:
                    low, high = max(start, item.start), min(stop, item.stop)
                    if low < high:
                        first = item.offset + low - item.start
                        delta = bound[id(item.update)]
                        delta.add_rows(total[low - start : high - start], first, first + high - low, item.scale)
                _write(parameter, start, total)

    def _uploaded(self, names: Iterable[str]) -> Iterator[Tensor]:
        """The base weights of parameters; to a GPU those of the next one travel while those of one are summed."""
        lanes: dict[torch.device, Lane] = {}
        coming: list[tuple[Tensor, Lane | None, torch.cuda.Event | None]] = []
        for name in names:
            pristine, device = self._read_pristine(name), self._sums_on(name)
            if device.type == "cuda" and pristine.device != device:
                lane = lanes[device] if device in lanes else lanes.setdefault(device, Lane(device))
                there = torch.empty_like(pristine, device=device)  # in its own type: half of float32's bytes
                coming.append((there, lane, lane.copy(there, pristine)))
            else:
                coming.append((pristine, None, None))
            if len(coming) > 1:
                yield _arrived(*coming.pop(0))
        for upload in coming:
            yield _arrived(*upload)

    def _sums_on(self, name: str) -> torch.device:
        return self._device or self._parameters[name].device

    def _bind(self, update: Update, device: torch.device) -> Delta:
        def pristine() -> Tensor:
            parts = [self._read_pristine(rows.parameter)[rows.start : rows.stop] for rows in update.target]
            there = [part.to(device) for part in parts]
            return torch.cat(there) if len(there) > 1 else there[0]

        return update.delta(device, pristine)

    def _read_pristine(self, name: str) -> Tensor:
        """The base weights of a parameter, kept from before its first change on."""
        if name not in self._pristine:
            self._pristine[name] = self._keep(name)
        kept = self._pristine[name]
        return kept if isinstance(kept, Tensor) else kept().to(self._parameters[name].dtype)

    def _keep(self, name: str) -> Tensor | ReadPristine:
        """Keep base weights where measured memory allows: on their device, else in pinned host memory, else on disk."""
        if (base := self._base(name)) is not None:
            return base
        weight = self._parameters[name]
        device, size = weight.device, _nbytes(weight)
        kept = weight.detach() if isinstance(weight, Tensor) else self._stored[name]().to(weight.dtype)
        if _has_room(device, size):
            return kept.to(device, copy=True)
        return self._keep_off_device(name, kept, device)

    def _keep_off_device(self, name: str, base: Tensor, device: torch.device) -> Tensor | ReadPristine:
        if name in self._stored and not _has_room(HOST, base.nbytes):
            return self._stored[name]
        return _host_memory(base, device).copy_(base)


def _arrived(weights: Tensor, lane: Lane | None, event: torch.cuda.Event | None) -> Tensor:
    if lane:
        lane.wait(event)
    return weights


def _host_memory(base: Tensor, device: torch.device) -> Tensor:
    """Room for base weights in host memory, pinned for a GPU if the system lets that be."""
    try:
        return torch.empty(base.shape, dtype=base.dtype, pin_memory=device.type == "cuda")
    except RuntimeError:
        return torch.empty(base.shape, dtype=base.dtype)


def _nbytes(weight: Weight) -> int:
    """Bytes of the base weights in the model's type."""
    return weight.shape.numel() * weight.dtype.itemsize


def _write(weight: Weight, start: int, rows: Tensor) -> None:
    """Write rows from ``start`` on in place."""
    stop = start + len(rows)
    if isinstance(weight, QuantizedLinear):
        weight.write_rows(start, stop, rows)
    else:
        weight[start:stop].copy_(rows)


def _has_room(device: torch.device, size: int) -> bool:
    return devices.free_memory(device) - size > KEPT_FREE_BYTES[device.type]


def _in_order(contributions: Iterable[Contribution]) -> State:
    """What is merged into one parameter: adapters and scales, which are all that its contributions depend on."""
    return tuple((item.digest, item.scale) for item in contributions)


def _groups(contributions: Mapping[str, Iterable[Contribution]]) -> Iterator[list[str]]:
    """Parameters in groups that share no update with another group."""
    waiting = dict.fromkeys(contributions)
    while waiting:
        group, reached = [], [next(iter(waiting))]
        while reached:
            name = reached.pop()
            if name in waiting:
                del waiting[name]
                group.append(name)
                reached += (rows.parameter for item in contributions[name] for rows in item.update.target)
        yield group


def _rows_at_a_time(weight: Weight, device: torch.device) -> int:
    rows, size = weight.shape[0], weight.shape.numel()
    return min(rows, max(1, BLOCK_ELEMENTS.get(device.type, size) * rows // size))
