"""Which addresses count as public, judged by Python's own registry, and which tokens count as tokens."""

import ipaddress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from flux_lora.errors import SettingsError
from flux_lora.settings import Settings
from flux_lora.sources import Sources, Tokens
from flux_lora.sources.guard import NOT_PUBLIC, is_public
from tests.sources.conftest import TOKENS

EDGES = [edge for network in NOT_PUBLIC for edge in (int(network[0]), int(network[-1]))]
NEAR_EDGES = st.builds(lambda edge, step: max(edge + step, 0), st.sampled_from(EDGES), st.integers(-2, 2))


@given(st.one_of(NEAR_EDGES, st.integers(0, 2**32 - 1), st.integers(0, 2**128 - 1)))
def test_only_addresses_in_public_use_are_public(number: int) -> None:
    address = ipaddress.ip_address(number)
    if is_public(address):
        assert address.is_global
        assert not any((address.is_multicast, address.is_private, address.is_reserved, address.is_unspecified))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "2a00::1"]
)
def test_addresses_in_public_use(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("token", ["two words", "line\r\nX-Header: 1", "naïve"])
def test_token_that_cannot_be_sent(name: str, token: str) -> None:
    given: dict[str, Any] = {name: SecretStr(token)}
    with pytest.raises(SettingsError, match=f"^{name.upper()} holds characters that no token has") as refused:
        Tokens(**given)
    assert token not in str(refused.value)


def test_tokens_from_settings_are_trimmed_and_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, token in TOKENS.items():
        monkeypatch.setenv(name.upper(), f"{token}\n")
    monkeypatch.setenv("FLUX_ADAPTER_CACHE", str(tmp_path))
    settings = Settings.from_environment()
    tokens = Tokens.from_settings(settings)
    assert tokens.for_host("huggingface.co") == TOKENS["hf_token"]
    assert tokens.for_host("www.huggingface.co") == tokens.for_host("example.com") == ""
    assert not any(token in f"{tokens!r}{vars(Sources.from_settings(settings))}" for token in TOKENS.values())
