"""What one request may cost, and what its text may do: over HTTP."""

import re
import time

import pytest

from tests.server.conftest import CLIENT, SMALL, Server, health, wait_for

WITNESS = {"prompt": "a witness", "seed": 7, **SMALL, "num_inference_steps": 1}
PROGRESS = re.compile(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)\/(\d+)")
"""As the official clients look for it, in each line from the last one upward."""


@pytest.mark.parametrize("piece", ["a", " ", "& ", "\u200b", "🍅", "word "])
def test_a_prompt_beyond_the_limit_is_refused_with_the_number(server: Server, piece: str) -> None:
    before = server.draw(**WITNESS)
    answer = server.predict(**WITNESS | {"prompt": (piece * 1_000_000)[:1_000_000]})
    assert answer["status"] == "failed"
    assert answer["error"].endswith(
        "prompt has 1,000,000 characters, and this server reads at most 100,000: shorten it."
    )
    assert server.draw(**WITNESS) == before


@pytest.mark.parametrize(
    "piece", ["a", "data:image/png;base64,iVBORw0KGgo+/AAANSUhEUgAAB", "& ", "红色的番茄在蓝色背景上，"]
)
def test_a_prompt_as_long_as_the_limit_is_drawn_and_comes_back_not_many_times(server: Server, piece: str) -> None:
    prompt = (piece * 100_000)[:100_000]
    answer = server.predict(**WITNESS | {"prompt": prompt})
    assert answer["status"] == "succeeded"
    assert sum(map(len, answer["output"])) < 16 * len(prompt.encode()) + 100_000
    assert len(answer["logs"]) < 5_000


def test_a_prompt_of_one_word_is_cancelled_at_once(server: Server) -> None:
    before = server.draw(**WITNESS)
    wait_for(lambda: health(server) == "READY")
    inputs = WITNESS | {"prompt": "a" * 100_000, "num_inference_steps": 50, "num_outputs": 4, "width": 1440}
    address = f"{server.url}/predictions/one-word"
    CLIENT.put(address, json={"input": inputs}, headers={"Prefer": "respond-async"}).raise_for_status()
    time.sleep(0.2)
    CLIENT.post(f"{address}/cancel").raise_for_status()
    wait_for(lambda: health(server) == "READY", 10)
    assert server.draw(**WITNESS) == before


def test_clients_find_the_progress_in_the_log(server: Server) -> None:
    logs = server.predict(**WITNESS | {"num_inference_steps": 5, "num_outputs": 2})["logs"]
    found = [found for line in logs.splitlines() if (found := PROGRESS.match(line))]
    assert found[-1].groups() == ("100", "5", "5")
    assert "\r" not in logs
    assert all(line.isprintable() for line in logs.splitlines())


@pytest.mark.parametrize("source", ["\x1b]0;owned\x07\x1b[2Jx.safetensors", "a\nready in 0 s.safetensors", "\u202ex"])
def test_what_a_caller_names_steers_no_terminal(server: Server, source: str) -> None:
    answer = server.predict(**WITNESS, replicate_weights=source)
    assert answer["status"] == "failed"
    assert answer["error"].isprintable()
