"""A training loop that can be stopped at any time: seeded steps, averaged weights, checkpoints, sheets."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import _muon as muon
from tqdm import tqdm

Weights = dict[str, Tensor]


def train(
    name: str,
    module: nn.Module,
    loss: Callable[[random.Random], Tensor],
    *,
    steps: int,
    rate: float,
    directory: Path,
    every: int = 250,
    decay: float = 0.999,
    sheet: Callable[[Weights, int], None] | None = None,
) -> Weights:
    """Train a module's trainable parameters, or go on where an interrupted run stopped.

    Muon (https://kellerjordan.github.io/posts/muon/) trains the matrices of a transformer's blocks, AdamW all else, a
    LoRA too. The rate rises over 100 steps and falls to zero over the last half.

    Args:
        name: of the run, in file names and seeds.
        module: whose parameters that require gradients are trained.
        loss: of one step; the generator it gets, and PyTorch's, are seeded by name and step.
        steps: in all.
        rate: highest learning rate.
        directory: for checkpoints.
        every: steps between checkpoints.
        decay: of the moving average of the weights.
        sheet: called with the averaged weights at each fourth checkpoint and at the end.

    Returns:
        The averaged weights.

    Raises:
        FloatingPointError: a loss is no number; the last checkpoint is still good.
    """
    trainable: Weights = {key: p for key, p in module.named_parameters() if p.requires_grad}
    optimisers = _optimisers(trainable, rate)
    average = {key: p.detach().clone() for key, p in trainable.items()}
    file, begin = directory / f"{name}.pt", 0
    if file.exists():
        begin = _resume(file, trainable, optimisers, average)
    shown = 0.0
    with tqdm(total=steps, initial=begin, desc=name, mininterval=10) as bar:
        for step in range(begin, steps):
            seed = f"{name} {step}"
            torch.manual_seed(random.Random(seed).getrandbits(60))
            factor = min(1.0, (step + 1) / 100, 2 * (steps - step) / steps)
            value = loss(random.Random(seed))
            if not value.isfinite():
                raise FloatingPointError(f"{name}: the loss of step {step} is {value.item()}; {file} was not touched.")
            value.backward()
            nn.utils.clip_grad_norm_(trainable.values(), 1.0)
            for optimiser in optimisers:
                optimiser.param_groups[0]["lr"] = rate * factor
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            with torch.no_grad():
                weight = 1 - min(decay, (step + 1) / (step + 10))
                torch._foreach_lerp_(list(average.values()), list(trainable.values()), weight)
            shown = value.item() if step == begin else 0.98 * shown + 0.02 * value.item()
            bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
            bar.update()
            if (step + 1) % every == 0 or step + 1 == steps:
                _save(file, step + 1, trainable, optimisers, average)
                if sheet and ((step + 1) % (4 * every) == 0 or step + 1 == steps):
                    sheet(average, step + 1)
    return average


def has_bfloat16() -> bool:
    """Whether the default device multiplies in bfloat16; a CPU that has to imitate it took 100 times as long."""
    if torch.get_default_device().type != "cpu":
        return True
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def _optimisers(trainable: Weights, rate: float) -> list[torch.optim.Optimizer]:
    matrices = {key for key, p in trainable.items() if p.ndim == 2 and "blocks." in key and "lora_" not in key}
    rest = [p for key, p in trainable.items() if key not in matrices]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, rate, betas=(0.9, 0.99), weight_decay=0.0)]
    if matrices:
        if not has_bfloat16():
            muon._zeropower_via_newtonschulz = _orthogonal  # noqa: SLF001 - Muon takes no function for it
        chosen = [trainable[key] for key in trainable if key in matrices]
        optimisers.append(torch.optim.Muon(chosen, rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimisers


def _orthogonal(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """Muon's Newton-Schulz iteration in the matrix's own type; PyTorch's is bfloat16 on every device."""
    a, b, c = ns_coefficients
    if grad.shape[0] > grad.shape[1]:
        return _orthogonal(grad.T, ns_coefficients, ns_steps, eps).T
    matrix = grad / grad.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = matrix @ matrix.T
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    orthogonal: Tensor = matrix
    return orthogonal


def _save(file: Path, step: int, trainable: Weights, optimisers: list[torch.optim.Optimizer], average: Weights) -> None:
    state = {
        "step": step,
        "weights": {key: p.detach() for key, p in trainable.items()},
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "average": average,
    }
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def _resume(file: Path, trainable: Weights, optimisers: list[torch.optim.Optimizer], average: Weights) -> int:
    state = torch.load(file)
    with torch.no_grad():
        for key, value in state["weights"].items():
            trainable[key].copy_(value)
            average[key].copy_(state["average"][key])
    for optimiser, stored in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(stored)
    return int(state["step"])
