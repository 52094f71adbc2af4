"""The service as ``scripts/service`` runs it: Ray, two replicas of the miniature, callers over HTTP."""

import base64
import io
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux_lora.assembly import assemble
from flux_lora.inputs import EXTENDED
from flux_lora.request import Request
from flux_lora.settings import Settings
from tests.conftest import MINI, ROOT
from tests.server.conftest import SMALL, free_port, wait_for
from tests.service.test_backlog import merges
from tests.service.test_cog_api import contents, metrics

pytestmark = pytest.mark.service

LORAS = [f"loras/{name}.safetensors" for name in "abcde"]
QUICK = {**SMALL, "num_inference_steps": 1, "disable_safety_checker": True}
LONG = {"prompt": "a long one", "num_inference_steps": 50, "num_outputs": 4, "aspect_ratio": "21:9"}
START_SECONDS = 150


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    folder: Path
    client: httpx.Client
    """For many threads: a new one each time costs more than a small picture."""

    def draw(self, inputs: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.post("/predictions", json={"input": inputs}).json()
        return answer

    def replicas(self) -> list[psutil.Process]:
        """The processes that draw."""
        return self.actors("Drawing")

    def actors(self, deployment: str) -> list[psutil.Process]:
        """The processes of a deployment."""
        named = ((process, process.cmdline()) for process in psutil.Process(self.process.pid).children(recursive=True))
        return [process for process, line in named if line and f"flux-lora:{deployment}" in line[0]]

    def wait_until_whole(self, replicas: int = 2) -> None:
        wait_for(lambda: self.client.get("/health").json()["replicas"] == replicas, START_SECONDS)
        wait_for(lambda: len(self.replicas()) == replicas, 30)


def start(folder: Path, weights: Path, *options: str, **environment: str) -> Service:
    (folder / "tmp").mkdir()
    port = free_port()
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flux_lora.commands.service", "--port", str(port), *options],
            cwd=ROOT,
            env={
                **os.environ,
                "TMPDIR": str(folder / "tmp"),
                "FLUX_WEIGHTS": str(weights),
                "FLUX_ADAPTER_CACHE": str(folder / "cache"),
                "OMP_NUM_THREADS": str(torch.get_num_threads()),  # its number is in the pictures' records
                **environment,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    return Service(url, process, log, folder, httpx.Client(base_url=url, timeout=120))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature, with five LoRAs for requests."""
    copy = Path(shutil.copytree(MINI, tmp_path_factory.mktemp("equipped") / "weights"))
    tensors = load_file(copy / "lora.safetensors")
    (copy / "loras").mkdir()
    for k, name in enumerate(LORAS):
        save_file({key: tensor * (0.5 + k / 5) for key, tensor in tensors.items()}, copy / name)
    return copy


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[Service]:
    running = start(tmp_path_factory.mktemp("service"), weights, "--extended", FLUX_REPLICAS="2")
    try:
        wait_for(lambda: running.process.poll() is not None or b"Ready at" in running.log.read_bytes(), START_SECONDS)
        assert running.process.poll() is None, running.log.read_text()
        assert running.client.get("/health").status_code == 200  # at once: it is ready when it says so
        running.wait_until_whole()
        yield running
    finally:
        end(running)


def end(service: Service) -> None:
    """End it as Ctrl-C does, and see that nothing is left."""
    everyone = psutil.Process(service.process.pid).children(recursive=True) if service.process.poll() is None else []
    if service.process.poll() is None:
        os.killpg(service.process.pid, signal.SIGINT)
    try:
        assert service.process.wait(40) == 0
        wait_for(lambda: not [p for p in everyone if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 20)
        wait_for(lambda: not list((service.folder / "tmp").glob("f*")), 20)
    finally:
        for process in [p for p in everyone if p.is_running()]:
            process.kill()


@pytest.fixture(scope="module")
def reference(weights: Path) -> Any:
    """One generator, and nothing before it."""
    generator = assemble(Settings(weights=weights), log=lambda _: None)
    known: dict[str, list[bytes]] = {}

    def draw(inputs: dict[str, Any]) -> list[bytes]:
        key = repr(sorted(inputs.items()))
        if key not in known:
            known[key] = [path.read_bytes() for path in generator.draw(Request.parse(EXTENDED, **inputs))]
        return known[key]

    return draw


def load(requests: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"prompt": "a tomato", "seed": rng.randrange(4), "replicate_weights": rng.choice(LORAS), **QUICK}
        for _ in range(requests)
    ]


@pytest.mark.parametrize("requests", [80, pytest.param(200, marks=pytest.mark.slow)])
def test_a_load_of_many_loras(service: Service, reference: Any, requests: int) -> None:
    """Requests of 20 callers for 5 LoRAs: none lost, none doubled, all bytes right, few merges."""
    before, asked, ends = metrics(service.url), load(requests, seed=1), drawings(service)
    with ThreadPoolExecutor(20) as callers:
        answers = list(callers.map(service.draw, asked))
    after = metrics(service.url)
    assert [answer["status"] for answer in answers] == ["succeeded"] * requests
    assert len({answer["id"] for answer in answers}) == requests
    for inputs, answer in zip(asked, answers, strict=True):
        assert contents(answer) == reference(inputs)
    assert after["flux_lora_images_total"] - before["flux_lora_images_total"] == requests
    changes = after["flux_lora_merges_total"] - before["flux_lora_merges_total"]
    first_come = statistics.mean(merges(20, seed, 0, grouped=False, requests=requests) for seed in range(20))
    print(f"merges: {changes:.0f}; first come, first served: {first_come:.0f}")
    assert 2 * changes <= first_come
    wait_for(lambda: drawings(service) >= ends + requests)
    assert drawings(service) == ends + requests


def test_pictures_of_many_megabytes_pass(service: Service) -> None:
    """Noise, which no file format makes smaller, on the way there."""
    noise = random.Random(0).randbytes(3 * 2000 * 2000)
    file = io.BytesIO()
    Image.frombytes("RGB", (2000, 2000), noise).save(file, "PNG", compress_level=0)
    image = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    answer = service.draw({"prompt": "a tomato", "seed": 1, "image": image, **QUICK})
    assert answer["status"] == "succeeded", answer["error"]


def drawings(service: Service) -> int:
    """How many have ended, by what a replica then says."""
    return service.log.read_text().count("seconds: source")


def test_a_caller_who_hangs_up_ends_the_drawing(service: Service) -> None:
    before = metrics(service.url)["flux_lora_requests_totalcancelled"]
    for _ in range(3):  # one more than can be drawn: it waits
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{service.url}/predictions", json={"input": LONG}, timeout=0.3)
    wait_for(lambda: metrics(service.url)["flux_lora_requests_totalcancelled"] == before + 3, 10)
    state = service.client.get("/health").json()
    assert (state["waiting"], state["running"]) == (0, 0)


def test_ray_listens_on_loopback(service: Service) -> None:
    """But for one port of each actor, which Ray Serve has no setting for; it asks for the token."""
    family = psutil.Process(service.process.pid).children(recursive=True)
    listening = [c.laddr for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    outside = [at.port for at in listening if at.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")]
    assert len(listening) > 5
    assert len(outside) == 3
    token = service.replicas()[0].environ()["RAY_AUTH_TOKEN"]
    for port in outside:
        assert refusal(port) == refusal(port, "0" * len(token)) == grpc.StatusCode.UNAUTHENTICATED
        assert refusal(port, token) == grpc.StatusCode.UNKNOWN  # an empty call is none


def refusal(port: int, token: str = "") -> grpc.StatusCode:
    """How Ray Serve answers an empty call between replicas."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=20, metadata=metadata)
    code: grpc.StatusCode = refused.value.code()
    return code


def survives_kills(service: Service, reference: Any, times: int) -> None:
    """Kill a replica that draws, again and again, under a load of eight callers."""
    asked = [inputs | {"num_inference_steps": 20} for inputs in load(2, seed=2)] * 4
    before = metrics(service.url)["flux_lora_retries_total"]
    for _ in range(times):
        service.wait_until_whole()
        with ThreadPoolExecutor(8) as callers:
            answers = callers.map(service.draw, asked)
            wait_for(lambda: service.client.get("/health").json()["running"] == 2, 20)
            time.sleep(0.1)
            random.choice(service.replicas()).kill()
            for inputs, answer in zip(asked, answers, strict=True):
                assert answer["status"] == "succeeded", answer["error"]
                assert contents(answer) == reference(inputs)
    # One that is killed between two jobs loses none.
    assert metrics(service.url)["flux_lora_retries_total"] - before >= max(1, 0.8 * times)


def test_a_replica_that_is_killed_is_replaced_and_its_request_drawn_elsewhere(service: Service, reference: Any) -> None:
    survives_kills(service, reference, 1)


@pytest.mark.slow
def test_a_front_that_is_killed_answers_again_at_its_address(service: Service, reference: Any) -> None:
    (front,) = service.actors("Front")
    front.kill()
    front.wait(10)
    wait_for(lambda: service.actors("Front") not in ([], [front]) and is_up(service), START_SECONDS)
    inputs = {"prompt": "a tomato", "seed": 1, **QUICK}
    assert contents(service.draw(inputs)) == reference(inputs)


def is_up(service: Service) -> bool:
    try:
        return httpx.get(f"{service.url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_ten_kills(service: Service, reference: Any) -> None:
    survives_kills(service, reference, 10)
    service.wait_until_whole()


@pytest.mark.slow
def test_when_all_replicas_die_twice_the_caller_is_told(service: Service) -> None:
    with ThreadPoolExecutor(1) as caller:
        answer = caller.submit(service.draw, LONG)
        for _ in range(2):
            wait_for(lambda: service.client.get("/health").json()["running"] == 1, START_SECONDS)
            time.sleep(0.5)
            for replica in service.replicas():
                replica.kill()
            wait_for(lambda: service.client.get("/health").json()["running"] == 0, START_SECONDS)
        assert "died, and so did what tried it again" in answer.result()["error"]
    service.wait_until_whole()


@pytest.mark.slow
def test_nothing_outlives_a_command_that_is_killed(tmp_path: Path) -> None:
    running = start(tmp_path, MINI)
    wait_for(lambda: b"Ready at" in running.log.read_bytes(), START_SECONDS)
    everyone = psutil.Process(running.process.pid).children(recursive=True)
    running.process.kill()
    running.process.wait()
    wait_for(lambda: not [p for p in everyone if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 30)
    wait_for(lambda: not list((tmp_path / "tmp").glob("fl-ray-*")), 60)


@pytest.mark.slow
def test_what_cannot_be_set_up_is_said_in_one_sentence(tmp_path: Path) -> None:
    running = start(tmp_path, tmp_path / "none")
    assert running.process.wait(START_SECONDS) == 1
    said = running.log.read_text()
    assert re.search(r"^error: .*none", said, re.MULTILINE), said
    assert "Traceback" not in said
