"""Which steps are computed, and what the others take instead, judged by a denoising loop by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from flux_lora.assembly import assemble
from flux_lora.drawing.image import denoise
from flux_lora.drawing.latents import initial_noise, pack, unpack
from flux_lora.drawing.prompts import PromptEncoder
from flux_lora.generator import Generator
from flux_lora.request import Request
from flux_lora.settings import Settings
from flux_lora.speed.step_cache import Schedule, counting
from tests.conftest import MINI

SIZE = (256, 256)
TOKENS = 64
"""Of the prompt; fewer than usual, and as many as make a difference."""


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return FluxPipeline.from_pretrained(MINI / "dev", dtype=torch.float32)


def draw(pipeline: Any, steps: int, schedule: Schedule | None) -> tuple[torch.Tensor, int]:
    encoded = PromptEncoder(1).encode(pipeline, "a witness", TOKENS, ())
    with counting(pipeline.transformer, steps, schedule) as computed:
        latents = denoise(pipeline, encoded, 7, SIZE, steps=steps, guidance=3.5, title="")
    return latents, computed.steps


@torch.no_grad()
def by_hand(pipeline: Any, steps: int, reused: list[int]) -> torch.Tensor:
    """The scheduler's Euler steps in float64, with a straight line through the last two computed outputs."""
    encoded = PromptEncoder(1).encode(pipeline, "a witness", TOKENS, ())
    grid = SIZE[0] // pipeline.vae_scale_factor
    tokens = pack(initial_noise(7, pipeline.transformer.config.in_channels // 4, grid, grid)).double()
    shift = torch.tensor(calculate_shift(tokens.shape[1], 256, 4096, 0.5, 1.15)).exp().double()
    times = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    sigmas = torch.cat([shift / (shift + 1 / times - 1), torch.zeros(1)])
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(grid / 2), torch.arange(grid / 2))
    known: list[tuple[int, torch.Tensor]] = []
    for step in range(steps):
        if step in reused:
            (a, first), (b, second) = known[-2:]
            output = second + (step - b) * (second - first) / (b - a)
        else:
            output = pipeline.transformer(
                hidden_states=tokens.float(),
                timestep=sigmas[step : step + 1].float(),
                guidance=torch.tensor([3.5]),
                pooled_projections=encoded.pooled,
                encoder_hidden_states=encoded.tokens,
                txt_ids=torch.zeros(TOKENS, 3),
                img_ids=places,
                return_dict=False,
            )[0].double()
            known.append((step, output))
        tokens = tokens + (sigmas[step + 1] - sigmas[step]) * output
    return unpack(tokens, grid, grid)


@pytest.mark.parametrize("steps", range(1, 51))
def test_what_a_schedule_reuses(steps: int) -> None:
    reused = Schedule().reused(steps)
    assert len(reused) <= steps / 2
    assert not set(reused) & {0, 1, 2, 3, steps - 1}  # a line needs two points, and the last step decides the details
    assert not any({step, step + 1, step + 2} <= set(reused) for step in reused)
    assert not any({step, step + 1} <= set(reused) for step in reused if step < 9)


def test_of_28_steps_14_are_computed() -> None:
    reused = Schedule().reused(28)
    assert sorted({*range(28)} - {*reused}) == [0, 1, 2, 3, 5, 7, 9, 11, 13, 16, 19, 22, 25, 27]


@pytest.mark.parametrize("steps", [1, 4, 5, 6, 9, 12, 16])
def test_outputs_are_extrapolated_as_the_schedule_says(pipeline: Any, steps: int) -> None:
    reused = Schedule().reused(steps)
    latents, computed = draw(pipeline, steps, Schedule())
    assert computed == steps - len(reused)
    assert torch.allclose(latents.double(), by_hand(pipeline, steps, reused), atol=2e-4)
    plain, all_steps = draw(pipeline, steps, None)
    assert all_steps == steps
    assert torch.equal(plain, latents) == (not reused)


def test_an_interrupted_image_leaves_nothing_behind(pipeline: Any) -> None:
    before, _ = draw(pipeline, 8, Schedule())
    plain, _ = draw(pipeline, 8, None)
    calls = iter(range(5))

    def interrupt(*_: object) -> None:
        if next(calls) == 4:
            raise KeyboardInterrupt

    interrupting = pipeline.transformer.x_embedder.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(pipeline, 8, Schedule())
    interrupting.remove()
    assert torch.equal(draw(pipeline, 8, None)[0], plain)
    assert torch.equal(draw(pipeline, 8, Schedule())[0], before)


def test_log_and_metrics_say_what_was_reused(tmp_path: Path) -> None:
    """Uncompiled, since nothing about it depends on that."""
    lines: list[str] = []
    parts = assemble(Settings(weights=MINI, cache=tmp_path), log=lines.append).parts
    asked = {"prompt": "a witness", "seed": 7, "num_inference_steps": 12, "num_outputs": 2}
    asked |= {"aspect_ratio": "custom", "width": 256, "height": 256}
    for schedule, reused in ((None, 0), (Schedule(), 8)):
        metrics: dict[str, Any] = {}
        Generator(replace(parts, schedule=schedule)).draw(Request.parse(**asked), metrics.__setitem__)
        assert metrics["reused_steps"] == reused
    assert sum("4 of 12 steps reuse" in line for line in lines) == 2
