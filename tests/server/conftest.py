"""A real Cog server, started as ``scripts/serve`` starts it, and a client for it."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.conftest import MINI, ROOT

AUDIT = """
import os, sys
def _write(line):
    with open(os.environ["CONNECTIONS"], "a") as file:
        file.write(line + "\\n")
def _note(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        _write(f"connect {arguments[1][0]}")
    elif event == "socket.getaddrinfo":
        _write(f"resolve {arguments[0]}")
sys.addaudithook(_note)
_write("watching")
"""
"""Run by every Python of the server as its ``sitecustomize``: writes down each connection and name look-up."""

SMALL = {"aspect_ratio": "custom", "width": 256, "height": 256, "num_inference_steps": 2}


@dataclass(frozen=True)
class Server:
    """A running server: its address, its temporary directory, and where its connections are written down."""

    url: str
    temporary: Path
    connections: Path

    def post(self, body: str) -> httpx.Response:
        """The answer to a request; Cog answers the one before a little before its only slot is free again."""
        for _ in range(100):
            headers = {"Content-Type": "application/json"}
            response = httpx.post(f"{self.url}/predictions", content=body, headers=headers, timeout=120)
            if response.status_code != 409:
                break
            time.sleep(0.1)
        return response

    def predict(self, **inputs: Any) -> dict[str, Any]:
        """The answer to a valid request."""
        response = self.post(json.dumps({"input": inputs}))
        assert response.status_code == 200, response.text
        return response.json()

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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(folder: Path, *options: str, prelude: str = "", **environment: str) -> Iterator[Server]:
    port, temporary, connections = free_port(), folder / "tmp", folder / "connections"
    temporary.mkdir()
    (folder / "sitecustomize.py").write_text(AUDIT + prelude)
    process = subprocess.Popen(
        [sys.executable, "-m", "flux_lora.commands.serve", "--port", str(port), *options],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
            "TMPDIR": str(temporary),
            "CONNECTIONS": str(connections),
            "FLUX_WEIGHTS": str(MINI),
            "FLUX_ADAPTER_CACHE": str(folder / "cache"),
            **environment,
        },
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    server = Server(f"http://127.0.0.1:{port}", temporary, connections)
    try:
        wait_for(lambda: process.poll() is not None or health(server) == "READY", 240)  # some compile
        assert process.poll() is None, "the server ended during set-up"
        yield server
    finally:
        process.terminate()
        process.wait(30)


def health(server: Server) -> str:
    try:
        return httpx.get(f"{server.url}/health-check").json()["status"]
    except httpx.TransportError:
        return "no answer"


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running
