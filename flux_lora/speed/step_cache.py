"""Reusing the transformer's outputs: in some steps its output is extrapolated from the steps before.

TaylorSeer (https://arxiv.org/abs/2503.06923) of the first order, applied to the transformer as a whole: with outputs
f(a) and f(b) of the last two computed steps a < b, step s takes f(b) + (s − b) · (f(b) − f(a)) / (b − a).

Which steps are computed is a schedule, not a threshold: it depends on nothing but the number of steps. At the same
number of computed steps its pictures are nearer than those of first-block caching (``scripts/bench reuse``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """At least half of the steps are computed: the first four, the last, between them every second, then every third.

    Early outputs bend most, so that every third comes late: with 28 steps from the thirteenth on.
    """

    first: int = 4

    def reused(self, steps: int) -> list[int]:
        """The steps, from 0, that reuse: never more than two in a row, and none of the four of schnell."""
        computed, step = {*range(self.first), steps - 1}, self.first + 1
        while step < steps:
            computed.add(step)
            step += 2 if step < max(9, steps - 15) else 3
        return [step for step in range(steps) if step not in computed]


class Computed:
    """How often the transformer was computed."""

    steps = 0


@contextmanager
def counting(transformer: Any, steps: int, schedule: Schedule | None) -> Iterator[Computed]:
    """For the denoising of one image: count what is computed, and reuse as the schedule says.

    Args:
        transformer: a FluxTransformer2DModel, called once in each step; afterwards, also after an error, it is as
            before.
        steps: of the scheduler.
        schedule: None computes every step.
    """
    computed = Computed()
    reused = set(schedule.reused(steps)) if schedule else set()
    known: list[tuple[int, Tensor]] = []
    compute, taken = transformer.forward, iter(range(steps))

    def forward(*inputs: Any, **named: Any) -> tuple[Tensor]:
        step = next(taken)
        if step in reused:
            return (_extrapolated(known, step),)
        computed.steps += 1
        (output,) = compute(*inputs, **named)
        known[:] = [*known[-1:], (step, output)] if reused else []
        return (output,)

    own = vars(transformer).get("forward")
    transformer.forward = forward
    try:
        yield computed
    finally:
        if own is None:
            del transformer.forward
        else:
            transformer.forward = own


def _extrapolated(known: list[tuple[int, Tensor]], step: int) -> Tensor:
    """Continue the line through the outputs of two steps, in float32."""
    (a, first), (b, second) = known
    line = second.float() + (step - b) / (b - a) * (second.float() - first.float())
    return line.to(second.dtype)
