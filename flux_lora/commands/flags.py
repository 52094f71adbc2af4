"""The inputs of a request as a command line gives them: ``-i NAME=VALUE``, or JSON."""

import base64
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flux_lora.errors import RequestError
from flux_lora.inputs import EXTENDED, Interface, schemas

FILES = ("image", "mask", "replicate_weights", "extra_lora")
"""Inputs whose value may be a file of the caller's: ``-i image=@photo.jpg``."""


def read(flags: Iterable[str]) -> dict[str, Any]:
    """The inputs of all ``-i`` flags.

    Raises:
        RequestError: one is not of the form name=value, or is given twice.
    """
    return _once((_flag(text) for text in flags), "-i")


def read_json(text: str) -> dict[str, Any]:
    """The inputs of ``--json``: JSON, ``@`` and the file that holds it, or ``-`` for standard input.

    Raises:
        RequestError: it cannot be read, is no object, or has an input twice.
    """
    try:
        if text in ("-", "@-"):
            content = sys.stdin.read()
        elif text.startswith("@"):
            content = Path(text[1:]).expanduser().read_text()
        else:
            content = text
        inputs = json.loads(content, object_pairs_hook=lambda pairs: _once(pairs, "--json"))
    except (OSError, ValueError, RecursionError, RuntimeError) as error:
        if isinstance(error, RequestError):
            raise
        if os.path.isfile(text) or text.endswith(".json"):  # noqa: PTH113 - a Path fails on long JSON
            raise RequestError(f"--json takes JSON itself: to read it from {text}, write --json @{text}.") from None
        raise RequestError(f"--json: {error}.") from None
    if not isinstance(inputs, dict):
        raise RequestError("--json takes an object of inputs.")
    return inputs


def described(interface: Interface) -> Iterator[str]:
    """A line about each input, for ``--help``."""
    for name, schema in schemas(interface).items():
        kind = "@FILE|address" if "format" in schema else schema["type"]
        choices = "|".join(schema["enum"]) if "enum" in schema else kind
        bounds = f" {schema['minimum']}…{schema['maximum']}" if "minimum" in schema else ""
        default = f", default {schema['default']}" if "default" in schema else ""
        yield f"  {name:24}{choices}{bounds}{default}\n"


def _once(pairs: Iterable[tuple[str, Any]], option: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for name, value in pairs:
        if name in inputs:
            raise RequestError(f"{option} gives {name} twice: leave one out.")
        inputs[name] = value
    return inputs


def _flag(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE as the input's type, which is the same in all interfaces.

    What cannot be read is left for the request model to refuse.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise RequestError(f"-i {text} is not of the form name=value.")
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = value[1:-1]
    kind = EXTENDED[name].type if name in EXTENDED else None
    if name in FILES and value.startswith("@"):
        return name, data_uri(name, value[1:])
    if kind == "boolean":
        return name, {"true": True, "false": False}.get(value.lower(), value)
    if kind in ("integer", "number"):
        for convert in (int, float):
            try:
                return name, convert(value)
            except ValueError:
                continue
    return name, value


def data_uri(name: str, path: str | Path) -> str:
    """A file as the value of an input.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        content = Path(path).expanduser().read_bytes()
    except (OSError, RuntimeError) as error:
        raise RequestError(f"{name}: {error}.") from None
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"
