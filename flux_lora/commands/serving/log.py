"""Cog's log, read while it is written: shown as people read it, and what it says of the server's one slot."""

import re
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from flux_lora.commands.serving import folder, records
from flux_lora.wording import complain, printable

PROGRESS = re.compile(r"\s*\d+%\|")

ENDS = ("Prediction worker completed", "Prediction failed", "Prediction cancelled")

LOST = re.compile(
    r"PermitInUse dropped|Slot dropped while InUse|[Ss]lot poisoned|poisoning slot|[Ff]ailed to send prediction request"
)
"""What Cog 0.23.1 logs when its slot will not come back (``crates/coglet/src/permit``)."""


@dataclass
class Slot:
    """What the log says of the slot; the thread that reads writes it, the one that watches reads it."""

    running: str = ""
    """The id of the prediction that is being drawn."""
    lost: str = ""
    """Cog's words, once it has lost the slot."""
    asked_to_end: bool = False
    """Somebody has called ``/shutdown``."""
    _ended: set[str] = field(default_factory=set)

    def note(self, record: records.Record) -> None:
        """Take in a line of the log, and remove what Cog left of predictions that ended before the one that starts."""
        if record.printed:
            return
        if record.message == "Starting prediction":
            self.clear(but=record.prediction)
            self.running = record.prediction or "?"
        elif record.message in ENDS:
            self.running = ""
            self._ended.add(record.prediction)
        elif record.level in ("WARN", "ERROR") and LOST.search(record.message):
            self.running = ""
            self.lost = record.message
        elif record.message == "Shutdown requested via HTTP":
            self.asked_to_end = True

    def clear(self, but: str = "") -> None:
        """Remove what Cog left of predictions that have ended."""
        for prediction in self._ended - {but}:
            folder.clear(prediction)
        self._ended.clear()


def show(lines: Iterable[str], slot: Slot, stop: threading.Event) -> None:
    """Show the log until it ends: what the model prints, and Cog's warnings until the end has begun."""
    bar_open = False
    for line in lines:
        record = records.read(line)
        if record:
            slot.note(record)
        text = records.readable(record, warnings=not stop.is_set()) if record else line.rstrip()
        if text is None:
            continue
        if PROGRESS.match(text):
            if sys.stderr.isatty():
                print(f"\r{printable(text)}\x1b[K", end="", file=sys.stderr, flush=True)
                bar_open = True
            continue
        if bar_open:
            print(file=sys.stderr, flush=True)
            bar_open = False
        if text:
            complain(text)
