"""The adapters that requests ask for: found, fetched, read and remembered."""

import os
from collections.abc import Sequence
from pathlib import Path

from flux_lora.ledger import Log
from flux_lora.lora.formats import Adapter
from flux_lora.lora.library import AdapterLibrary
from flux_lora.lora.merge import AdapterSet
from flux_lora.sources import Sources
from flux_lora.sources.address import label

BUNDLED = "lora.safetensors"
"""The fine-tune's file in a weights directory."""


def operator_source(named: str, weights: Path) -> str:
    """Where the operator's fine-tune is: a file or folder of the weights directory, if there is one by that name."""
    here = os.path.join(weights, named)  # noqa: PTH118 - a data: URI is too long for a Path
    return here if os.path.exists(here) else named  # noqa: PTH110


class Adapters:
    """The operator's fine-tune, and what requests name instead of it."""

    def __init__(self, sources: Sources, library: AdapterLibrary, weights: Path) -> None:
        """Take the parts; `load_fine_tune` then reads the operator's.

        Args:
            sources: fetch a file from wherever a caller says.
            library: reads files and remembers what was read.
            weights: the weights directory, in which callers may name files.
        """
        self.fine_tune: Adapter | None = None
        self._sources = sources
        self._library = library
        self._weights = weights

    def load_fine_tune(self, named: str | None, log: Log) -> None:
        """Read the operator's fine-tune, which serves requests that name none.

        Args:
            named: where it is (``COG_WEIGHTS``); None or empty: the weights directory's own, if any.
            log: receives a line that says which it is.

        Raises:
            AdapterError: it is missing, or cannot be applied.
        """
        bundled = self._weights / BUNDLED
        if named:
            source = operator_source(named, self._weights)
            self.fine_tune = self._library.read(self._sources.fetch(source, root=None), label(named))
        elif bundled.exists() or bundled.is_symlink():
            self.fine_tune = self._library.read(bundled)
        else:
            log(f"fine-tune: none, so the base model alone: no {bundled}, and COG_WEIGHTS is not set")
            return
        log(f"fine-tune: {self.fine_tune.summary}")

    def read(self, asked: Sequence[tuple[str | None, float]], log: Log) -> AdapterSet:
        """Read the adapters of a request.

        Args:
            asked: source and scale of each; without a source it is the operator's fine-tune, if there is one.
            log: receives a line for each that the request brings along.

        Raises:
            AdapterError: one cannot be fetched or applied.
        """
        adapters = []
        for source, scale in asked:
            if source is None:
                if self.fine_tune:
                    adapters.append((self.fine_tune, scale))
                continue
            adapter = self._library.read(self._sources.fetch(source, root=self._weights), label(source))
            log(f"LoRA of this request: {adapter.summary}")
            adapters.append((adapter, scale))
        return adapters
