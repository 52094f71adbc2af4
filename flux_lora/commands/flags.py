"""The inputs of a request as a command line gives them: ``-i NAME=VALUE``, or JSON."""

import base64
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flux_lora.errors import RequestError
from flux_lora.request import documented_inputs


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


def described() -> Iterator[str]:
    """A line about each input, for ``--help``."""
    for name, schema in documented_inputs().items():
        choices = "|".join(schema["enum"]) if "enum" in schema else schema["type"]
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
    """Read NAME=VALUE as the input's documented type; what cannot be read is left for the request model to refuse."""
    name, equals, value = text.partition("=")
    if not equals:
        raise RequestError(f"-i {text} is not of the form name=value.")
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = value[1:-1]
    kind = documented_inputs().get(name, {}).get("type")
    if name == "replicate_weights" and value.startswith("@"):
        return name, _data_uri(value[1:])
    if kind == "boolean":
        return name, {"true": True, "false": False}.get(value.lower(), value)
    if kind in ("integer", "number"):
        for convert in (int, float):
            try:
                return name, convert(value)
            except ValueError:
                continue
    return name, value


def _data_uri(path: str) -> str:
    try:
        content = Path(path).expanduser().read_bytes()
    except (OSError, RuntimeError) as error:
        raise RequestError(f"replicate_weights: {error}.") from None
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"
