"""Parsed adapters, kept in host memory within a budget."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from flux_lora.errors import FormatError
from flux_lora.lora.formats import Adapter, read, version

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


class AdapterLibrary:
    """Reads each adapter file once, as long as the parsed adapters fit into ``budget`` bytes."""

    def __init__(self, shapes: Shapes, budget: int) -> None:
        self._shapes = shapes
        self._budget = budget
        self._known: OrderedDict[tuple[object, ...], Adapter] = OrderedDict()

    def read(self, path: Path, name: str | None = None) -> Adapter:
        """The adapter in a file, which messages call by ``name``, or else by its path.

        Raises:
            FormatError: the file cannot be applied, with its name and the reason.
        """
        try:
            key = (path.resolve(), *version(path))
        except OSError as error:
            raise FormatError(f"{name or path} cannot be read: {error.strerror}.") from None
        if key not in self._known:
            self._known[key] = read(path, self._shapes, name)
        self._known.move_to_end(key)
        while len(self._known) > 1 and sum(adapter.nbytes for adapter in self._known.values()) > self._budget:
            self._known.popitem(last=False)
        return self._known[key]
