"""The rates that a GPU sustains, which bound what any code can reach on it: products, attention, copies.

    python -m benchmarks.card --results FOLDER     # card.json there

Sizes are those of FLUX.1 at one megapixel: 4,608 tokens, 3,072 channels, 24 heads of 128.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from benchmarks.gpu import find_device
from benchmarks.measure import machine, median_seconds
from flux_lora.speed.quantization import FORMATS, emulated_product, hardware_product

PRODUCTS = ((3072, 3072), (3072, 9216), (3072, 12288), (3072, 21504), (12288, 3072), (15360, 3072))
"""Inputs and outputs of the blocks' layers."""
TOKENS, HEADS, WIDTH = 4608, 24, 128
LARGE = 8192
COPIED = 2**31
"""Bytes."""
TIMES = 10
AT_ONCE = 20
"""Products that are begun before one waits: to begin one takes as long as a small one."""


def main() -> int:
    """Measure, print and keep the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="sixteen times smaller and fewer, to try it without a GPU")
    options = parser.parse_args()
    found = {"machine": machine(), "card": _card(), **_rates(find_device(small=options.small), small=options.small)}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "card.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return 0


def _card() -> str:
    """Name, power limit, clocks and driver, as its driver tells them."""
    if not torch.cuda.is_available():
        return "none"
    fields = "name,uuid,power.limit,clocks.sm,clocks.max.sm,temperature.gpu,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@torch.no_grad()
def _rates(device: torch.device, *, small: bool) -> dict[str, Any]:
    shrink, times, at_once = (16, 2, 2) if small else (1, TIMES, AT_ONCE)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def tflops(operations: int, work: Callable[[], object]) -> float:
        def several(_: int) -> None:
            for _ in range(at_once):
                work()

        return at_once * operations / median_seconds(several, times) / 1e12

    large, tokens = LARGE // shrink, TOKENS // shrink
    left, right = normal(large, large), normal(large, large)
    found: dict[str, Any] = {"plain_tflops": {f"{large}^3": tflops(2 * large**3, lambda: left @ right)}}
    found["fp8_tflops"] = {}
    product = hardware_product if device.type == "cuda" else emulated_product
    eight = FORMATS["fp8"].dtype
    for inputs, outputs in ((inputs // shrink, outputs // shrink) for inputs, outputs in PRODUCTS):
        name, operations = f"{tokens}x{inputs}x{outputs}", 2 * tokens * inputs * outputs
        x, weight, bias = normal(tokens, inputs), normal(outputs, inputs), normal(outputs)
        found["plain_tflops"][name] = tflops(operations, partial(F.linear, x, weight, bias))
        scales = torch.ones(tokens, 1, device=device), torch.ones(outputs, device=device)
        multiply = partial(product, x.to(eight), weight.to(eight), *scales, bias, dtype)
        found["fp8_tflops"][name] = tflops(operations, multiply)
    found["attention_tflops"] = {}
    for order, shape in (("(b, h, s, d)", (1, HEADS, tokens, WIDTH)), ("(b, s, h, d)", (1, tokens, HEADS, WIDTH))):
        query, key, value = (normal(*shape) for _ in range(3))
        if order == "(b, s, h, d)":
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        operations = 4 * tokens**2 * HEADS * WIDTH
        found["attention_tflops"][order] = tflops(
            operations, partial(F.scaled_dot_product_attention, query, key, value)
        )
    size = COPIED // shrink**2
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    seconds = {
        "on the device, read and written": median_seconds(lambda _: target.copy_(source), times) / 2,
        "host to device": median_seconds(lambda _: target.copy_(host, non_blocking=True), times),
    }
    return {**found, "gigabytes_a_second": {name: size / spent / 1e9 for name, spent in seconds.items()}}


if __name__ == "__main__":
    sys.exit(main())
