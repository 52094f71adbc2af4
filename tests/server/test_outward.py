"""Whom the server talks to: nobody."""

import subprocess
import sys
import time
from pathlib import Path

from tests.server.conftest import SMALL, TRACE, Server, outward, wait_for

LOOK_UP = "import ctypes; ctypes.CDLL(None).getaddrinfo(b'name.example', b'443', None, ctypes.byref(ctypes.c_void_p()))"


def test_nothing_outward_is_opened(server: Server) -> None:
    """By any process of it since it started, set-up included; onnxruntime's telemetry would begin within 15 seconds."""
    trace = server.folder / "trace"
    assert trace.exists(), "install strace: this test has to see native code"
    server.draw(prompt="a tomato", seed=7, **SMALL)
    time.sleep(max(0, server.started + 20 - time.monotonic()))
    assert server.outward() == []
    assert "AF_INET" in trace.read_text(errors="replace")  # the watch's own requests to /health-check
    assert list((server.folder / "home").rglob("deviceid")) == []


def test_the_trace_sees_native_code(tmp_path: Path) -> None:
    subprocess.run([*TRACE, tmp_path / "trace", sys.executable, "-S", "-c", LOOK_UP], check=True)
    wait_for(lambda: "exited" in (tmp_path / "trace").read_text())
    assert outward(tmp_path / "trace")
