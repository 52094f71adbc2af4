import random
from pathlib import Path

import torch
from torch import Tensor, nn

from training.loop import train


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def run(directory: Path, stop_at: int | None = None) -> dict[str, Tensor]:
        module, calls = build(), iter(range(1000))

        def loss(rng: random.Random) -> Tensor:
            if next(calls) == stop_at:
                raise KeyboardInterrupt
            return (module(torch.randn(8, 4)) - rng.random()).square().mean()

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
