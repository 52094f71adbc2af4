"""The noise schedule of one image: which of its steps are run, and how much noise each begins with."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flux_lora.device.libraries import diffusers


class Scheduled(Protocol):
    """A pipeline, or whatever else holds its scheduler."""

    @property
    def scheduler(self) -> Any:
        """A FlowMatchEulerDiscreteScheduler."""


def steps_run(steps: int, strength: float) -> int:
    """How many of the last steps of a schedule are run, counted as diffusers does; one at least.

    Args:
        steps: of the whole schedule.
        strength: share of it that is run, 0…1.
    """
    return max(1, steps - int(steps - steps * strength))


def unshifted(steps: int, run: int) -> list[float]:
    """The noise levels with which the last ``run`` of ``steps`` steps begin, before the scheduler shifts them."""
    return list(np.linspace(1.0, 1 / steps, steps)[steps - run :])


def first_level(pipeline: Scheduled, levels: list[float], tokens: int) -> Tensor:
    """The noise level, 0…1, with which a pipeline will begin.

    Args:
        pipeline: holds the scheduler, which is set to these levels.
        levels: as `unshifted` gives them.
        tokens: that the transformer sees of the image; the shift depends on it.
    """
    scheduler: Any = pipeline.scheduler
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    shift = diffusers.pipelines.flux.pipeline_flux.calculate_shift(tokens, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(sigmas=levels, mu=shift)
    level: Tensor = scheduler.sigmas[0]
    return level


def noised(latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Latents at a noise level, a scalar 0…1, as FLUX.1 was trained on them: 0 are the latents, 1 is the noise."""
    return level * noise + (1.0 - level) * latents


def keep(kept: Tensor, drawn: Tensor, where: Tensor) -> Tensor:
    """Take what was ``drawn`` where that is wanted, and what is ``kept`` elsewhere, in the type of what was drawn."""
    return torch.where(where, drawn, kept.to(drawn.dtype))
