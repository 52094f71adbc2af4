import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import _muon

from training import loop
from training.loop import has_bfloat16, train


def build() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def run(directory: Path, stop_at: int | None = None) -> dict[str, Tensor]:
        module, calls = build(), iter(range(1000))

        def loss(rng: random.Random) -> Tensor:
            if next(calls) == stop_at:
                raise KeyboardInterrupt
            loss: Tensor = (module(torch.randn(8, 4)) - rng.random()).square().mean()
            return loss

        return train("run", module, loss, steps=20, rate=0.1, directory=directory, every=5)

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    expected = run(tmp_path / "whole")
    try:
        run(tmp_path / "parts", stop_at=13)
    except KeyboardInterrupt:
        assert torch.load(tmp_path / "parts" / "run.pt")["step"] == 10
    actual = run(tmp_path / "parts")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert not torch.equal(expected["weight"], build().weight)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_what_was_learned(tmp_path: Path) -> None:
    module, steps = build(), iter(range(1000))

    def loss(_: random.Random) -> Tensor:
        value: Tensor = module(torch.randn(8, 4)).square().mean()
        return value * (float("nan") if next(steps) == 7 else 1)

    with pytest.raises(FloatingPointError, match="the loss of step 7 is nan"):
        train("run", module, loss, steps=20, rate=0.1, directory=tmp_path, every=5)
    kept = torch.load(tmp_path / "run.pt")
    assert kept["step"] == 5
    assert all(value.isfinite().all() for value in kept["weights"].values())


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_without_bfloat16_muon_makes_matrices_orthogonal_in_their_own_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shape: tuple[int, int]
) -> None:
    own = _muon._zeropower_via_newtonschulz  # noqa: SLF001 - what training replaces, so that it comes back
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", own)
    monkeypatch.setattr(loop, "has_bfloat16", lambda: False)
    torch.manual_seed(0)
    layer = nn.Linear(*shape)
    module = nn.ModuleDict({"blocks": nn.ModuleList([layer])})
    weight = layer.weight
    before, target = weight.detach().clone(), torch.randn_like(weight)

    def loss(_: random.Random) -> Tensor:
        value: Tensor = (weight * target).sum() / target.norm()
        return value

    train("run", module, loss, steps=1, rate=1.0, directory=tmp_path)
    u, s, v = torch.linalg.svd(target.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5  # https://kellerjordan.github.io/posts/muon/
    step = before - weight.detach()
    expected = (u * s) @ v
    assert torch.allclose(step / step.norm(), (expected / expected.norm()).float(), atol=1e-6)


def test_bfloat16_is_used_where_the_cpu_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (({"avx512_bf16": True}, True), ({"avx512_bf16": False}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda given=capabilities: given)
        assert has_bfloat16() == expected
