"""Reusing the transformer's outputs: in some steps its output is extrapolated from the steps before.

TaylorSeer (https://arxiv.org/abs/2503.06923) of the first order, by diffusers, applied to the transformer as a whole:
with outputs f(a) and f(b) of the last two computed steps a < b, step s takes f(b) + (s − b) · (f(b) − f(a)) / (b − a).

Which steps are computed is a schedule, not a threshold: it depends on nothing but the number of steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from flux_lora.device.libraries import diffusers


@dataclass(frozen=True)
class Schedule:
    """The first ``first`` steps and the last one are computed; between them every second one is extrapolated."""

    first: int = 4

    def reused(self, steps: int) -> list[int]:
        """The steps, from 0, that reuse: fewer than half of ``steps``; none of the four of schnell."""
        return list(range(self.first, steps - 1, 2))


class Computed:
    """How often the transformer was computed."""

    steps = 0


@contextmanager
def counting(transformer: Any, steps: int, schedule: Schedule | None) -> Iterator[Computed]:
    """For the denoising of one image: count what is computed, and reuse as the schedule says.

    Args:
        transformer: a FluxTransformer2DModel; afterwards, also after an error, it is as before.
        steps: of the scheduler.
        schedule: None computes every step.
    """
    computed = Computed()

    def count(*_: object) -> None:
        computed.steps += 1

    # The first layer runs in every computed step, compiled or not, and in no extrapolated one.
    counter = transformer.x_embedder.register_forward_pre_hook(count)
    if schedule:
        transformer.enable_cache(_configuration(steps, schedule))
    try:
        yield computed
    finally:
        counter.remove()
        if schedule:
            transformer.disable_cache()


def _configuration(steps: int, schedule: Schedule) -> Any:
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=schedule.first,
        disable_cache_after_step=steps - 1,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[""],  # the transformer itself, whose name among its own modules is empty
    )
