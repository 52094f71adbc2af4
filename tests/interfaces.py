"""The two interfaces, each as its own document has it: what code, Cog and the server are held to."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flux_lora.inputs import DOCUMENTED, EXTENDED, Interface, schemas
from tests.conftest import ROOT

CONTRACT = ROOT / "tests" / "contract"

Schemas = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Door:
    """An interface, and the files that offer it to Cog."""

    name: str
    interface: Interface
    predictor: Path
    openapi: Path
    config: Path

    @property
    def inputs(self) -> Schemas:
        """The JSON schemas of its inputs, by its document."""
        return documented() if self.name == "documented" else extended()


DOORS = (
    Door("documented", DOCUMENTED, ROOT / "predict.py", ROOT / "openapi.json", ROOT / "cog.yaml"),
    Door(
        "extended",
        EXTENDED,
        ROOT / "predict_extended.py",
        ROOT / "openapi.extended.json",
        ROOT / "cog.extended.yaml",
    ),
)


@cache
def documented() -> Schemas:
    """The thirteen inputs of the contract and ``replicate_weights``, in the order of their slots."""
    extra = re.search(r"```json\n(.*?)\n```", (CONTRACT / "README.md").read_text(), re.DOTALL)
    assert extra
    inputs = json.loads((CONTRACT / "input_schema.json").read_text())["properties"] | json.loads(f"{{{extra[1]}}}")
    return dict(sorted(inputs.items(), key=lambda item: item[1]["x-order"]))


@cache
def extended() -> Schemas:
    """The twenty-one of the extended contract's table; their descriptions, which it leaves to us, are ours."""
    ours = schemas(EXTENDED)
    return {name: schema | {"description": ours[name]["description"]} for name, schema in _table()}


def _table() -> Iterator[tuple[str, dict[str, Any]]]:
    text = (CONTRACT / "extended.md").read_text()
    for row in re.findall(r"^\| (\d+) \|(.*)\|$", text, re.MULTILINE):
        order, (name, kind, default, bounds, _) = int(row[0]), (cell.strip() for cell in row[1].split("|"))
        schema: dict[str, Any] = {"title": name.replace("_", " ").title(), "x-order": order}
        schema |= {"type": "string", "format": "uri"} if kind == "file (uri)" else {"type": kind.split(",")[0]}
        if default not in ("", "none"):
            schema["default"] = default if schema["type"] == "string" else json.loads(default)
        if "…" in bounds:
            ends = bounds.replace("−", "-").split("…")
            schema["minimum"], schema["maximum"] = (json.loads(end) for end in ends)
        elif bounds:
            twelve = documented()["aspect_ratio"]["enum"]
            schema |= {"title": name, "enum": twelve if "twelve" in bounds else bounds.split(", ")}
        yield name, schema
