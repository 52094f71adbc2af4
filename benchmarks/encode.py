"""What a source image costs: the VAE's encoder beside its decoder, and that text to image pays nothing for it.

    scripts/bench encode

FLUX.1's VAE at full size with random weights, in bfloat16 on a GPU and in float32 without one; then requests to the
weights at hand, whose stages are the service's own metrics.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from benchmarks.full_size import full_vae
from benchmarks.measure import free, machine, median_seconds, wait
from flux_lora.assembly import assemble
from flux_lora.drawing import strips
from flux_lora.drawing.source import Given, SourceImage
from flux_lora.generator import Generator
from flux_lora.inputs import EXTENDED
from flux_lora.ledger import Log
from flux_lora.request import Request
from flux_lora.settings import Settings


class Told:
    """A picture that is there already."""

    def __init__(self, given: Given | None) -> None:
        """Take the picture; None: there is none."""
        self._given = given

    def read(self, _request: Request, _log: Log) -> Given | None:
        """Give the picture."""
        return self._given


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=1024, help="pixels a side of the image")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--vae", action="store_true", help="only the VAE, and no requests")
    parser.add_argument("--small", action="store_true", help="an eighth of that, and once, to try it")
    options = parser.parse_args()
    if options.small:
        options.side, options.rounds = options.side // 8, 1
    print(f"{machine()}\n\nFLUX.1's VAE, {options.side}×{options.side}")
    for name, (seconds, peak) in _halves(options.side, options.rounds).items():
        print(f"{name:24}{seconds:9.3f}s" + (f"{peak / 2**30:9.2f} GiB" if peak else ""))
    if options.vae:
        return 0
    print(f"\ndev, {options.steps} steps, 1024×1024, weights of FLUX_WEIGHTS: medians of {options.rounds}")
    for name, stages in _requests(options.steps, options.rounds).items():
        print(f"{name:24}" + ", ".join(f"{stage} {seconds:.3f} s" for stage, seconds in stages.items()))
    return 0


@torch.no_grad()
def _halves(side: int, rounds: int) -> dict[str, tuple[float, int]]:
    """Seconds of a call, and the most memory on a GPU beside the weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = full_vae().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    pixels = torch.rand(1, 3, side, side, device=device, dtype=vae.dtype) * 2 - 1
    latents = strips.mean(vae.encode(pixels, return_dict=False)[0])
    work: dict[str, Callable[[int], Any]] = {
        "encode": lambda _: vae.encode(pixels, return_dict=False)[0].mode(),
        "encode in strips": lambda _: strips.encode(vae, pixels),
        "decode": lambda _: vae.decode(latents, return_dict=False)[0],
        "decode in strips": lambda _: strips.decode(vae, latents),
    }
    found = {}
    for name, call in work.items():
        free()
        seconds = median_seconds(call, rounds)
        peak = 0
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call(0)
            wait()
            peak = torch.cuda.max_memory_allocated() - before
        found[name] = (seconds, peak)
    return found


def _requests(steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """The median seconds of each stage: of text to image, and from a picture with most of the steps."""
    generator = assemble(Settings.from_environment(), log=lambda _: None)
    image = Image.effect_noise((1024, 1024), 64).convert("RGB")
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    given = Given(SourceImage(image, None, 1 - 1 / steps), digest, None, b"")
    found = {}
    for name, picture in (("text to image", None), ("image to image", given)):
        drawing = Generator(replace(generator.parts, pictures=Told(picture)))
        rows = [_metrics(drawing, turn, steps) for turn in range(rounds + 1)][1:]
        found[name] = {
            key.removesuffix("_seconds"): sorted(row[key] for row in rows)[rounds // 2]
            for key in rows[0]
            if key.endswith("_seconds")
        }
    return found


def _metrics(generator: Generator, turn: int, steps: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    asked = {"prompt": f"picture {turn}", "seed": turn, "num_inference_steps": steps, "disable_safety_checker": True}
    generator.draw(Request.parse(EXTENDED, **asked), metrics.__setitem__)
    return metrics


if __name__ == "__main__":
    sys.exit(main())
