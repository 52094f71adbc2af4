"""Drawing while training: the schedule of FLUX.1's pipeline, with any function for the velocity."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from training.networks import scheduler

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Latents (B, length, C) and times (B) in 0…1 -> velocity."""


def times(model: str, steps: int, tokens: int) -> Tensor:
    """The pipeline's times for a number of steps, from 1 to 0 (steps + 1)."""
    schedule = scheduler(model)
    schedule.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens))
    sigmas: Tensor = schedule.sigmas
    return sigmas


@torch.no_grad()
def integrate(velocity: Velocity, noise: Tensor, times: Tensor) -> Tensor:
    """Follow a velocity from noise along given times with Euler's method."""
    x = noise
    for now, then in pairwise(times):
        x = x + (then - now) * velocity(x, now.expand(len(x))).float()
    return x


def shift(t: Tensor, tokens: int) -> Tensor:
    """Training times, as dev's scheduler shifts them for a picture of so many tokens."""
    factor = torch.tensor(calculate_shift(tokens)).exp()
    return factor * t / (1 + (factor - 1) * t)
