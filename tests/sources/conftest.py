"""The local internet, a LoRA file to fetch from it, and the client under test on an empty cache."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from safetensors.numpy import save

from flux_lora.sources import Network, Sources, Tokens
from tests.sources.internet import Internet

MAX_BYTES = 200_000
TOKENS = {"hf_token": "hf_secretsecret", "civitai_token": "civ-secretsecret", "replicate_api_token": "r8_secretsecret"}
GIVEN: dict[str, Any] = {name: SecretStr(token) for name, token in TOKENS.items()}


@pytest.fixture(scope="session")
def _internet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Internet]:
    with Internet(tmp_path_factory.mktemp("ca") / "ca.pem").running() as running:
        yield running


@pytest.fixture
def internet(_internet: Internet) -> Internet:
    _internet.reset()
    return _internet


@pytest.fixture(scope="session")
def lora() -> bytes:
    """A safetensors file of about 40 kB."""
    return save({"a": np.arange(10_000, dtype=np.float32)}, {"made": "here"})


@pytest.fixture(scope="session")
def other_lora() -> bytes:
    return save({"b": np.arange(10_000, dtype=np.float32)})


@pytest.fixture
def make_sources(internet: Internet, tmp_path: Path) -> Callable[..., Sources]:
    def make(
        tokens: bool = True,
        max_bytes: int = MAX_BYTES,
        cache_bytes: int = 10**9,
        network: Network | None = None,
        requests: dict[str, Any] | None = None,
        **patience: float,
    ) -> Sources:
        return Sources(
            cache=tmp_path / "cache",
            cache_bytes=cache_bytes,
            max_bytes=max_bytes,
            tokens=Tokens(**GIVEN) if tokens else Tokens(),
            network=network or internet.network(**patience),
            **requests or {},
        )

    return make


@pytest.fixture
def sources(make_sources: Callable[..., Sources]) -> Sources:
    return make_sources()
