"""The operator's log of the service: lines from several processes, readable or as JSON."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from flux_lora.wording import printable, say

LONGEST = 2000
"""Characters of a line; of a longer one the end is kept, which says what went wrong."""

WHOLE = 4096
"""Bytes that a pipe takes in one piece, whoever else writes to it (POSIX asks for 512 at least, Linux has this)."""


@dataclass(frozen=True)
class Log:
    """Writes lines to a pipe that somebody reads, or to standard output."""

    json: bool = False
    """Whether each line is a JSON object."""
    pipe: Path | None = None

    def __call__(self, text: str, **fields: object) -> None:
        """Write a line.

        Args:
            text: what is to be said.
            fields: of whom it is said: ``request`` and ``replica``, say; only JSON shows them all.
        """
        if len(text) > LONGEST:
            text = f"… {text[-LONGEST:]}"
        if self.json:
            line = json.dumps({"time": datetime.now(UTC).isoformat(), "message": text, **fields}, ensure_ascii=False)
        else:
            line = printable(f"{fields['replica']}: {text}" if "replica" in fields else text)
        if self.pipe is None:
            say(line)
            return
        with suppress(OSError):  # nobody reads, or not fast enough
            descriptor = os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(descriptor, line.encode(errors="replace")[: WHOLE - 1] + b"\n")
            finally:
                os.close(descriptor)
