from functools import cache

import pytest
import torch
from torch import Tensor

from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from training import album, batches, paths, stages
from training.networks import AUTOENCODER


@cache
def cats() -> tuple[album.Album, Tensor]:
    """An album of one thing, and the state of PyTorch's random numbers after it was made."""
    torch.manual_seed(0)
    autoencoder = PatchAutoencoder(**AUTOENCODER)
    weight = autoencoder.analysis.weight.detach()
    return album.Album({"cat": album.encode(weight, "cat")}, autoencoder), torch.get_rng_state()


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> album.Album:
    """An album of one thing, for small batches and networks that are not compiled."""
    monkeypatch.setattr(stages, "compiled", lambda network: network)
    monkeypatch.setattr(batches, "THINGS", ("cat",))
    for module in (batches, paths):
        monkeypatch.setattr(module, "BATCH", dict.fromkeys(batches.BATCH, 2))
    made, state = cats()
    torch.set_rng_state(state)
    return made
