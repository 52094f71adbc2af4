"""Merging adapters into the weights in place: W' = W + Σ s·ΔW, exact and reversible.

The pristine weight and its contributions, in the order of their adapters' digests, are summed in float32 and rounded
once to the weight's type. Nothing is ever subtracted: every state is computed from pristine weights, so it depends on
nothing but the adapters and scales in it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_lora import devices
from flux_lora.adapters.deltas import Delta, Update
from flux_lora.adapters.formats import Adapter

HOST = torch.device("cpu")

AdapterSet = Sequence[tuple[Adapter, float]]
State = tuple[tuple[str, float], ...]
"""What is merged into a module: (digest, scale) in order of the digests; empty: the base model."""

BLOCK_ELEMENTS = {"cpu": 2**19}
"""Elements of a weight that are merged at a time: on a CPU what stays in its cache, elsewhere all of them."""

KEPT_FREE_BYTES = {"cuda": 4 * 2**30, "cpu": 2**30}
"""Memory that pristine weights leave to the work of a prediction, on a device and in the host."""

ReadPristine = Callable[[], Tensor]


@dataclass(frozen=True)
class Contribution:
    """Rows [start, stop) of a parameter get rows from ``offset`` of an update, times ``scale``."""

    update: Update
    scale: float
    start: int
    stop: int
    offset: int


class MergedModule:
    """A module whose weights hold a set of adapters, and can be brought to any other set."""

    def __init__(self, component: str, module: torch.nn.Module, stored: Mapping[str, ReadPristine]) -> None:
        """Take a module that holds the base weights.

        Args:
            component: the adapters' name for it: transformer, text_encoder or text_encoder_2.
            module: changed in place from now on, and by nothing else.
            stored: read a parameter's base weights once more from its file, for where memory has no room to keep them.
        """
        self._component = component
        self._parameters = dict(module.named_parameters())
        self._stored = stored
        self._pristine: dict[str, Tensor | ReadPristine] = {}  # of every parameter that is, or may be, changed
        self._state: State | None = ()  # None while a merge is under way: what was interrupted is never served

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
        with torch.no_grad():
            for name in self._pristine.keys() - contributions.keys():
                self._parameters[name].copy_(self._read_pristine(name))
            for group in _groups(contributions):
                self._merge_group({name: contributions[name] for name in group})
        for name in self._pristine.keys() - contributions.keys():
            del self._pristine[name]
        self._state = wanted
        return True

    def where(self) -> str:
        """Where the pristine weights live, for the log."""
        sizes: dict[str, int] = defaultdict(int)
        for name, kept in self._pristine.items():
            place = f"on {kept.device}" if isinstance(kept, Tensor) else "in their files"
            sizes[place] += self._parameters[name].nbytes
        places = ", ".join(f"{size / 2**20:,.0f} MiB {place}" for place, size in sorted(sizes.items()))
        return f"pristine: {places}" if places else "all pristine"

    def _updates(self, adapter: Adapter) -> list[Update]:
        updates = adapter.updates.get(self._component, ())
        return [update for update in updates if all(rows.parameter in self._parameters for rows in update.target)]

    def _contributions(self, adapters: AdapterSet) -> Mapping[str, list[Contribution]]:
        by_parameter: dict[str, list[Contribution]] = defaultdict(list)
        for adapter, scale in sorted(adapters, key=lambda item: (item[0].digest, item[1])):
            for update in self._updates(adapter) if scale else ():
                offset = 0
                for rows in update.target:
                    by_parameter[rows.parameter].append(Contribution(update, scale, rows.start, rows.stop, offset))
                    offset += rows.stop - rows.start
        return by_parameter

    def _merge_group(self, contributions: Mapping[str, list[Contribution]]) -> None:
        """Merge parameters that share updates: an update over a fused projection is computed once for its parts."""
        bound: dict[int, Delta] = {}
        for name, items in contributions.items():
            parameter, pristine = self._parameters[name], self._read_pristine(name)
            for item in items:
                if id(item.update) not in bound:
                    bound[id(item.update)] = self._bind(item.update, parameter.device)
            rows = _rows_at_a_time(parameter)
            sums = torch.empty((rows, *parameter.shape[1:]), dtype=torch.float32, device=parameter.device)
            for start in range(0, len(parameter), rows):
                stop = min(start + rows, len(parameter))
                total = sums[: stop - start].copy_(pristine[start:stop])
                for item in items:
                    low, high = max(start, item.start), min(stop, item.stop)
                    if low < high:
                        first = item.offset + low - item.start
                        delta = bound[id(item.update)]
                        delta.add_rows(total[low - start : high - start], first, first + high - low, item.scale)
                parameter[start:stop].copy_(total)

    def _bind(self, update: Update, device: torch.device) -> Delta:
        def pristine() -> Tensor:
            parts = [self._read_pristine(rows.parameter)[rows.start : rows.stop] for rows in update.target]
            return torch.cat([part.to(device, torch.float32) for part in parts])

        return update.delta(device, pristine)

    def _read_pristine(self, name: str) -> Tensor:
        """The base weights of a parameter, kept from before its first change on."""
        if name not in self._pristine:
            self._pristine[name] = self._keep(name)
        kept = self._pristine[name]
        return kept if isinstance(kept, Tensor) else kept().to(self._parameters[name].dtype)

    def _keep(self, name: str) -> Tensor | ReadPristine:
        """Keep base weights where measured memory allows: on their device, else in pinned host memory, else on disk."""
        parameter = self._parameters[name].detach()
        if _has_room(parameter.device, parameter.nbytes):
            return parameter.clone()
        if name in self._stored and not _has_room(HOST, parameter.nbytes):
            return self._stored[name]
        return _host_memory(parameter).copy_(parameter)


def _host_memory(parameter: Tensor) -> Tensor:
    """Room for a parameter in host memory, pinned for a GPU if the system lets that be."""
    try:
        return torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.device.type == "cuda")
    except RuntimeError:
        return torch.empty(parameter.shape, dtype=parameter.dtype)


def _has_room(device: torch.device, size: int) -> bool:
    return devices.free_memory(device) - size > KEPT_FREE_BYTES[device.type]


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


def _rows_at_a_time(parameter: Tensor) -> int:
    elements = BLOCK_ELEMENTS.get(parameter.device.type, parameter.numel())
    return min(len(parameter), max(1, elements * len(parameter) // parameter.numel()))
