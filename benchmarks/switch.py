"""Switching LoRA or scale on a random 2 GB transformer of FLUX.1's width, in bfloat16.

    scripts/bench switch

Targets: at most 1.3 times a plain copy of the touched bytes plus the bare float32 products, of one LoRA and of two at
once; at least 3 times faster than diffusers' unload, load and fuse; and afterwards a step of the base model's speed
(ratio 1.00 ± 0.02). A DoRA beside a LoRA has no target: its norms need W + ΔW first.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.measure import machine, table, take_turns
from flux_lora.device.libraries import diffusers
from flux_lora.lora.formats import read
from flux_lora.lora.merge import MergedModule
from training.random_weights import random_lora

SIZES: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 5,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
OURS, RESCALED, FLOOR, THEIRS = "ours, another LoRA", "ours, another scale", "copy + float32 products", "diffusers"
TWO, WITH_DORA = "ours, other scales of two LoRAs", "ours, other scales of a LoRA and a DoRA"
FLOOR_OF_TWO = "copy + float32 products of two"
MAX_OVER_FLOOR, MIN_OVER_DIFFUSERS, STEP_TOLERANCE = 1.3, 3.0, 0.02


def main() -> int:
    """Print the tables; exit with 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench switch", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    ours, theirs = _transformer(device), _transformer(device)
    print(machine())
    print(f"{sum(p.nbytes for p in ours.parameters()) / 1e9:.2f} GB of weights, {options.rounds} rounds\n")
    missed = False
    for rank in options.ranks:
        with TemporaryDirectory() as folder:
            missed |= _switch(ours, theirs, _loras(ours, rank, Path(folder)), options.rounds, rank)
    missed |= _steps(ours, theirs, options.rounds, device)
    return int(missed)


def _switch(ours: Any, theirs: Any, files: list[Path], rounds: int, rank: int) -> bool:
    merged = MergedModule("transformer", ours, {})
    adapters = [read(file, {"transformer": merged.shapes}) for file in files]
    dora = read(_dora(ours, files[1]), {"transformer": merged.shapes})
    tensors = [load_file(file) for file in files]

    def with_diffusers(turn: int) -> None:
        theirs.unload_lora()
        theirs.load_lora_adapter(dict(tensors[turn % 2]), prefix="transformer", adapter_name="lora")
        theirs.fuse_lora()

    contenders: dict[str, Callable[[int], object]] = {
        OURS: _synchronized(lambda turn: merged.bring([(adapters[turn % 2], 1.0)])),
        RESCALED: _synchronized(lambda turn: merged.bring([(adapters[turn % 2], 0.5 + turn / 100)])),
        TWO: _synchronized(lambda turn: merged.bring([(adapters[0], 0.5 + turn / 100), (adapters[1], 1.0)])),
        WITH_DORA: _synchronized(lambda turn: merged.bring([(adapters[0], 0.5 + turn / 100), (dora, 1.0)])),
        FLOOR: _synchronized(_floor(ours, tensors[:1])),
        FLOOR_OF_TWO: _synchronized(_floor(ours, tensors)),
        THEIRS: _synchronized(with_diffusers),
    }
    seconds = take_turns(contenders, rounds)
    merged.bring([])
    theirs.unload_lora()
    print(f"rank {rank}, {len(adapters[0].updates['transformer'])} layers")
    print(table(seconds, FLOOR))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    over_floor = max(median[OURS] / median[FLOOR], median[RESCALED] / median[FLOOR], median[TWO] / median[FLOOR_OF_TWO])
    faster = median[THEIRS] / median[OURS]
    print(
        f"target: at most {MAX_OVER_FLOOR} × the floor, measured {over_floor:.2f}; "
        f"at least {MIN_OVER_DIFFUSERS:g} × faster than diffusers, measured {faster:.1f}\n"
    )
    return over_floor > MAX_OVER_FLOOR or faster < MIN_OVER_DIFFUSERS


def _steps(ours: Any, theirs: Any, rounds: int, device: str) -> bool:
    with TemporaryDirectory() as folder:
        (file, _) = _loras(ours, 16, Path(folder))
        merged = MergedModule("transformer", ours, {})
        merged.bring([(read(file, {"transformer": merged.shapes}), 1.0)])
    tokens, text, dtype = 256, 64, torch.bfloat16
    inputs = {
        "hidden_states": torch.randn(1, tokens, SIZES["in_channels"], dtype=dtype, device=device),
        "encoder_hidden_states": torch.randn(1, text, SIZES["joint_attention_dim"], dtype=dtype, device=device),
        "pooled_projections": torch.randn(1, SIZES["pooled_projection_dim"], dtype=dtype, device=device),
        "timestep": torch.full((1,), 0.5, dtype=dtype, device=device),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": torch.zeros(tokens, 3, device=device),
        "txt_ids": torch.zeros(text, 3, device=device),
    }

    def step(transformer: Any) -> Callable[[int], object]:
        @torch.no_grad()
        def run(_: int) -> None:
            transformer(**inputs)

        return _synchronized(run)

    seconds = take_turns({"a step, merged": step(ours), "a step, base model": step(theirs)}, 4 * rounds)
    print(table(seconds, "a step, base model"))
    ratio = statistics.median(seconds["a step, merged"]) / statistics.median(seconds["a step, base model"])
    print(f"target: the base model's speed within {STEP_TOLERANCE:.0%}, measured {ratio:.3f}")
    return abs(ratio - 1) > STEP_TOLERANCE


def _transformer(device: str) -> Any:
    with torch.device(device):
        transformer = diffusers.FluxTransformer2DModel(**SIZES)
    return transformer.to(torch.bfloat16).requires_grad_(False).eval()


def _loras(transformer: Any, rank: int, folder: Path) -> list[Path]:
    files = [folder / "first.safetensors", folder / "second.safetensors"]
    for file in files:
        save_file(random_lora(transformer, rank=rank), file)
    return files


def _dora(transformer: Any, lora: Path) -> Path:
    """A LoRA with magnitudes, each a little more than the norms of the weight's rows, as PEFT writes them."""
    weights, tensors = dict(transformer.named_parameters()), load_file(lora)
    for name in [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]:
        norms = weights[f"{name.removeprefix('transformer.')}.weight"].float().norm(dim=1)
        tensors[f"{name}.lora_magnitude_vector"] = 1.01 * norms.cpu()
    file = lora.with_name("dora.safetensors")
    save_file(tensors, file)
    return file


def _floor(transformer: Any, loras: list[dict[str, torch.Tensor]]) -> Callable[[int], None]:
    """What no merge can do without: every touched weight written once, and every product computed once."""
    weights = dict(transformer.named_parameters())
    names = [name.removesuffix(".lora_A.weight") for name in loras[0] if name.endswith(".lora_A.weight")]
    touched = [weights[f"{name.removeprefix('transformer.')}.weight"] for name in names]
    device = touched[0].device
    factors = [
        [
            (lora[f"{n}.lora_B.weight"].float().to(device), lora[f"{n}.lora_A.weight"].float().to(device))
            for lora in loras
        ]
        for n in names
    ]
    copies = [torch.empty_like(weight) for weight in touched]
    largest = max(weight.numel() for weight in touched)
    room = torch.empty(largest, dtype=torch.float32, device=device)

    def run(_: int) -> None:
        for weight, copy, products in zip(touched, copies, factors, strict=True):
            copy.copy_(weight)
            for up, down in products:
                torch.mm(up, down, out=room[: weight.numel()].view(weight.shape))

    return run


def _synchronized(work: Callable[[int], object]) -> Callable[[int], None]:
    def run(turn: int) -> None:
        work(turn)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    sys.exit(main())
