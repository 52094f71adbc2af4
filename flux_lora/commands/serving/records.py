"""One line of Cog's log: read, and put as people read it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flux_lora import errors

SHOWN_BY_WATCH = ("Setup failed", "Worker initialization failed")
"""What ends the command, which then says why."""


@dataclass(frozen=True)
class Record:
    """A line of Cog's log; ``fields`` are its own and whatever else it says."""

    level: str
    target: str
    message: str
    fields: Mapping[str, Any]

    @property
    def prediction(self) -> str:
        """The id of the prediction that it is about, or nothing."""
        return str(self.fields.get("prediction_id", ""))

    @property
    def printed(self) -> bool:
        """Whether the model printed it, and not Cog."""
        return "source" in self.fields or self.target == "coglet::user"


def read(line: str) -> Record | None:
    """Read a line; None for one that Cog's logger did not write."""
    try:
        record = json.loads(line)
        fields = record["fields"]
        return Record(str(record["level"]), str(record["target"]), str(fields["message"]).strip(), fields)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def readable(record: Record, *, warnings: bool) -> str | None:
    """What to show of a line: what the model prints, failures, and Cog's warnings if asked; None for the rest."""
    if record.printed:
        return record.message
    if record.message == "Prediction failed":
        return f"prediction failed: {unwrapped(str(record.fields.get('error')))}"
    if record.message == "Stripped unknown input fields":
        return f"not an input of this model, and so ignored: {record.fields.get('fields')}"
    if warnings and record.level in ("WARN", "ERROR") and record.message not in SHOWN_BY_WATCH:
        return f"cog: {record.message}{f': {error}' if (error := record.fields.get('error')) else ''}"
    return None


def unwrapped(text: str) -> str:
    """An error without what Cog's layers put before it, nor its class name where it is one of ours."""
    text = re.sub(
        r"^((worker setup failed( \(slot [^)]*\))?|(setup|prediction) failed): )+", "", text, flags=re.IGNORECASE
    )
    name, _, message = text.partition(": ")
    return message if hasattr(errors, name) else text
