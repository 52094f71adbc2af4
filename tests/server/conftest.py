"""A real Cog server, started as ``scripts/serve`` starts it, and a client for it."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.conftest import MINI, ROOT

TRACE = ["strace", "-D", "-f", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o"]
"""Runs a command and writes down whom its processes talk to, native code included, which Python's hooks do not see."""

ADDRESS = re.compile(r"sin6?_port=htons\((\d+)\).*?(?:inet_addr\(|inet_pton\(AF_INET6, )\"([^\"]+)\"")
DNS = 53

CLIENT = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=120)
"""For all threads: `httpx.get` reads every certificate anew, which takes longer than a small picture's step."""

SMALL = {"aspect_ratio": "custom", "width": 256, "height": 256, "num_inference_steps": 2}


@dataclass(frozen=True)
class Server:
    """A running server: its address, and its folder, with ``tmp`` and ``home`` in it."""

    url: str
    folder: Path
    started: float
    """By ``time.monotonic``."""

    @property
    def temporary(self) -> Path:
        """Its temporary directory."""
        return self.folder / "tmp"

    def outward(self) -> list[str]:
        """The connections and messages to other machines, and the look-ups of names, since it was started."""
        return outward(self.folder / "trace")

    def post(self, body: str) -> httpx.Response:
        """The answer to a request; Cog answers the one before a little before its only slot is free again."""
        for _ in range(100):
            headers = {"Content-Type": "application/json"}
            response = CLIENT.post(f"{self.url}/predictions", content=body, headers=headers)
            if response.status_code != 409:
                break
            time.sleep(0.1)
        return response

    def predict(self, **inputs: Any) -> dict[str, Any]:
        """The answer to a valid request."""
        response = self.post(json.dumps({"input": inputs}))
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def draw(self, **inputs: Any) -> list[bytes]:
        """The files of a request that must succeed."""
        answer = self.predict(**inputs)
        assert answer["status"] == "succeeded", answer
        return [content(uri) for uri in answer["output"]]

    def leftovers(self) -> list[Path]:
        """Files of predictions that are on the disk now."""
        return [path for path in self.temporary.rglob("*-seed*") if path.is_file()]


def content(uri: str) -> bytes:
    head, _, data = uri.partition(",")
    assert head.endswith(";base64")
    return base64.b64decode(data)


def open_image(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def outward(trace: Path) -> list[str]:
    """Which lines of a trace go to another machine, or to a name server, wherever that is."""
    found = ((line, ADDRESS.search(line)) for line in trace.read_text(errors="replace").splitlines())
    return [line for line, at in found if at and (int(at[1]) == DNS or not ip_address(at[2]).is_loopback)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def serving(
    folder: Path, *options: str, prelude: str = "", traced: bool = False, **environment: str
) -> Iterator[Server]:
    port = free_port()
    for name in ("tmp", "home"):
        (folder / name).mkdir()
    (folder / "sitecustomize.py").write_text(f"import os\n{prelude}")
    command = [sys.executable, "-m", "flux_lora.commands.serve", "--port", str(port), *options]
    process = subprocess.Popen(
        [*TRACE, str(folder / "trace"), *command] if traced else command,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
            "TMPDIR": str(folder / "tmp"),
            "HOME": str(folder / "home"),
            "FLUX_WEIGHTS": str(MINI),
            "FLUX_ADAPTER_CACHE": str(folder / "cache"),
            **environment,
        },
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    server = Server(f"http://127.0.0.1:{port}", folder, time.monotonic())
    try:
        wait_for(lambda: process.poll() is not None or health(server) == "READY", 240)  # some compile
        assert process.poll() is None, "the server ended during set-up"
        yield server
    finally:
        process.terminate()
        process.wait(30)


def health(server: Server) -> str:
    try:
        return str(CLIENT.get(f"{server.url}/health-check").json()["status"])
    except httpx.TransportError:
        return "no answer"


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    traced = shutil.which(TRACE[0]) is not None
    with serving(tmp_path_factory.mktemp("server"), traced=traced) as running:
        yield running


@pytest.fixture(scope="session")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes the extended inputs."""
    with serving(tmp_path_factory.mktemp("extended"), "--extended") as running:
        yield running
