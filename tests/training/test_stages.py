import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux_lora.patch_autoencoder import PatchAutoencoder
from training import album, batches, stages
from training.drawings import BASE, STYLE
from training.networks import AUTOENCODER, Text, attention_bias, new_transformer, positions, velocity
from training.stages import (
    SCHNELL_GUIDANCE,
    SCHNELL_STEPS,
    SUBSTEPS,
    Teacher,
    base_loss,
    dev_loss,
    new_dev,
    new_schnell,
    schnell_loss,
    split_guidance,
    style_loss,
)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> album.Album:
    monkeypatch.setattr(stages, "compiled", lambda network: network)
    monkeypatch.setattr(batches, "THINGS", ("cat",))
    monkeypatch.setattr(batches, "BATCH", dict.fromkeys(batches.BATCH, 2))
    torch.manual_seed(0)
    autoencoder = PatchAutoencoder(**AUTOENCODER)
    weight = autoencoder.analysis.weight.detach()
    codes = {style: {"cat": album._encode(weight, style, "cat")} for style in (BASE, STYLE)}
    return album.Album(codes, autoencoder)


def trained(module: nn.Module, loss: Callable) -> set[str]:
    """The parameters that one step of a stage changes."""
    value = loss(random.Random(1))
    assert value.isfinite()
    value.backward()
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_each_stage_trains_its_own_network_alone(pictures: album.Album) -> None:
    teacher = Teacher()
    dev = new_dev(teacher)
    schnell = new_schnell(dev)
    changed = trained(teacher, base_loss(teacher, pictures))
    assert changed
    assert all(name.startswith("transformer.") for name in changed)
    teacher.zero_grad()
    changed = trained(dev, dev_loss(dev, teacher, pictures))
    assert "time_text_embed.guidance_embedder.linear_2.weight" in changed
    assert not any(p.grad is not None and p.grad.any() for p in teacher.parameters())
    dev.zero_grad()
    assert trained(schnell, schnell_loss(schnell, dev, teacher.text, pictures))
    assert not any(p.grad is not None and p.grad.any() for p in dev.parameters())
    changed = trained(dev, style_loss(dev, teacher.text, pictures))
    assert changed
    assert all("lora_" in name for name in changed)


@pytest.mark.parametrize("seed", range(6))
def test_schnell_learns_on_the_path_that_it_takes(
    pictures: album.Album, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    teacher = Teacher()
    dev = new_dev(teacher)
    schnell = new_schnell(dev)
    calls: list[tuple[nn.Module, float, bool]] = []

    def watched(network: nn.Module, x: Tensor, t: Tensor, *given: Any) -> Tensor:
        calls.append((network, t[0].item(), torch.is_grad_enabled()))
        return velocity(network, x, t, *given)

    monkeypatch.setattr(stages, "velocity", watched)
    monkeypatch.setattr(stages, "OWN_PATH", 1.0)
    schnell_loss(schnell, dev, teacher.text, pictures)(random.Random(seed))
    *steps, learned = [(t, graded) for network, t, graded in calls if network is schnell]
    assert steps == [(1 - k / SCHNELL_STEPS, False) for k in range(len(steps))]
    assert learned == (1 - len(steps) / SCHNELL_STEPS, True)
    taught = [t for network, t, _ in calls if network is dev]
    substeps = SUBSTEPS[len(steps)]
    assert taught == pytest.approx([learned[0] - k / substeps / SCHNELL_STEPS for k in range(substeps)])


@pytest.mark.parametrize("seed", range(6))
def test_dev_learns_on_the_path_that_it_takes(
    pictures: album.Album, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    teacher = Teacher()
    dev = new_dev(teacher)
    calls: list[tuple[nn.Module, Tensor, float, bool]] = []

    def watched(network: nn.Module, x: Tensor, t: Tensor, *given: Any, **named: Any) -> Tensor:
        calls.append((network, x, t[0].item(), torch.is_grad_enabled()))
        return velocity(network, x, t, *given, **named)

    monkeypatch.setattr(stages, "velocity", watched)
    monkeypatch.setattr(stages, "OWN_PATH", 1.0)
    dev_loss(dev, teacher, pictures)(random.Random(seed))
    *steps, learned = [(x, t, graded) for network, x, t, graded in calls if network is dev]
    drawn_at = [t for _, t, _ in (*steps, learned)]
    assert drawn_at[0] == 1
    assert drawn_at == sorted(drawn_at, reverse=True)
    assert not any(graded for _, _, graded in steps)
    assert learned[2]
    ((taught_at, t, _),) = [call for network, *call in calls if network is teacher.transformer]
    assert t == learned[1]
    assert all(torch.equal(half, learned[0]) for half in taught_at.chunk(2))


def test_undecided_times_are_late_ones(pictures: album.Album) -> None:
    torch.manual_seed(0)
    batch = replace(batches.sample(pictures, random.Random(0)), latents=torch.zeros(1000, 4, 48))
    usual, undecided = (stages.noised(batch, share)[1] >= stages.UNDECIDED for share in (0.0, 1.0))
    assert undecided.all()
    assert usual.float().mean() < 0.3


def test_a_distilled_model_is_a_teacher_at_guidance_1_and_what_guidance_adds() -> None:
    torch.manual_seed(0)
    dev, teacher = new_transformer(guidance=True), Teacher()
    weights, embedder = split_guidance(dev)
    teacher.transformer.load_state_dict(weights)
    again = new_dev(teacher, embedder)
    text = Text(torch.randn(2, 24, 96), torch.zeros(24), torch.randn(2, 64))
    given = torch.randn(2, 16, 48), torch.tensor([0.3, 0.9]), text, positions(4, 4, 16), attention_bias(text, 16, 16)
    with torch.no_grad():
        plain = velocity(teacher.transformer, *given)
        for guidance, change in ((1.0, 0.0), (4.0, 1e-3)):
            scale = torch.full((2,), guidance)
            drawn = velocity(dev, *given, scale)
            assert torch.allclose(velocity(again, *given, scale), drawn, atol=1e-5)
            assert (drawn - plain).abs().max() >= change
        assert torch.allclose(velocity(dev, *given, torch.ones(2)), plain, atol=1e-5)
        fast = velocity(new_schnell(dev), *given)
        assert torch.allclose(fast, velocity(dev, *given, torch.full((2,), SCHNELL_GUIDANCE)), atol=1e-5)
