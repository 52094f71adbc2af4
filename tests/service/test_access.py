"""Who may ask, over HTTP."""

import socket
from collections.abc import Iterator

import httpx
import pytest

from flux_lora.errors import SettingsError
from flux_lora.service.access import is_loopback, keys_of
from flux_lora.settings import Settings
from tests.server.conftest import SMALL
from tests.service.local import LocalReplica, local_front, serving

KEYS = ("key-of-one-0123456789", "key-of-two-0123456789")
ONE, TWO = ({"Authorization": f"Bearer {key}"} for key in KEYS)
WITNESS = {"prompt": "a tomato", "seed": 7, **SMALL}


@pytest.fixture(scope="module")
def locked(replica: LocalReplica) -> Iterator[str]:
    with serving(local_front([replica]), KEYS) as address:
        yield address


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEYS[0]}, {"Authorization": "Basic eDp5"},
               {"Authorization": f"Bearer {KEYS[0]}x"}, {"Authorization": "Bearer schlüssel"}]
)  # fmt: skip
def test_without_a_key_nothing_is_drawn_or_told(locked: str, header: dict[str, str]) -> None:
    given = [(name.encode(), value.encode("latin-1")) for name, value in header.items()]
    for path in ("/predictions/any", "/v1/predictions", "/metrics", "/files/any/0.webp", "/nothing"):
        assert httpx.get(locked + path, headers=given).status_code == 401
    refusal = httpx.post(f"{locked}/predictions", json={"input": WITNESS}, headers=given)
    assert refusal.status_code == 401
    assert refusal.headers["www-authenticate"] == "Bearer"
    assert "Authorization: Bearer" in refusal.json()["detail"]


def test_what_tells_nothing_needs_no_key(locked: str) -> None:
    for path in ("/health", "/health-check", "/docs", "/openapi.json"):
        assert httpx.get(locked + path).status_code == 200


def test_a_prediction_and_its_files_are_for_its_key_alone(locked: str) -> None:
    mine = httpx.post(f"{locked}/v1/predictions", json={"input": WITNESS, "id": "same"},
                      headers=ONE | {"Prefer": "wait"}, timeout=60).json()  # fmt: skip
    assert mine["status"] == "succeeded"
    listed = httpx.get(f"{locked}/v1/predictions", headers=ONE).json()["results"]
    (file,) = listed[0]["output"]
    assert httpx.get(file, headers=ONE).headers["content-type"] == "image/webp"
    for path in (file, f"{locked}/predictions/same", f"{locked}/v1/predictions/same"):
        assert httpx.get(path, headers=TWO).status_code == 404
        assert httpx.get(path).status_code == 401
    assert httpx.post(f"{locked}/predictions/same/cancel", headers=TWO).status_code == 404
    assert httpx.get(f"{locked}/v1/predictions", headers=TWO).json()["results"] == []
    theirs = httpx.put(f"{locked}/predictions/same", json={"input": WITNESS | {"seed": 8}}, headers=TWO, timeout=60)
    assert theirs.json()["output"] != mine["output"]


def test_each_key_has_a_share_of_the_queue(replica: LocalReplica) -> None:
    with serving(local_front([replica], limit_per_owner=1), KEYS) as address:

        def ask(key: dict[str, str]) -> httpx.Response:
            body = {"input": WITNESS | {"num_inference_steps": 50, "num_outputs": 4}}
            return httpx.post(f"{address}/predictions", json=body, headers=key | {"Prefer": "respond-async"})

        assert [ask(ONE).status_code for _ in range(3)] == [202, 202, 503]
        other = ask(TWO)
        assert other.status_code == 202
        assert "You have as many" in ask(ONE).json()["detail"]
        for key in (ONE, TWO):
            for prediction in httpx.get(f"{address}/v1/predictions", headers=key).json()["results"]:
                httpx.post(f"{address}/predictions/{prediction['id']}/cancel", headers=key)


@pytest.mark.parametrize("host", ["evil.example.com", "evil.example.com:8000", "10.0.0.7", "", "[", "127.0.0.1.nip.io"])
def test_on_loopback_another_name_is_refused(address: str, host: str) -> None:
    """DNS rebinding: a page of evil.example.com, whose name now leads to 127.0.0.1, asks as its own origin."""
    assert httpx.get(f"{address}/predictions/any", headers={"Host": host}).status_code == 403
    assert httpx.get(f"{address}/health", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["https://evil.example.com", "null", "http://127.0.0.1:1", "http://localhost"])
def test_on_loopback_pages_of_others_are_refused(address: str, origin: str) -> None:
    assert httpx.post(f"{address}/predictions", json={}, headers={"Origin": origin}).status_code == 403


def test_on_loopback_its_own_page_may_ask(address: str) -> None:
    port = address.rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        assert httpx.post(f"{address}/predictions", json={"input": {}}, headers=headers).status_code == 422


def test_no_other_site_may_read_answers(address: str) -> None:
    answer = httpx.options(f"{address}/predictions", headers={"Access-Control-Request-Method": "POST"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_body_is_refused_by_its_length(address: str) -> None:
    host = address.removeprefix("http://")
    name, _, port = host.partition(":")
    with socket.create_connection((name, int(port)), timeout=10) as connection:
        head = f"POST /predictions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {101 * 2**20}\r\n\r\n"
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(100)
    assert httpx.post(f"{address}/predictions", content=iter([b"{}"])).status_code == 411


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost", "127.9.9.9"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "127.0.0.1.nip.io", ""])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_another_address_needs_keys_or_a_word() -> None:
    assert keys_of(Settings(), "127.0.0.1", open_to_all=False) == ()
    assert keys_of(Settings(), "0.0.0.0", open_to_all=True) == ()
    assert keys_of(Settings(api_keys=" , ".join(KEYS)), "0.0.0.0", open_to_all=False) == KEYS
    with pytest.raises(SettingsError, match=r"FLUX_API_KEYS, or say --open"):
        keys_of(Settings(), "0.0.0.0", open_to_all=False)
    for bad in ("short", f"{KEYS[0]},short", "with a blank in it 123", "schlüssel-schlüssel"):
        with pytest.raises(SettingsError, match="FLUX_API_KEYS holds a key"):
            keys_of(Settings(api_keys=bad), "127.0.0.1", open_to_all=False)
