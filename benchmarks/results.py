"""Rows of ``scripts/bench gpu``, kept as JSON, and shown as a table and a plot."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parent / "results"
ROWS = {
    "peer1": "diffusers eager, PEFT adapter",
    "peer2": "diffusers compiled, hot-swapped",
    "peer2-fp8": "the same with fp8",
    "eager": "ours, eager",
    "exact": "ours, exact",
    "balanced": "ours, balanced",
    "fast": "ours, fast",
}
MISSING = "not yet measured"

TARGETS: dict[str, dict[str, float]] = {
    "exact": {"dev.seconds": 3.3, "schnell.seconds": 0.5},
    "balanced": {"dev.seconds": 2.2},
    "fast": {"dev.seconds": 1.4},
}
SWITCH_TARGETS = {"dev.switch.scale_device_seconds": 0.1, "dev.switch.scale_host_seconds": 1.0}
PEERS = {"exact": ("peer1", "peer2"), "balanced": ("peer2-fp8",), "fast": ("peer2-fp8",)}
"""The peers of the same precision."""
MIN_FASTER = 1.15

Rows = Mapping[str, Mapping[str, Any]]


def _share(row: Mapping[str, Any]) -> float:
    return 100 * row["dev"]["tflops"] / row["matrix_tflops"]


COLUMNS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "dev 1:1 s": lambda row: row["dev"]["seconds"],
    "/ reference": lambda row: row["dev"]["seconds"] / row["reference_seconds"],
    "16:9 s": lambda row: row["dev"]["wide_seconds"],
    "schnell s": lambda row: row["schnell"]["seconds"],
    "s/step": lambda row: row["dev"]["step_seconds"],
    "computed": lambda row: row["dev"]["computed_steps"],
    "TFLOP/s": lambda row: row["dev"]["tflops"],
    "% of matrix": _share,
    "peak GiB": lambda row: row["dev"]["peak_bytes"] / 2**30,
    "LoRA s": lambda row: row["dev"]["switch"]["switch_device_seconds"],
    "… host s": lambda row: row["dev"]["switch"]["switch_host_seconds"],
    "scale s": lambda row: row["dev"]["switch"]["scale_device_seconds"],
    "… host s ": lambda row: row["dev"]["switch"]["scale_host_seconds"],
    "first s": lambda row: row["first_image_seconds"],
}


def keep(folder: Path, row: Mapping[str, Any]) -> None:
    """Write a row, in place of an earlier one of its name."""
    file = _file(folder, small=row["small"])
    rows = {**_read(file), row["row"]: row}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=2) + "\n")


def show(folder: Path, *, small: bool) -> int:
    """Print the table of all rows, draw the plot, and judge the targets; 1 when one is missed."""
    file = _file(folder, small=small)
    rows = _read(file)
    print("\n".join(_table(rows)))
    if rows:
        folder.mkdir(parents=True, exist_ok=True)
        _plot(rows).save(file.with_suffix(".png"))
        print(f"\n{file} and {file.with_suffix('.png').name}")
    if small:
        return 0  # a small model has no targets
    missed = False
    for text, met in _judgements(rows):
        print(f"target {text}: {MISSING if met is None else 'met' if met else 'MISSED'}")
        missed |= met is False
    return int(missed)


def _file(folder: Path, *, small: bool) -> Path:
    return folder / ("gpu-small.json" if small else "gpu.json")


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _table(rows: Rows) -> Iterator[str]:
    machines = sorted({row["machine"] for row in rows.values()})
    yield from (f"\n{machine}" for machine in machines)
    yield f"{'':34}" + "".join(f"{column:>12}" for column in COLUMNS)
    for name, title in ROWS.items():
        if name in rows:
            yield f"{title:34}" + "".join(f"{_cell(column, rows[name]):>12}" for column in COLUMNS.values())
        else:
            yield f"{title:34}  {MISSING}"
    for name, row in rows.items():
        rate = f"matrix {row['matrix_tflops']:.4g} TFLOP/s"
        yield f"{name}: reference {row['reference_seconds']:.3f} s, {rate}, {row['machine'].split(';')[0]}"


def _cell(column: Callable[[Mapping[str, Any]], float], row: Mapping[str, Any]) -> str:
    try:
        return f"{column(row):.3g}"
    except (KeyError, TypeError):
        return "–"


def _judgements(rows: Rows) -> Iterator[tuple[str, bool | None]]:
    """Each target as text, and whether it is met; None where nobody has measured."""
    for name, targets in TARGETS.items():
        for path, limit in {**targets, **SWITCH_TARGETS}.items():
            found = _at(rows.get(name), path)
            yield f"{name} {path} at most {limit:g}", None if found is None else found <= limit
        mine, peers = _ratio(rows.get(name)), [_ratio(rows.get(peer)) for peer in PEERS[name]]
        known = [peer for peer in peers if peer is not None]
        met = min(known) / mine >= MIN_FASTER if mine is not None and len(known) == len(peers) else None
        yield f"{name} at least {MIN_FASTER} times as fast as {' and '.join(PEERS[name])}", met
    if (row := rows.get("fast")) is not None:
        yield "fast computes at least half of the steps", row["dev"]["computed_steps"] >= 14


def _ratio(row: Mapping[str, Any] | None) -> float | None:
    return None if row is None else row["dev"]["seconds"] / row["reference_seconds"]


def _at(row: Any, path: str) -> float | None:
    for key in path.split("."):
        row = row.get(key) if isinstance(row, Mapping) else None
    return row


def _plot(rows: Rows) -> Image.Image:
    """Seconds of a dev image, a bar for each row."""
    bar, margin, width = 34, 20, 1100
    image = Image.new("RGB", (width, margin * 3 + 30 + bar * len(rows)), "white")
    draw = ImageDraw.Draw(image)
    title, label = ImageFont.load_default(20), ImageFont.load_default(15)
    machine = next(iter(rows.values()))["machine"]
    draw.text((margin, margin), f"Seconds an image, dev, 28 steps, 1024x1024 ({machine.split(';')[0]})", "black", title)
    longest = max(row["dev"]["seconds"] for row in rows.values())
    for index, (name, row) in enumerate((name, rows[name]) for name in ROWS if name in rows):
        top, seconds = margin * 2 + 30 + index * bar, row["dev"]["seconds"]
        end = 290 + 680 * seconds / longest
        draw.text((margin, top + 5), ROWS[name], "black", label)
        draw.rectangle((290, top, end, top + bar - 10), "#9aa5b1" if name.startswith("peer") else "#2f6fde")
        draw.text((end + 8, top + 5), f"{seconds:.2f}", "black", label)
    return image
