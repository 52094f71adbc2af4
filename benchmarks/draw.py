"""What serving costs beyond diffusers: ``Predictor.run`` against a plain FluxPipeline on the same weights.

    scripts/bench draw

dev, 28 steps, 1:1, one output, a new prompt each time, LoRA active, file included. Target, checker off: at most 1.03
times a FluxPipeline call plus saving its picture. Beside it stands schnell in 4 steps. The miniature's targets on two
cores: 6 s for dev and 2.5 s for schnell.
"""

import argparse
import os
import statistics
import sys
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from benchmarks.measure import machine, table, take_turns
from flux_lora.device.libraries import diffusers
from flux_lora.settings import Settings

OURS, PLAIN, PEFT, CHECKED, SCHNELL = (
    "Predictor.run, LoRA merged, checker off",
    "FluxPipeline without LoRA + save",
    "FluxPipeline with PEFT adapter + save",
    "Predictor.run, LoRA merged, checker on",
    "Predictor.run, schnell, 4 steps, checker off",
)
TARGET = 1.03


def main() -> int:
    """Print the table; exit with 1 when the target is missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench draw", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=28)
    options = parser.parse_args()
    settings = Settings.from_environment()
    with TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        with redirect_stdout(nowhere):
            predictor = _predictor()
        dtype = torch.bfloat16 if torch.cuda.is_available() else getattr(torch, settings.cpu_dtype)
        plain, peft = _pipeline(settings.weights, dtype), _pipeline(settings.weights, dtype)
        peft.load_lora_weights(settings.weights / "lora.safetensors")
        file = Path(folder) / "picture.webp"

        def ours(turn: int, *, model: str = "dev", steps: int = options.steps, unchecked: bool = True) -> None:
            predictor.run(
                prompt=f"picture number {turn} {unchecked}",
                seed=turn % 1000,
                model=model,
                num_inference_steps=steps,
                disable_safety_checker=unchecked,
            )

        def theirs(pipeline: Any, turn: int) -> None:
            image: Image.Image = pipeline(
                f"picture number {turn}",
                height=1024,
                width=1024,
                num_inference_steps=options.steps,
                generator=torch.Generator("cpu").manual_seed(turn % 1000),
            ).images[0]
            image.save(file, quality=80)

        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            seconds = take_turns(
                {
                    OURS: ours,
                    PLAIN: lambda turn: theirs(plain, turn),
                    PEFT: lambda turn: theirs(peft, turn),
                    CHECKED: lambda turn: ours(turn, unchecked=False),
                    SCHNELL: lambda turn: ours(turn, model="schnell", steps=4),
                },
                options.rounds,
            )
    print(machine())
    print(f"weights {settings.weights}, dev, {options.steps} steps, 1024×1024, {options.rounds} rounds\n")
    print(table(seconds, PLAIN))
    print(f"{'the safety checker alone':44}{statistics.median(predictor.metrics['safety_seconds']):9.3f}s")
    ratio = statistics.median(seconds[OURS]) / statistics.median(seconds[PLAIN])
    print(f"\ntarget: at most {TARGET} × FluxPipeline; measured {ratio:.3f}")
    return int(ratio > TARGET)


def _predictor() -> Any:
    from predict import Predictor

    class MeasuredPredictor(Predictor):
        """Keeps the metrics of the predictions with the checker on."""

        def __init__(self) -> None:
            self.metrics: dict[str, list[Any]] = defaultdict(list)

        def record_metric(self, key: str, value: Any, mode: str = "replace") -> None:  # noqa: ARG002 - Cog's signature
            if value:
                self.metrics[key].append(value)

    predictor = MeasuredPredictor()
    predictor.setup(None)
    return predictor


def _pipeline(weights: Path, dtype: torch.dtype) -> Any:
    pipeline = diffusers.FluxPipeline.from_pretrained(weights / "dev", dtype=dtype, local_files_only=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


if __name__ == "__main__":
    sys.exit(main())
