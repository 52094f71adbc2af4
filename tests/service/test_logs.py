"""The log: one line each, whoever writes; and the id that ties a request's lines together."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from flux_lora.service.logs import Log
from tests.server.conftest import SMALL
from tests.service.local import LocalReplica, local_front, serving

WITNESS = {"prompt": "a secret tomato", "seed": 7, **SMALL}


def test_lines_of_many_writers_stay_whole(tmp_path: Path) -> None:
    pipe = tmp_path / "log"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    log = Log(json=True, pipe=pipe)
    texts = [f"{k} " + "ü" * 1500 for k in range(16)]
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(log, texts))
    lines = os.read(descriptor, 2**16).decode().splitlines()
    os.close(descriptor)
    assert sorted(json.loads(line)["message"] for line in lines) == sorted(texts)


def test_nobody_waits_for_a_reader(tmp_path: Path) -> None:
    pipe = tmp_path / "log"
    os.mkfifo(pipe)
    Log(pipe=pipe)("nobody reads this")
    descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    for _ in range(100):
        Log(pipe=pipe)("x" * 2000)  # more than a pipe holds
    os.close(descriptor)


def test_a_line_is_one_line_and_keeps_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    Log()("first\nsecond\x1b[31m", replica="r1")
    Log()("beginning" + "." * 5000 + "end")
    Log(json=True)("first\nsecond", request="q1")
    one, long, record = capsys.readouterr().out.splitlines()
    assert one == r"r1: first\nsecond\x1b[31m"
    assert long.endswith(".end")
    assert len(long) < 2100
    assert json.loads(record)["request"] == "q1"
    assert json.loads(record)["message"] == "first\nsecond"


def test_an_id_ties_the_lines_of_a_request_together(replica: LocalReplica, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(local_front([replica], log=Log(json=True)), ("a-key-of-sixteen-letters",)) as address:
        headers = {"Authorization": "Bearer a-key-of-sixteen-letters"}
        answer = httpx.post(f"{address}/predictions", json={"input": WITNESS}, headers=headers, timeout=60)
        assert httpx.get(f"{address}/health").status_code == 200
        assert httpx.get(f"{address}/predictions/any").status_code == 401
    output = capfd.readouterr().out
    assert "secret" not in output
    assert "a-key" not in output
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    mine = [record for record in records if record["request"] == answer.headers["x-request-id"]]
    assert [record["message"].split(" in ")[0] for record in mine] == ["finished", "POST /predictions 200"]
    assert mine[0]["drew"] > 0
    assert len(mine[0]["owner"]) == 16
    assert [record["message"][:28] for record in records if record not in mine] == ["GET /predictions/any 401 in "]
