"""Seconds an image on a GPU: ours against what others do, one row a call, on FLUX.1 of full size with random weights.

    scripts/bench gpu exact                        # a profile of ours, or one of the peers (contenders.py)
    scripts/bench gpu exact --measure dev kernels  # only some of what there is to measure
    scripts/bench gpu table                        # all rows that were measured, as a table and as a plot
    scripts/bench gpu exact --small                # tries the same on a small model, here also without a GPU

What is measured is kept at once, in benchmarks/results/, beside what was measured before of the same row on the same
day and card. A reference, diffusers eager without LoRA, is measured once a day and card, so that rows of several days
or cards compare as ratios to it. Targets: on one H100 with 80 GB.

    reference  diffusers eager, without a LoRA     schnell  an image of schnell, four steps
    dev        28 steps, and where the time goes   sizes    sizes beyond the eleven, the first time and again
    four       four steps of dev                   turns    dev and schnell take turns on the device, from pinned memory
    wide       16:9                                first    from a new process to its first image, with code compiled
    kernels    where a step goes, by the profiler           before
    switch     another LoRA, another scale         steps    a step launched, and replayed as a CUDA graph
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import full_size, results
from benchmarks.contenders import PEERS, Contender, Given, Ours, Peer, image_tokens, write_loras
from benchmarks.measure import call_seconds, free, machine, wait
from flux_lora.inputs import Model
from flux_lora.request import MAX_TEXT_TOKENS
from flux_lora.settings import Settings
from flux_lora.speed import cuda_graphs

OURS = ("eager", "exact", "balanced", "fast")
Kind = Literal["dev", "schnell", "turns", "reference"]
STEPS = {"dev": 28, "schnell": 4}
CUSTOM = ((1008, 1008), (256, 256), (1440, 1440), (512, 512))
"""Sizes beyond the eleven; the last has as many image tokens as dev has text tokens."""

CLASSES = (
    ("elementwise", r"^triton_(poi|red|per|for)_"),
    ("attention", r"sdpa|flash|fmha|attention"),
    ("products", r"gemm|nvjet|cutlass|xmma|cublas|::(add)?mm$|::bmm|scaled_mm|triton_(tem|mm)"),
    ("copies", r"memcpy|memset|::copy_"),
    ("elementwise", ""),
)
"""What a kernel does, by the first pattern in its name that fits.

PyTorch's compiler names a fused kernel after all operations of which it computes a part: scaled_mm, attention too.
"""

LARGEST = 15
"""Kernels that are named one by one."""


class Bench:
    """One row: makes contenders as they are needed, one at a time."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        """Make nothing yet."""
        self.options = options
        device = find_device(small=options.small)
        in_bfloat16 = device.type == "cuda" or options.row.startswith("peer2-fp8")
        dtype = torch.bfloat16 if in_bfloat16 else torch.float32
        self.given = Given(device, dtype, options.small, folder, options.cache)
        self._kind: Kind | None = None
        self._contender: Contender | None = None

    def contender(self, kind: Kind) -> Contender:
        """What draws: ``dev``, ``schnell``, ``turns`` (both models), or ``reference``."""
        if self._kind != kind or self._contender is None:
            self._contender = None
            free()
            made = self._make(kind)
            print(f"set up in {made.set_up['seconds']:.1f} s", flush=True)
            self._contender, self._kind = made, kind
        return self._contender

    def _make(self, kind: Kind) -> Contender:
        row = self.options.row
        if kind == "reference":
            return Peer(self.given, None, "dev")
        if kind == "turns":
            return Ours(self.given, row, "dev", "schnell", memory_plan="alternating")
        if row in PEERS:
            return Peer(self.given, PEERS[row], kind)
        return Ours(self.given, row, kind)


def main() -> int:
    """Measure one row, or print all of them."""
    options = _options()
    if options.row == "table":
        return results.show(options.results, small=options.small)
    print(machine(), flush=True)
    with TemporaryDirectory() as folder:
        write_loras(Path(folder), small=options.small)
        bench = Bench(options, Path(folder))
        if options.first:
            print(json.dumps(_first_image(bench)))
            return 0
        row = {"row": options.row, "machine": machine(), "session": session(), "images": options.images}
        for name in _measures(options):
            print(f"{options.row}: {name}", flush=True)
            found = MEASURES[name](bench)
            if name == "reference":
                results.keep_reference(options.results, session(), found, small=options.small)
                continue
            print(json.dumps(found, indent=2), flush=True)
            results.keep(options.results, row, found, small=options.small)
    results.show(options.results, small=options.small)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", choices=(*PEERS, *OURS, "table"))
    parser.add_argument("--measure", nargs="+", choices=tuple(MEASURES), help="what (default: all)")
    parser.add_argument("--images", type=int, default=3, help="of each kind; their median counts")
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where rows are kept")
    parser.add_argument("--cache", type=Path, default=Settings().cache, help="where compiled code is kept")
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measures(options: argparse.Namespace) -> list[str]:
    if options.measure:
        return list(options.measure)
    names = [name for name in MEASURES if options.row in OURS or name not in OURS_ALONE]
    if results.reference(options.results, session(), small=options.small):
        names.remove("reference")
    return names


def find_device(*, small: bool) -> torch.device:
    """The GPU; without one, a small model is tried on the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    if small:
        return torch.device("cpu")
    raise SystemExit("There is no NVIDIA GPU here. --small tries the benchmark on a small model.")


def session() -> str:
    """The card and the day: within one, seconds compare as they are."""
    card = str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.is_available() else "cpu"
    return f"{card}, {datetime.now(UTC):%Y-%m-%d}"


# What there is to measure


def _reference(bench: Bench) -> Any:
    return _image(bench, bench.contender("reference"), "dev")["seconds"]


def _model(model: Model, bench: Bench) -> dict[str, Any]:
    contender, steps = bench.contender(model), STEPS[model]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found = _image(bench, contender, model)
    step = step_seconds(contender, steps)
    tokens = image_tokens(contender.pipeline, "1:1")
    operations = full_size.operations(model, tokens, MAX_TEXT_TOKENS[model], small=bench.options.small)
    computed = steps - found["stages"].pop("reused_steps", 0)
    return {
        model: {
            **found,
            "set_up": dict(contender.set_up),
            "step_seconds": step,
            "computed_steps": computed,
            "tflop_a_step": operations / 1e12,
            "tflops": operations * computed / steps / step / 1e12,
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }
    }


def _four(bench: Bench) -> dict[str, Any]:
    return {"dev": {"four": _image(bench, bench.contender("dev"), "dev", steps=4)}}


def _wide(bench: Bench) -> dict[str, Any]:
    return {"dev": {"wide": _image(bench, bench.contender("dev"), "dev", ratio="16:9")}}


def _kernels(bench: Bench) -> dict[str, Any]:
    contender = bench.contender("dev")
    return {"dev": {"kernels": where_a_step_goes(contender, step_seconds(contender, 4))}}


def _steps(bench: Bench) -> dict[str, Any]:
    """Milliseconds of a step of the transformer alone, launched and replayed, at a megapixel and at a quarter of it."""
    contender = bench.contender("dev")
    if not isinstance(contender, Ours):
        return {}
    transformer, device = contender.pipeline.transformer, bench.given.device
    served = vars(transformer).pop("forward", None)  # what replays steps as it serves
    found: dict[str, Any] = {"served": "launched" if served is None else "replayed"}
    tokens = image_tokens(contender.pipeline, "1:1")
    record = cuda_graphs.CudaRecorder(device)
    for images in (tokens, tokens // 4):
        call = cuda_graphs.example(transformer, images, MAX_TEXT_TOKENS["dev"])
        for name in ("launched", "replayed") if device.type == "cuda" else ("launched",):
            seconds = cuda_graphs.time_step(name, transformer, call, record, device)
            found[f"{images} tokens, {name}"] = None if seconds is None else 1000 * seconds
    if served is not None:
        transformer.forward = served
    return {"dev": {"steps": found}}


def _switch(bench: Bench) -> dict[str, Any]:
    return {"dev": {"switch": bench.contender("dev").switching(bench.options.images)}}


def _sizes(bench: Bench) -> dict[str, Any]:
    """What a size beyond the eleven costs the first time, and again."""
    contender = bench.contender("dev")
    if not isinstance(contender, Ours):
        return {}
    found = []
    for width, height in CUSTOM:
        draw = partial(_custom, contender, width, height)
        first, recompilations = draw(0)
        again, _ = draw(1)
        found.append({"size": f"{width}x{height}", "first": first, "again": again, "recompilations": recompilations})
    return {"dev": {"sizes": found}}


def _custom(contender: Ours, width: int, height: int, turn: int) -> tuple[float, int]:
    """Seconds of a step in a size of its own, and how much was compiled for it."""
    metrics: dict[str, Any] = {}
    draw = partial(contender.draw, turn, ratio="custom", width=width, height=height, steps=1)
    return call_seconds(lambda: metrics.update(draw())), metrics["recompilations"]


def _turns(bench: Bench) -> dict[str, Any]:
    """Both models, of which one is on the device: base weights wait in pinned host memory."""
    contender = bench.contender("turns")
    if not isinstance(contender, Ours):
        return {}
    models = ("schnell", "dev")
    contender.draw(0, steps=1, model="schnell")  # whatever is allocated once
    contender.draw(0, steps=1, model="dev")
    change = statistics.median(
        call_seconds(partial(contender.draw, 0, steps=1, model=models[turn % 2])) for turn in range(4)
    )
    stays = statistics.median(call_seconds(partial(contender.draw, 0, steps=1)) for _ in range(3))
    switch = contender.switching(bench.options.images)
    set_up = dict(contender.set_up)
    return {"turns": {"set_up": set_up, "model_change_seconds": change - stays, "switch": switch}}


def _first(bench: Bench) -> dict[str, Any]:
    """A new process, to its first image; ours finds no compiled code but in its own cache, as a new container would."""
    options = bench.options
    command = [sys.executable, "-m", "benchmarks.gpu", options.row, "--first", "--cache", str(options.cache)]
    with TemporaryDirectory() as empty:
        environment = {**os.environ, **({"TORCHINDUCTOR_CACHE_DIR": empty} if options.row in OURS else {})}
        started = time.perf_counter()
        done = subprocess.run(
            [*command, *(["--small"] if options.small else [])],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        seconds = time.perf_counter() - started
    return {"first": {"process_seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}}


def _first_image(bench: Bench) -> dict[str, Any]:
    contender = bench.contender("dev")
    image = call_seconds(lambda: contender.draw(0, steps=STEPS["dev"]))
    return {"set_up": dict(contender.set_up), "image_seconds": image}


MEASURES: dict[str, Callable[[Bench], Any]] = {
    "reference": _reference,
    "dev": partial(_model, "dev"),
    "four": _four,
    "wide": _wide,
    "kernels": _kernels,
    "steps": _steps,
    "switch": _switch,
    "sizes": _sizes,
    "schnell": partial(_model, "schnell"),
    "turns": _turns,
    "first": _first,
}
OURS_ALONE = ("steps", "sizes", "turns")


# Measuring


def _image(bench: Bench, contender: Contender, model: str, *, steps: int = 0, **inputs: Any) -> dict[str, Any]:
    """Seconds an image, and of each stage: medians, after one image that does not count."""
    seconds, metrics = [], []
    for turn in range(-1, bench.options.images):
        metrics.append(dict[str, Any]())
        draw = partial(contender.draw, turn, steps=steps or STEPS[model], **inputs)
        seconds.append(call_seconds(partial(_keep, draw, metrics[-1])))
    stages = {
        name.removesuffix("_seconds"): statistics.median(each[name] for each in metrics[1:])
        for name in metrics[0]
        if name.endswith("_seconds") or name == "reused_steps"
    }
    return {"seconds": statistics.median(seconds[1:]), "all_seconds": seconds[1:], "stages": stages}


def _keep(draw: Callable[[], Mapping[str, Any]], metrics: dict[str, Any]) -> None:
    metrics.update(draw())


def step_seconds(contender: Contender, steps: int) -> float:
    """Seconds of a step, from the end of the first to the end of the last one."""
    ended: list[float] = []

    def after_step(step: int) -> None:
        if step in (1, steps):
            wait()
            ended.append(time.perf_counter())

    contender.draw(0, steps=steps, after_step=after_step)
    return (ended[-1] - ended[0]) / (steps - 1)


def where_a_step_goes(contender: Contender, step: float, steps: int = 2) -> dict[str, Any]:
    """Milliseconds of a step by what kernels do, launches, and the largest kernels.

    Args:
        contender: draws.
        step: seconds of a step without a profiler.
        steps: that are profiled, after a first one.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    watching = profile(activities=activities)

    def after_step(number: int) -> None:
        if number in (1, 1 + steps):
            wait()
            (watching.start if number == 1 else watching.stop)()

    contender.draw(0, steps=steps + 2, after_step=after_step)
    on_gpu = torch.cuda.is_available()
    kernels = [
        (event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000 / steps, event.count)
        for event in watching.key_averages()
        if not on_gpu or (event.device_type.name == "CUDA" and not event.is_user_annotation)
    ]
    classes = dict.fromkeys((name for name, _ in CLASSES), 0.0)
    for name, milliseconds, _ in kernels:
        classes[class_of(name)] += milliseconds
    largest = sorted(kernels, key=lambda kernel: -kernel[1])[:LARGEST]
    return {
        "step_ms": 1000 * step,
        **{f"{name}_ms": milliseconds for name, milliseconds in classes.items()},
        "between_ms": 1000 * step - sum(classes.values()),
        "launches": sum(count for *_, count in kernels) / steps,
        "largest": [[name[:120], round(milliseconds, 3), count / steps] for name, milliseconds, count in largest],
    }


def class_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next(name for name, pattern in CLASSES if re.search(pattern, kernel, re.IGNORECASE))


if __name__ == "__main__":
    sys.exit(main())
