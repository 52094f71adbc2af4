"""Parsed adapters, kept in host memory within a budget."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from flux_lora.adapters.formats import Adapter, read
from flux_lora.errors import FormatError

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


class AdapterLibrary:
    """Reads each adapter file once, as long as the parsed adapters fit into ``budget`` bytes."""

    def __init__(self, shapes: Shapes, budget: int) -> None:
        self._shapes = shapes
        self._budget = budget
        self._known: OrderedDict[tuple[object, ...], Adapter] = OrderedDict()

    def read(self, path: Path) -> Adapter:
        """The adapter in a file.

        Raises:
            FormatError: the file cannot be applied, with its name and the reason.
        """
        try:
            status = path.stat()
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror}.") from None
        key = (path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in self._known:
            self._known[key] = read(path, self._shapes)
        self._known.move_to_end(key)
        while len(self._known) > 1 and sum(adapter.nbytes for adapter in self._known.values()) > self._budget:
            self._known.popitem(last=False)
        return self._known[key]
