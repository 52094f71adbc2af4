"""Which steps of a schedule are run, against diffusers' own count and its own schedule, to the bit."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given
from hypothesis import strategies as st

from flux_lora.drawing.schedule import first_level, noised, steps_run, unshifted
from tests.conftest import MINI


def scheduler(model: str) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler.from_pretrained(MINI / model / "scheduler")


class Pipeline:
    """What diffusers' pipelines count steps with: a scheduler, and no networks."""

    get_timesteps = FluxImg2ImgPipeline.get_timesteps

    def __init__(self, model: str) -> None:
        self.scheduler = scheduler(model)


@given(st.integers(1, 50), st.floats(0, 1))
def test_steps_are_counted_as_diffusers_counts_them(steps: int, strength: float) -> None:
    pipeline = Pipeline("schnell")
    pipeline.scheduler.set_timesteps(steps)
    assert steps_run(steps, strength) == max(1, pipeline.get_timesteps(steps, strength, "cpu")[1])


def test_bounds_of_the_strength() -> None:
    for steps in range(1, 51):
        assert steps_run(steps, 0.0) == 1
        assert steps_run(steps, 1.0) == steps
    assert [steps_run(4, strength) for strength in (0.2, 0.25, 0.5, 0.75, 0.8)] == [1, 1, 2, 3, 4]


@pytest.mark.parametrize("model", ["dev", "schnell"])
@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 8100])
def test_the_steps_that_are_run_are_the_end_of_the_whole_schedule_to_the_bit(model: str, tokens: int) -> None:
    whole, pipeline = scheduler(model), Pipeline(model)
    for steps in range(1, 51):
        whole.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens))
        for run in range(1, steps + 1):
            level = first_level(pipeline, unshifted(steps, run), tokens)
            assert torch.equal(pipeline.scheduler.timesteps, whole.timesteps[-run:])
            assert torch.equal(pipeline.scheduler.sigmas, whole.sigmas[-run - 1 :])
            assert level == whole.sigmas[-run - 1]


def test_a_whole_schedule_begins_with_noise_alone() -> None:
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 1, 16, 8, 8)
    for model in ("dev", "schnell"):
        assert torch.equal(noised(latents, noise, first_level(Pipeline(model), unshifted(28, 28), 4096)), noise)
