"""The memory plans on FLUX.1 at full size with random weights, against diffusers' own offloading at the same budget.

    scripts/bench memory                          each budget, all contenders, on the GPU
    scripts/bench memory --budgets 24 12 --models dev
    scripts/bench memory --budgets 24 --ours      without diffusers

Each contender runs in a process of its own, whose allocator is capped so that the driver counts no more than the budget
for it. Peak memory is what nvidia-smi reports, less what it reported before. Targets: never above the budget, and at
least 1.2 times faster than diffusers. Without a GPU: the plans by the numbers, and nothing measured; with --small, a
small model by each contender, to try it.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import full_size
from benchmarks.measure import call_seconds, machine
from flux_lora.assembly import assemble
from flux_lora.device.libraries import diffusers
from flux_lora.errors import DeviceMemoryError
from flux_lora.memory import measure, plans
from flux_lora.request import Request
from flux_lora.settings import Settings

GB = 10**9
BUDGETS = (80, 48, 40, 24, 16, 12)
MINUTES = 8
FASTER = 1.2
STEPS = 28
OURS = "ours"


def main() -> int:
    """Print a row for each budget; exit with 1 when a target is missed."""
    options = _options()
    if options.run:
        print(json.dumps(RUNS[options.run](options)))
        return 0
    print(machine())
    if not torch.cuda.is_available() and not options.small:
        _without_gpu(options.budgets, options.models)
        return 0
    rows, missed = _measure(options)
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "memory.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    return int(missed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="GB")
    parser.add_argument("--models", nargs="+", choices=["dev", "schnell"], default=["dev", "schnell"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--ours", action="store_true", help="without diffusers")
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark")
    parser.add_argument("--results", type=Path, help="a folder for memory.json")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _without_gpu(budgets: Sequence[float], models: Sequence[str]) -> None:
    networks = full_size.source(*models)(Path(), torch.bfloat16).networks
    sizes = measure.needed_sizes(networks, torch.bfloat16)
    print(f"\n{'budget':>8}  {'plan, by the numbers':32}{'host':>10}{'peak':>18}{'s/image':>18}{'diffusers':>18}")
    for budget in budgets:
        try:
            choice = plans.choose_plan(sizes, plans.Room(int(budget * GB) - measure.CONTEXT_BYTES, 2**50))
            plan, host = choice.label, plans.readable(choice.host)
        except DeviceMemoryError:
            plan, host = "none", ""
        print(f"{budget:5g} GB  {plan:32}{host:>10}" + f"{'not yet measured':>18}" * 3)


def _measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    rows, missed = [], False
    print(f"\n{'budget':>8}  {'contender':44}{'load':>9}{'s/image':>9}{'peak':>10}")
    for budget in options.budgets:
        started, seconds = time.perf_counter(), dict[str, float]()
        for name in (OURS,) if options.ours else RUNS:
            with _DriverPeak() as peak:
                result = _in_process(name, options, budget, MINUTES * 60 - (time.perf_counter() - started))
            rows.append({"budget": budget, "contender": name, "peak_bytes": peak.bytes, **result})
            if "error" in result:
                print(f"{budget:5g} GB  {name:44}{result['error'][:90]}")
                missed |= name == OURS
                continue
            seconds[name] = result["seconds"]
            contender = f"{name}: {result['plan']}"
            print(
                f"{budget:5g} GB  {contender:44}{result['load']:8.1f}s{result['seconds']:8.2f}s"
                f"{peak.bytes / GB:7.2f} GB"
            )
            missed |= name == OURS and peak.bytes > budget * GB
        theirs = [value for name, value in seconds.items() if name != OURS]
        if theirs and OURS in seconds:
            ratio = min(theirs) / seconds[OURS]
            print(f"{'':10}{ratio:.2f} times faster than the faster of diffusers' (target {FASTER})")
            missed |= ratio < FASTER and not options.small
    return rows, missed


def _in_process(name: str, options: argparse.Namespace, budget: float, limit: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--run", name, "--models", *options.models]
    command += ["--budgets", str(budget), "--steps", str(options.steps), *(["--small"] if options.small else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1, limit), check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {MINUTES} minutes"}
    print(done.stderr[-4000:], file=sys.stderr)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.splitlines() or ["no output"])[-1]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _ours(options: argparse.Namespace) -> dict[str, Any]:
    budget = options.budgets[0]
    with TemporaryDirectory() as folder:
        settings = Settings(
            weights=Path(folder), device=str(_device()), memory_budget=f"{budget}GB", download=(), memory_plan=None
        )
        log = partial(print, file=sys.stderr)
        started = time.perf_counter()
        open_weights = full_size.source(*options.models, small=options.small)
        generator = assemble(settings, log=log, open_weights=open_weights)
        load = time.perf_counter() - started

        def draw(seed: int, steps: int) -> None:
            asked = {"prompt": f"picture {seed}", "seed": seed, "num_inference_steps": steps}
            generator.draw(Request.parse(**asked, disable_safety_checker=True), lambda *_: None)

        draw(0, 2)
        seconds = call_seconds(lambda: draw(1, options.steps))
    return {"load": load, "seconds": seconds, "plan": generator.parts.memory.choice.label}


def _theirs(options: argparse.Namespace, offload: str) -> dict[str, Any]:
    device = _capped(options.budgets[0])
    started = time.perf_counter()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = full_size.pipeline("dev", torch.device("cpu"), dtype, small=options.small)
    if offload == "group":
        for network in (pipeline.transformer, pipeline.text_encoder_2):
            diffusers.hooks.apply_group_offloading(
                network,
                onload_device=device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=device.type == "cuda",
            )
        pipeline.text_encoder.to(device)
        pipeline.vae.to(device)
    elif device.type == "cuda":
        pipeline.enable_model_cpu_offload(device=device)
    pipeline.set_progress_bar_config(disable=True)
    load = time.perf_counter() - started

    def draw(seed: int, steps: int) -> None:
        noise = torch.Generator("cpu").manual_seed(seed)
        pipeline(f"picture {seed}", height=1024, width=1024, num_inference_steps=steps, generator=noise)

    draw(0, 2)
    return {"load": load, "seconds": call_seconds(lambda: draw(1, options.steps)), "plan": f"{offload} offload"}


RUNS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    OURS: _ours,
    "diffusers-model": partial(_theirs, offload="model"),
    "diffusers-group": partial(_theirs, offload="group"),
}


def _device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def _capped(budget: float) -> torch.device:
    device = _device()
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (budget * GB - measure.CONTEXT_BYTES) / total), device)
    return device


class _DriverPeak:
    """The most that the driver reports in use on the first GPU, less what it reported at the start; 0 without one."""

    def __enter__(self) -> "_DriverPeak":
        self._before, self.bytes = _driver_bytes(), 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.bytes = max(self.bytes, _driver_bytes() - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()


def _driver_bytes() -> int:
    if not torch.cuda.is_available():
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]  # in MiB
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20


if __name__ == "__main__":
    sys.exit(main())
