"""How far the other profiles' pictures are from those of ``exact``, with the same prompts and seeds.

    scripts/bench profiles                       # the miniature
    FLUX_WEIGHTS=weights scripts/bench profiles  # the full weights, on a GPU

PSNR of the pictures in dB (mean squared error over all of them) and cosine of the latents (the lowest, and the mean).
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import free, machine
from benchmarks.results import FOLDER
from flux_lora.assembly import assemble
from flux_lora.generator import Step
from flux_lora.request import Request
from flux_lora.settings import Settings
from flux_lora.speed.profiles import PROFILES

PROMPTS = ("a tomato on a blue background", "an owl on a purple background", "a photo of TOK", "")
REFERENCE = "exact"


@dataclass
class Drawn:
    """What a profile draws of all prompts."""

    pixels: np.ndarray
    latents: list[torch.Tensor]
    reused: int
    steps: int
    attention: str


def main() -> int:
    """Print the table and keep it as JSON."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench profiles", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2, help="of each prompt")
    parser.add_argument("--steps", type=int, default=28)
    options = parser.parse_args()
    settings = Settings.from_environment()
    print(machine())
    print(f"weights {settings.weights}, dev, {options.steps} steps, {len(PROMPTS)} prompts × {options.seeds} seeds\n")
    drawn: dict[str, Drawn] = {}
    rows = {}
    for name in (REFERENCE, *(name for name in PROFILES if name != REFERENCE)):
        drawn[name] = _draw(settings.model_copy(update={"profile": name}), options.seeds, options.steps)
        if name != REFERENCE:
            rows[name] = _distance(drawn.pop(name), drawn[REFERENCE])
    print(f"{'':12}{'PSNR':>10}{'cosine, lowest':>16}{'mean':>10}{'steps that reuse':>18}")
    for name, row in rows.items():
        cosines = f"{row['lowest_cosine']:16.5f}{row['mean_cosine']:10.5f}"
        print(f"{name:12}{row['psnr']:7.1f} dB{cosines}{row['reused_steps']:>15} of {options.steps}")
    FOLDER.mkdir(exist_ok=True)
    found = {"machine": machine(), "weights": str(settings.weights), "steps": options.steps, "profiles": rows}
    (FOLDER / f"profiles-{'cuda' if torch.cuda.is_available() else 'cpu'}.json").write_text(
        json.dumps(found, indent=2) + "\n"
    )
    return 0


def _draw(settings: Settings, seeds: int, steps: int) -> Drawn:
    """Every prompt with every seed by one profile; what it had loaded is let go of afterwards."""
    latents: list[torch.Tensor] = []
    pixels: list[np.ndarray] = []
    metrics: dict[str, Any] = {}

    def observe(step: Step) -> None:
        if step.step == step.steps:
            latents.append(step.latents.float().cpu())

    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        generator = assemble(settings, log=lambda _: None)
        for request in _requests(seeds, steps):
            (path,) = generator.draw(request, metrics.__setitem__, observe)
            pixels.append(np.asarray(Image.open(path)))
    del generator
    free()
    return Drawn(np.stack(pixels), latents, metrics["reused_steps"], steps, metrics["attention"])


def _requests(seeds: int, steps: int) -> Iterator[Request]:
    for prompt in PROMPTS:
        for seed in range(seeds):
            asked = {"prompt": prompt, "seed": seed, "num_inference_steps": steps, "output_format": "png"}
            yield Request.parse(**asked, disable_safety_checker=True)


def _distance(drawn: Drawn, exact: Drawn) -> dict[str, Any]:
    error = np.square(drawn.pixels.astype(np.float64) - exact.pixels).mean()
    cosines = [
        float(torch.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))
        for one, other in zip(drawn.latents, exact.latents, strict=True)
    ]
    return {
        "psnr": 10 * math.log10(255**2 / error) if error else math.inf,
        "lowest_cosine": min(cosines),
        "mean_cosine": statistics.mean(cosines),
        "reused_steps": drawn.reused,
        "attention": drawn.attention,
    }


if __name__ == "__main__":
    sys.exit(main())
