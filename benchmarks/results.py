"""Rows of ``scripts/bench gpu``, kept as JSON, and shown as a table and a plot."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parent / "results"
ROWS = {
    "peer1": "diffusers eager, PEFT adapter",
    "peer2": "diffusers compiled, hot-swapped",
    "peer2-blocks": "… compiled by blocks",
    "peer2-autotune": "… with max-autotune",
    "peer2-fp8": "diffusers compiled, fp8",
    "peer2-fp8-autotune": "… with max-autotune, fp8",
    "eager": "ours, eager",
    "exact": "ours, exact",
    "balanced": "ours, balanced",
    "fast": "ours, fast",
}
MISSING = "not yet measured"

Targets = Mapping[str, tuple[float, ...]]
BOTH: Targets = {"dev.switch.scale_seconds": (0.1,)}
TARGETS: dict[str, Targets] = {
    "exact": {
        "dev.seconds": (3.5, 3.3),
        "schnell.seconds": (0.6, 0.5),
        "dev.kernels.step_ms": (116,),
        "dev.set_up.seconds": (30,),
        "first.set_up.seconds": (8,),
        "turns.switch.scale_seconds": (1.0,),
        **BOTH,
    },
    "balanced": {"dev.seconds": (2.5, 2.2), "dev.kernels.step_ms": (84,), **BOTH},
    "fast": {"dev.seconds": (1.5, 1.4)},
}
"""The most that may be measured, and what would be better still."""
PEERS = {
    "exact": ("peer1", "peer2", "peer2-blocks", "peer2-autotune"),
    "balanced": ("peer2-fp8", "peer2-fp8-autotune"),
    "fast": ("peer2-fp8", "peer2-fp8-autotune"),
}
"""The peers of the same precision, of which the fastest counts."""
REQUIRED = {"exact": ("peer1", "peer2"), "balanced": ("peer2-fp8",), "fast": ("peer2-fp8",)}
"""Those that must have been measured for that, or a variant of them."""
MIN_FASTER = 1.2

Row = Mapping[str, Any]
Rows = Mapping[str, Row]
Cells = Mapping[str, Callable[[Row], float]]


def _of_dev(part: str, name: str, row: Row) -> float:
    return float(row["dev"][part][name])


IMAGES: Cells = {
    "dev 1:1 s": lambda row: row["dev"]["seconds"],
    "4 steps s": lambda row: row["dev"]["four"]["seconds"],
    "16:9 s": lambda row: row["dev"]["wide"]["seconds"],
    "schnell s": lambda row: row["schnell"]["seconds"],
    "s/step": lambda row: row["dev"]["step_seconds"],
    "computed": lambda row: row["dev"]["computed_steps"],
    "TFLOP/s": lambda row: row["dev"]["tflops"],
    "peak GiB": lambda row: row["dev"]["peak_bytes"] / 2**30,
    "LoRA s": lambda row: row["dev"]["switch"]["switch_seconds"],
    "scale s": lambda row: row["dev"]["switch"]["scale_seconds"],
    "… host s": lambda row: row["turns"]["switch"]["scale_seconds"],
    "set-up s": lambda row: row["dev"]["set_up"]["seconds"],
    "warm s": lambda row: row["first"]["set_up"]["seconds"],
}
STAGES: Cells = {
    f"{stage} s": partial(_of_dev, "stages", stage) for stage in ("adapter", "text", "denoise", "decode", "save")
}
KERNELS: Cells = {
    f"{name} ms": partial(_of_dev, "kernels", f"{name}_ms")
    for name in ("step", "products", "attention", "elementwise", "copies", "between")
} | {"launches": partial(_of_dev, "kernels", "launches")}


def keep(folder: Path, row: Row, found: Row, *, small: bool) -> None:
    """Add to a row what was found, in place of the same that was found before.

    On another day or card a row begins anew, and what it was stays among the earlier ones.
    """
    kept = read(folder, small=small)
    known = kept["rows"].get(row["row"], {})
    if known and (known["session"] != row["session"] or known["machine"] != row["machine"]):
        kept.setdefault("earlier", []).append(known)
        known = {}
    kept["rows"][row["row"]] = _merged({**known, **row}, found)
    _write(folder, kept, small=small)


def keep_reference(folder: Path, session: str, seconds: float, *, small: bool) -> None:
    """Keep the reference's seconds of a day and card."""
    kept = read(folder, small=small)
    kept["references"][session] = seconds
    _write(folder, kept, small=small)


def reference(folder: Path, session: str, *, small: bool) -> float | None:
    """The reference's seconds of a day and card; None: not measured."""
    seconds: float | None = read(folder, small=small)["references"].get(session)
    return seconds


def read(folder: Path, *, small: bool) -> dict[str, Any]:
    """All that was kept."""
    file = _file(folder, small=small)
    return dict(json.loads(file.read_text())) if file.exists() else {"references": {}, "rows": {}}


def show(folder: Path, *, small: bool) -> int:
    """Print the tables of all rows, draw the plot, and judge the targets; 1 when one is missed."""
    kept, file = read(folder, small=small), _file(folder, small=small)
    rows, references = kept["rows"], kept["references"]
    print("\n".join(_tables(rows, references)))
    if drawn := {name: row for name, row in rows.items() if _at(row, "dev.seconds")}:
        _plot(drawn).save(file.with_suffix(".png"))
        print(f"\n{file} and {file.with_suffix('.png').name}")
    if small:
        return 0  # a small model has no targets
    missed = False
    for text, met in _judgements(rows, references):
        print(f"target {text}: {MISSING if met is None else 'met' if met else 'MISSED'}")
        missed |= met is False
    return int(missed)


def _file(folder: Path, *, small: bool) -> Path:
    return folder / ("gpu-small.json" if small else "gpu.json")


def _write(folder: Path, kept: Mapping[str, Any], *, small: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = _file(folder, small=small)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(kept, indent=2) + "\n")
    unfinished.replace(file)


def _merged(known: Any, found: Any) -> Any:
    if not isinstance(known, Mapping) or not isinstance(found, Mapping):
        return found
    return {**known, **{name: _merged(known.get(name), value) for name, value in found.items()}}


def _tables(rows: Rows, references: Mapping[str, float]) -> Iterator[str]:
    yield from (f"\n{machine}" for machine in sorted({row["machine"] for row in rows.values()}))
    yield from _table("", IMAGES, rows)
    for title, cells in (("stages of dev", STAGES), ("a step by its kernels", KERNELS)):
        shown = {name: row for name, row in rows.items() if any(_cell(cell, row) != "–" for cell in cells.values())}
        if shown:
            yield ""
            yield from _table(title, cells, shown, missing=False)
    yield from (f"reference: {seconds:.3f} s on {session}" for session, seconds in references.items())


def _table(title: str, cells: Cells, rows: Rows, *, missing: bool = True) -> Iterator[str]:
    yield f"{title:34}" + "".join(f"{column:>15}" for column in cells)
    for name, text in ROWS.items():
        if name in rows:
            yield f"{text:34}" + "".join(f"{_cell(cell, rows[name]):>15}" for cell in cells.values())
        elif missing:
            yield f"{text:34}  {MISSING}"


def _cell(cell: Callable[[Row], float], row: Row) -> str:
    try:
        return f"{cell(row):.3g}"
    except (KeyError, TypeError):
        return "–"


def _judgements(rows: Rows, references: Mapping[str, float]) -> Iterator[tuple[str, bool | None]]:
    """Each target as text, and whether it is met; None where nobody has measured."""
    for name, targets in TARGETS.items():
        for path, limits in targets.items():
            found = _at(rows.get(name), path)
            stretch = "".join(f" (better {limit:g})" for limit in limits[1:])
            measured = "" if found is None else f", measured {found:.3g}"
            met = None if found is None else found <= limits[0]
            yield f"{name} {path} at most {limits[0]:g}{stretch}{measured}", met
        known = {peer: _faster(rows, references, name, peer) for peer in PEERS[name]}
        ratios = {peer: ratio for peer, ratio in known.items() if ratio is not None}
        complete = all(any(peer.startswith(needed) for peer in ratios) for needed in REQUIRED[name])
        best = min(ratios, key=lambda peer: ratios[peer], default="")
        text = f"{name} at least {MIN_FASTER} times as fast as {', '.join(ratios or REQUIRED[name])}"
        if complete:
            yield f"{text}, measured {ratios[best]:.3g} ({best})", ratios[best] >= MIN_FASTER
        else:
            yield text, None
    if (computed := _at(rows.get("fast"), "dev.computed_steps")) is not None:
        yield "fast computes at least half of the steps", computed >= 14


def _faster(rows: Rows, references: Mapping[str, float], mine: str, peer: str) -> float | None:
    """How many times as fast as a peer: by seconds on one card and day, else as ratios to the references."""
    seconds = [_at(rows.get(name), "dev.seconds") for name in (mine, peer)]
    if seconds[0] is None or seconds[1] is None:
        return None
    sessions = [rows[name]["session"] for name in (mine, peer)]
    if sessions[0] == sessions[1]:
        return seconds[1] / seconds[0]
    if not all(session in references for session in sessions):
        return None
    return (seconds[1] / references[sessions[1]]) / (seconds[0] / references[sessions[0]])


def _at(row: Any, path: str) -> float | None:
    for key in path.split("."):
        row = row.get(key) if isinstance(row, Mapping) else None
    found: float | None = row
    return found


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
