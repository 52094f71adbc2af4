"""What a request costs around the transformer: text, scheduling, decode, check and encoding, against plain diffusers.

    scripts/bench cpu                      # the miniature, dev, 28 steps, 1:1, on the CPU
    scripts/bench cpu --profile exact      # compiled

The seconds in the transformer are taken by hooks around its calls; the rest of a request is what is compared. All draw
with the same LoRA, which the plain FluxPipeline fuses, and write a WebP file.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.measure import machine, take_turns
from benchmarks.results import FOLDER
from flux_lora.assembly import assemble
from flux_lora.device.libraries import diffusers
from flux_lora.request import Request
from flux_lora.settings import Settings

PLAIN, OURS, CHECKED = "FluxPipeline + save", "ours, checker off", "ours, checker on"


class Stopwatch:
    """Seconds that a module's calls take together."""

    def __init__(self, module: torch.nn.Module) -> None:
        """Time the calls of a module."""
        self.seconds = 0.0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """The seconds since the last take."""
        taken, self.seconds = self.seconds, 0.0
        return taken


def main() -> int:
    """Print the table and keep it as JSON."""
    options = _options()
    settings = Settings(device="cpu", profile=options.profile)
    inside: dict[str, list[float]] = {PLAIN: [], OURS: [], CHECKED: []}
    stages: dict[str, list[float]] = {}
    with (
        TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        contenders, watches = _contenders(settings, options.steps, Path(folder))
        outside = _measure(contenders, watches, inside, stages, options.rounds)
    print(machine())
    print(f"weights {settings.weights}, profile {options.profile}, dev, {options.steps} steps, 1024×1024, medians\n")
    print(f"{'':24}{'request':>10}{'transformer':>13}{'around it':>11}{'share':>8}")
    for name, seconds in outside.items():
        whole, transformer = statistics.median(seconds), statistics.median(inside[name])
        share = statistics.median(1 - part / all_ for part, all_ in zip(inside[name], seconds, strict=True))
        print(f"{name:24}{whole:9.3f}s{transformer:12.3f}s{whole - transformer:10.3f}s{share:8.1%}")
    medians = {stage: statistics.median(seconds) for stage, seconds in stages.items()}
    print(f"\n{CHECKED}: " + ", ".join(f"{stage} {seconds:.3f} s" for stage, seconds in medians.items()))
    found = {"machine": machine(), "profile": options.profile, "steps": options.steps, "seconds": outside}
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"cpu-{options.profile}.json"
    file.write_text(json.dumps({**found, "transformer": inside, "stages": medians}, indent=2) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--profile", default="eager", choices=("eager", "exact", "balanced", "fast"))
    return parser.parse_args()


def _contenders(
    settings: Settings, steps: int, folder: Path
) -> tuple[dict[str, Callable[[int], Any]], dict[str, Stopwatch]]:
    generator = assemble(settings, log=lambda _: None)
    plain = diffusers.FluxPipeline.from_pretrained(
        settings.weights / "dev", dtype=getattr(torch, settings.cpu_dtype), local_files_only=True
    )
    plain.load_lora_weights(settings.weights / "lora.safetensors")
    plain.fuse_lora()
    plain.unload_lora_weights()

    def ours(turn: int, *, checked: bool) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        asked = {"prompt": f"picture {turn} {checked}", "seed": turn % 100, "num_inference_steps": steps}
        generator.draw(Request.parse(**asked, disable_safety_checker=not checked), metrics.__setitem__)
        return metrics

    def theirs(turn: int) -> None:
        image = plain(
            f"picture {turn}",
            height=1024,
            width=1024,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(turn % 100),
        ).images[0]
        image.save(folder / "picture.webp", quality=80)

    mine = Stopwatch(generator.parts.pipelines["dev"].transformer)
    contenders = {
        PLAIN: theirs,
        OURS: lambda turn: ours(turn, checked=False),
        CHECKED: lambda turn: ours(turn, checked=True),
    }
    return contenders, {PLAIN: Stopwatch(plain.transformer), OURS: mine, CHECKED: mine}


def _measure(
    contenders: dict[str, Callable[[int], Any]],
    watches: dict[str, Stopwatch],
    inside: dict[str, list[float]],
    stages: dict[str, list[float]],
    rounds: int,
) -> dict[str, list[float]]:
    def watched(name: str) -> Callable[[int], None]:
        def run(turn: int) -> None:
            metrics = contenders[name](turn)
            seconds = watches[name].take()
            if turn >= 0:
                inside[name].append(seconds)
            for key, value in metrics.items() if turn >= 0 and name == CHECKED else ():
                if key.endswith("_seconds"):
                    stages.setdefault(key.removesuffix("_seconds"), []).append(value)

        return run

    return take_turns({name: watched(name) for name in contenders}, rounds)


if __name__ == "__main__":
    sys.exit(main())
