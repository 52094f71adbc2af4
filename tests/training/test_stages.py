import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from training import album, batches, paths, stages
from training.networks import Text, attention_bias, new_transformer, positions, velocity
from training.paths import Paths, draw_paths
from training.stages import (
    SCHNELL_GUIDANCE,
    SCHNELL_STEPS,
    SUBSTEPS,
    Teacher,
    base_loss,
    dev_loss,
    fast,
    guided,
    new_dev,
    new_schnell,
    schnell_loss,
    split_guidance,
    style_loss,
)
from training.styles import BASE, STYLE


def trained(module: nn.Module, loss: Callable[[random.Random], Tensor]) -> set[str]:
    """The parameters that a few steps of a stage change: a single one may not meet what one of them needs."""
    for seed in range(3):
        torch.manual_seed(seed)
        value = loss(random.Random(seed))
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
    schnell.zero_grad()
    changed = trained(dev, style_loss({"dev": dev, "schnell": schnell}, teacher.text, pictures))
    assert changed
    assert all("lora_" in name for name in changed)
    shared = {name: p for name, p in dev.named_parameters() if "lora_" in name}
    assert all(p is shared[name] for name, p in schnell.named_parameters() if "lora_" in name)
    assert not any("to_q" in name or "to_k" in name or "norm" in name for name in changed)


class Call(NamedTuple):
    """What a network was asked and answered while a stage learned."""

    network: nn.Module
    x: Tensor
    t: Tensor
    velocity: Tensor
    learns: bool


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls of all networks in their order, on batches that begin with what a student drew itself."""
    seen: list[Call] = []

    def watched(network: nn.Module, x: Tensor, t: Tensor, *given: Any, **named: Any) -> Tensor:
        drawn = velocity(network, x, t, *given, **named)
        seen.append(Call(network, x, t, drawn.detach().float(), torch.is_grad_enabled()))
        return drawn

    monkeypatch.setattr(stages, "velocity", watched)
    monkeypatch.setattr(paths, "velocity", watched)
    monkeypatch.setattr(stages, "OWN_PATH", {"dev": 1.0, "schnell": 1.0})
    return seen


def path_of(student: nn.Module, calls: list[Call]) -> list[Call]:
    """The student's calls, which must be a path from t = 1, each one Euler step on, where only the last one learns."""
    path = [call for call in calls if call.network is student]
    assert [call.learns for call in path] == [False] * (len(path) - 1) + [True]
    assert (path[0].t == 1).all()
    for call, then in pairwise(path):
        assert (then.t < call.t).all()
        assert torch.allclose(then.x, call.x + (then.t - call.t)[:, None, None] * call.velocity, atol=1e-5)
    return path


@pytest.mark.parametrize("seed", range(6))
def test_schnell_learns_on_the_path_that_it_takes(pictures: album.Album, calls: list[Call], seed: int) -> None:
    teacher = Teacher()
    dev = new_dev(teacher)
    schnell = new_schnell(dev)
    schnell_loss(schnell, dev, teacher.text, pictures)(random.Random(seed))
    path = path_of(schnell, calls)
    assert [call.t[0].item() for call in path] == [1 - k / SCHNELL_STEPS for k in range(len(path))]
    taught = [call.t[0].item() for call in calls if call.network is dev]
    begin, substeps = path[-1].t[0].item(), SUBSTEPS[len(path) - 1]
    assert taught == pytest.approx([begin - k / substeps / SCHNELL_STEPS for k in range(substeps)])


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The times that a student learned from; the networks themselves are left out."""
    seen: list[Tensor] = []

    def still(_: nn.Module, x: Tensor, t: Tensor, *_given: Any, **_named: Any) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(t)
        return torch.zeros_like(x)

    monkeypatch.setattr(stages, "velocity", still)
    return seen


def test_schnell_learns_its_first_step_half_of_the_time(pictures: album.Album, learned: list[Tensor]) -> None:
    teacher = Teacher()
    dev = new_dev(teacher)
    learn = schnell_loss(new_schnell(dev), dev, teacher.text, pictures)
    for seed in range(100):
        learn(random.Random(seed))
    begins = [t[0].item() for t in learned]
    assert set(begins) == {1 - k / SCHNELL_STEPS for k in range(SCHNELL_STEPS)}
    assert 40 < begins.count(1.0) < 60


@pytest.mark.parametrize("seed", range(6))
def test_dev_learns_on_the_path_that_it_takes(pictures: album.Album, calls: list[Call], seed: int) -> None:
    teacher = Teacher()
    dev = new_dev(teacher)
    dev_loss(dev, teacher, pictures)(random.Random(seed))
    learned = path_of(dev, calls)[-1]
    (taught,) = [call for call in calls if call.network is teacher.transformer]
    for half in range(2):
        assert torch.equal(taught.x.chunk(2)[half], learned.x)
        assert torch.equal(taught.t.chunk(2)[half], learned.t)


@pytest.mark.parametrize("name", ["dev", "schnell"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_style_is_learned_on_the_way_that_the_lora_takes(
    pictures: album.Album, calls: list[Call], monkeypatch: pytest.MonkeyPatch, name: str, share: float
) -> None:
    monkeypatch.setattr(stages, "WALKS", 1)
    monkeypatch.setattr(stages, "WALKERS", {name: 1.0})
    monkeypatch.setattr(stages, "CANVASES", {batches.USUAL: 1.0})
    monkeypatch.setattr(stages, "WEAKER", (0.5, 0.5))
    monkeypatch.setattr(stages, "WEAKER_SHARE", share)
    kept: list[Paths] = []

    def draw(*given: Any) -> Paths:
        kept.append(draw_paths(*given))
        return kept[-1]

    monkeypatch.setattr(stages, "draw_paths", draw)
    teacher = Teacher()
    dev = new_dev(teacher)
    networks = {"dev": dev, "schnell": new_schnell(dev)}
    learn = style_loss(networks, teacher.text, pictures)
    losses = [learn(random.Random(0)).item()]
    torch.nn.init.normal_(next(p for key, p in dev.named_parameters() if "proj_out.lora_B" in key), std=0.02)
    (paths,) = kept
    steps = len(paths.velocities)
    losses += [learn(random.Random(0)).item() for _ in range(steps - 2)]
    without, along = calls[steps::2], calls[steps + 1 :: 2]
    assert not any(call.network is networks[name] for call in calls[:steps] + without)
    assert all(call.network is networks[name] for call in along)
    assert torch.equal(along[0].x, paths.noise.float())
    for before, then in pairwise(along):
        assert torch.allclose(then.x, before.x + (then.t - before.t)[:, None, None] * before.velocity, atol=1e-5)
    tokens, scale = paths.shape[0] * paths.shape[1], 0.5 if share else 1.0
    base, style = (paths.truth(pictures, kind)[:, :, :tokens] for kind in (BASE, STYLE))
    way, added = base[1] - base[0], torch.zeros_like(base[0])
    ends = [call.t[0].item() for call in along[1:]] + [paths.times[steps - 1].item()]
    for plain, own, loss, end in zip(without, along, losses, ends, strict=True):
        t, x = own.t[0].item(), own.x[:, :tokens]
        assert torch.allclose(plain.x[:, :tokens], x - added, atol=1e-5)
        taught = plain.velocity[:, :tokens]
        share_of_second = [
            float(((p - t * v - b) * w).sum() / w.square().sum())
            for p, v, b, w in zip(x - added, taught, base[0], way, strict=True)
        ]
        whole = scale * torch.stack(
            [
                (1 - min(max(s, 0), 1)) * (style - base)[0, k] + min(max(s, 0), 1) * (style - base)[1, k]
                for k, s in enumerate(share_of_second)
            ]
        )
        rate = (whole - added) / t
        weight = t * t / max(t, stages.LEAST_WEIGHT) / scale**2
        error = (own.velocity[:, :tokens] - (taught - rate)).square().mean().item()
        assert loss == pytest.approx(weight * error, rel=1e-3)
        added = added + (t - end) * rate


def test_the_style_adds_what_belongs_to_what_is_drawn() -> None:
    values, pictures = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for drawn, expected in (
        (pictures[0], values[0]),
        (pictures[1], values[1]),
        (pictures.mean(0), values.mean(0)),
        (2 * pictures[1] - pictures[0], values[1]),
    ):
        assert torch.allclose(stages.blend(values, pictures, drawn), expected, atol=1e-5)
    same = pictures[0].expand(2, -1, -1, -1)  # a canvas without room for two places
    assert torch.equal(stages.blend(values[0].expand_as(values), same, pictures[1]), values[0])


@pytest.mark.parametrize(("stage", "share"), [("base", 0.5), ("dev", 0.75)])
def test_teacher_and_dev_learn_mostly_where_a_drawing_is_decided(
    pictures: album.Album, learned: list[Tensor], monkeypatch: pytest.MonkeyPatch, stage: str, share: float
) -> None:
    monkeypatch.setitem(stages.OWN_PATH, "dev", 0.0)
    teacher = Teacher()
    learn = base_loss(teacher, pictures) if stage == "base" else dev_loss(new_dev(teacher), teacher, pictures)
    for seed in range(100):
        torch.manual_seed(seed)
        learn(random.Random(seed))
    late = torch.cat(learned) >= stages.UNDECIDED
    assert late.float().mean() == pytest.approx(share, abs=0.1)


def test_guidance_sets_in_where_a_prompt_still_decides() -> None:
    torch.manual_seed(0)
    teacher, prompts = Teacher(), ["a cat", "a red dog", "a cat on blue", "cat"]
    ids, bias = positions(4, 4, 16), attention_bias(teacher.text(prompts, 512), 16, 16)
    x, t = torch.randn(4, 16, 48), torch.tensor([0.5, 0.8, 0.85, 0.95])
    guidance = torch.tensor([4.0, 4.0, 4.0, 2.5])
    with torch.no_grad():
        asked, empty = (
            velocity(teacher.transformer, x, t, teacher.text(words, 512), ids, bias).double()
            for words in (prompts, [""] * 4)
        )
        drawn, plain = (
            guided(teacher.transformer, teacher.text, prompts, scale, ids, bias)(x, t)
            for scale in (guidance, torch.ones(4))
        )
    acts = torch.tensor([0.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    full = empty + guidance[:, None, None] * (asked - empty)
    expected = torch.lerp(asked, full, acts[:, None, None].expand_as(full))
    assert torch.allclose(drawn.double(), expected, atol=1e-5)
    assert torch.allclose(plain.double(), asked, atol=1e-5)
    assert (full - asked).abs().max() > 1e-2


def test_products_are_in_bfloat16_where_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for quick, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(stages, "has_bfloat16", lambda given=quick: given)
        with fast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


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
