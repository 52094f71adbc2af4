"""What one request leaves behind beside its files: seconds of each stage, metrics and log lines."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

STAGES = ("source", "adapter", "text", "denoise", "decode", "safety", "save")

Metric = int | float | str | list[int]
Record = Callable[[str, Metric], None]
Log = Callable[[str], None]


@dataclass
class Stopwatch:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of what runs within to a stage, also when that fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True)
class Finished:
    """One image after decoding, check and saving."""

    seed: int
    path: Path | None
    """None when the image was withheld."""
    reason: str
    """Why it was withheld, as a phrase for the log."""
    seconds: Mapping[str, float]


class Ledger(Stopwatch):
    """The seconds, metrics and log lines of one request."""

    def __init__(self, record: Record, log: Log) -> None:
        """Take where metrics and lines go.

        Args:
            record: receives a metric by its name.
            log: receives one readable line at a time.
        """
        super().__init__(dict.fromkeys(STAGES, 0.0))
        self.record = record
        self.log = log

    def close(self, images: Iterable[Finished], size: tuple[int, int]) -> None:
        """Record what was done, also of a request that failed half-way.

        Args:
            images: those that were finished.
            size: of each, width and height in pixels.
        """
        withheld, kept = [], 0
        for image in images:
            for stage, spent in image.seconds.items():
                self.add(stage, spent)
            if image.path:
                kept += 1
            else:
                withheld.append(image.seed)
                self.log(f"withheld: the image of seed {image.seed}: {image.reason}")
        self.record("withheld_seeds", withheld)
        self.record("images", kept)
        self.record("megapixels", round(kept * size[0] * size[1] / 1e6, 6))
        for stage, spent in self.seconds.items():
            self.record(f"{stage}_seconds", round(spent, 4))
        self.log("seconds: " + ", ".join(f"{stage} {spent:.2f}" for stage, spent in self.seconds.items()))
