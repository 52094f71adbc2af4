"""Parsed adapters, kept in host memory within a budget."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch

from flux_lora.device import devices
from flux_lora.errors import FormatError
from flux_lora.lora.formats import Adapter, read, version

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]

KEPT_FREE_BYTES = 2**30
"""Host memory that adapters leave to the work of a prediction, where the host has that much at all."""

SHARE = 4
"""Without a budget of the operator's, adapters may take a quarter of the host memory that is free at set-up."""


class AdapterLibrary:
    """Reads each adapter file once, as long as the parsed adapters fit into a budget and into the host's memory.

    Args:
        shapes: of the served parameters, by component.
        budget: bytes; None: a share of the host memory that is free now.
    """

    def __init__(self, shapes: Shapes, budget: int | None = None) -> None:
        """Take the shapes of the served parameters, and the budget in bytes; None: what free memory allows."""
        self._shapes = shapes
        self._budget = _free() // SHARE if budget is None else budget
        self._known: OrderedDict[tuple[object, ...], Adapter] = OrderedDict()

    def read(self, path: Path, name: str | None = None) -> Adapter:
        """The adapter in a file, which messages call by ``name``, or else by its path.

        Raises:
            FormatError: the file cannot be applied, or the host's memory has no room for it; with its name and why.
        """
        try:
            key = (path.resolve(), *version(path))
            size = path.stat().st_size
        except OSError as error:
            raise FormatError(f"{name or path} cannot be read: {error.strerror}.") from None
        if key not in self._known:
            self._make_room(size, name or str(path))
            self._known[key] = read(path, self._shapes, name)
        self._known.move_to_end(key)
        while len(self._known) > 1 and sum(adapter.nbytes for adapter in self._known.values()) > self._budget:
            self._known.popitem(last=False)
        return self._known[key]

    def _make_room(self, size: int, name: str) -> None:
        """Let go of the least recently used adapters until a file of this size fits."""
        while self._known and _free() < size + KEPT_FREE_BYTES:
            self._known.popitem(last=False)
        if (free := _free()) < size:
            raise FormatError(
                f"{name} cannot be read: it takes {size / 2**20:,.0f} MiB of host memory, and {free / 2**20:,.0f} MiB "
                "are free."
            )


def _free() -> int:
    return devices.free_memory(torch.device("cpu"))
