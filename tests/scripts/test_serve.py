"""Cog's real server with a predictor that fails in every way a predictor can."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from flux_lora.commands import PROJECT
from flux_lora.commands import serve as serve_command
from flux_lora.commands.serving import folder as cogs_folder

PREDICTOR = """
import contextlib, os, sys, time
from cog import BaseRunner, Input

mode = os.environ.get("DUMMY", "")
if mode == "import":
    import a_module_that_does_not_exist

class Predictor(BaseRunner):
    def setup(self, weights=None):
        from flux_lora.errors import WeightsError
        if mode == "refuse":
            raise WeightsError("There are no base weights.")
        if mode == "bug":
            raise TypeError("not this")
        if mode == "exit":
            os._exit(3)
        if mode == "wait":
            time.sleep(60)

    def run(self, prompt: str = Input(default="x")) -> str:
        print("drawing with", os.environ["FLUX_WEIGHTS"])
        if prompt == "exit":
            os._exit(9)
        if prompt == "refuse":
            raise ValueError("not that")
        if prompt == "sleep":
            time.sleep(60)
        if prompt == "deaf":
            end = time.monotonic() + 60
            while time.monotonic() < end:
                with contextlib.suppress(BaseException):
                    time.sleep(60)
        if prompt == "escape":
            print("\\x1b[31mred\\x07")
        return prompt
"""

SCHEMA = """{"openapi": "3.0.2", "info": {"title": "Cog", "version": "0.1.0"}, "paths": {}, "components": {"schemas": {
  "Input": {"type": "object", "title": "Input", "properties": {"prompt": {"type": "string", "title": "Prompt"}}},
  "Output": {"type": "string", "title": "Output"}}}}"""


class Serve:
    """``scripts/serve`` of a project, with what it has printed so far."""

    def __init__(
        self, project: Path, *arguments: str, prefix: Sequence[str] = (), cwd: Path | None = None, **environment: str
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "flux_lora.commands.serve", "--port", str(self.port), *arguments],
            cwd=cwd or project,
            env={name: value for name, value in os.environ.items() if not name.startswith("FLUX_")} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout or ()))
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            assert self.process.poll() is None, self.output
            time.sleep(0.05)

    def below(self) -> list[psutil.Process]:
        """The server and its worker."""
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def worker(self) -> psutil.Process:
        (server,) = psutil.Process(self.process.pid).children()
        (worker,) = server.children()
        return worker

    def predict(self, prompt: object, name: str = "") -> httpx2.Response:
        """The answer; Cog answers the request before a little before its slot is free again."""
        body = {"input": {"prompt": prompt}} | ({"id": name} if name else {})
        for _ in range(100):
            answer = httpx2.post(f"{self.url}/predictions", json=body, timeout=30)
            if answer.status_code != 409:
                break
            time.sleep(0.05)
        return answer

    def ended(self) -> int:
        """The exit status, once nothing more is printed."""
        status = self.process.wait(timeout=30)
        self._reader.join()
        return status


def wait_until_gone(processes: list[psutil.Process]) -> None:
    """Killed processes of others may stay behind as zombies for a moment, until they are reaped."""
    deadline = time.monotonic() + 5
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that is ours but for the predictor."""
    shutil.copytree(PROJECT / "flux_lora", tmp_path / "flux_lora", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "weights" / "mini").mkdir(parents=True)
    (tmp_path / "predict.py").write_text(PREDICTOR)
    (tmp_path / "openapi.json").write_text(SCHEMA)
    return tmp_path


Start = Callable[..., Serve]


@pytest.fixture
def serve(project: Path) -> Iterator[Start]:
    started = []

    def start(*arguments: str, **how: Any) -> Serve:
        started.append(Serve(project, *arguments, **how))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.terminate()
        served.ended()


def test_serves_with_the_schema_and_shows_what_the_model_prints(serve: Start, project: Path) -> None:
    server = serve()
    server.wait_for(f"Ready at {server.url}")
    server.wait_for(f"curl -s {server.url}/predictions")
    assert server.predict("a tomato").json()["output"] == "a tomato"
    assert server.predict(7).status_code == 422
    assert server.predict("refuse").json()["status"] == "failed"
    server.wait_for(f"drawing with {project}/weights/mini")
    server.wait_for("prediction failed: ValueError: not that")
    assert '"level"' not in server.output
    assert server.output.count("No base weights yet") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_its_worker(serve: Start, number: signal.Signals) -> None:
    server = serve()
    server.wait_for("Ready")
    below = server.below()
    assert len(below) == 2
    server.process.send_signal(number)
    assert server.ended() == 0
    wait_until_gone(below)
    assert "Traceback" not in server.output


@pytest.mark.parametrize("drawing", ["", "deaf"])
def test_killing_the_command_ends_the_server_and_its_worker(serve: Start, drawing: str) -> None:
    """A prediction that runs does not keep them, and neither does one that no signal reaches."""
    server = serve()
    server.wait_for("Ready")
    if drawing:
        body = {"input": {"prompt": drawing}}
        httpx2.put(f"{server.url}/predictions/a", json=body, headers={"Prefer": "respond-async"})
        server.wait_for("drawing with")
    below = server.below()
    server.process.kill()
    wait_until_gone(below)


@pytest.fixture
def hangup() -> Iterator[None]:
    """What is started knows nothing of a `nohup` that these tests may run under."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, inherited)


@pytest.mark.usefixtures("hangup")
def test_a_terminal_that_closes_ends_it_but_not_under_nohup(serve: Start) -> None:
    server, kept = serve(), serve(prefix=["nohup"])
    for each in (server, kept):
        each.wait_for("Ready")
        each.process.send_signal(signal.SIGHUP)
    assert server.ended() == 0
    assert kept.predict("a tomato").status_code == 200
    assert kept.process.poll() is None


def test_a_lost_slot_comes_back_and_what_cog_keeps_of_predictions_goes(serve: Start) -> None:
    """An id that is too long for a folder's name costs Cog its only slot."""
    server = serve()
    server.wait_for("Ready")
    made = [server.predict("a tomato").json()["id"] for _ in range(3)]
    wait_until(lambda: left(made) == made[-1:], server)  # Cog may still read the last one's
    worker = server.worker()
    assert server.predict("a tomato", name="x" * 300).json()["status"] == "failed"
    server.wait_for("started again: PermitInUse dropped")
    wait_until_gone([worker])
    wait_until(lambda: server.output.count("Ready at") == 2, server)
    assert server.predict("a tomato").json()["output"] == "a tomato"
    server.process.terminate()
    assert server.ended() == 0
    assert left(made) == []


def left(predictions: list[str]) -> list[str]:
    return [name for name in predictions if (cogs_folder.PREDICTIONS / name).exists()]


def wait_until(condition: Callable[[], bool], server: Serve) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, server.output
        time.sleep(0.05)


def test_a_call_for_shutdown_is_named(serve: Start) -> None:
    server = serve()
    server.wait_for("Ready")
    httpx2.post(f"{server.url}/shutdown")
    assert server.ended() == 1
    assert server.output.endswith("error: Cog's server has ended because somebody has called POST /shutdown.\n")


def test_nothing_in_the_log_steers_a_terminal(serve: Start) -> None:
    server = serve()
    server.wait_for("Ready")
    server.predict("escape")
    server.wait_for("\\x1b[31mred\\x07")
    assert "\x1b" not in server.output


def test_beyond_loopback_it_says_whom_it_is_for(serve: Start) -> None:
    server = serve("--host", "0.0.0.0")
    server.wait_for("for callers who are trusted")
    server.wait_for("Ready at http://127.0.0.1:")


def test_a_project_that_cannot_be_written_to_is_served(serve: Start, project: Path) -> None:
    """Everything that is written lies elsewhere."""
    server = serve(prefix=read_only(project))
    server.wait_for("Ready")
    assert server.predict("a tomato").json()["output"] == "a tomato"
    assert server.predict(7).status_code == 422


def test_a_folder_of_cogs_that_cannot_be_written_to_is_refused_at_once(serve: Start) -> None:
    cogs_folder.require()
    server = serve(prefix=read_only(cogs_folder.PREDICTIONS.parent))
    assert server.ended() == 1
    assert server.output == (
        "error: Cog's server keeps each prediction in /tmp/coglet/predictions, which cannot be used: Read-only file "
        "system. Every picture would fail: remove that folder, or make room there.\n"
    )


def test_a_folder_of_cogs_without_room_is_refused_at_once(serve: Start) -> None:
    cogs_folder.require()
    server = serve(prefix=in_mounts("mount -t tmpfs -o size=1m,nr_inodes=2 tmpfs /tmp/coglet"))
    assert server.ended() == 1
    assert "No space left on device. Every picture would fail" in server.output


@pytest.mark.parametrize("what", ["user", "link"])
def test_a_folder_of_cogs_that_is_anothers_is_refused_at_once(serve: Start, what: str) -> None:
    cogs_folder.require()
    keeping = f"mount --bind {PROJECT} /mnt && mount -t tmpfs tmpfs /tmp && mkdir -p {PROJECT}"  # it may lie in /tmp
    link = f"{keeping} && mount --bind /mnt {PROJECT} && mkdir /tmp/real && ln -s /tmp/real /tmp/coglet"
    command = {"user": "mount -t tmpfs -o uid=12345 tmpfs /tmp/coglet", "link": link}[what]
    server = serve(prefix=in_mounts(command), cwd=PROJECT)  # the other project lies in /tmp
    assert server.ended() == 1
    assert "error: Cog's server keeps each prediction in /tmp/coglet, which cannot be used: it " in server.output


def in_mounts(command: str) -> list[str]:
    """Run in mounts of its own, after this shell command; CI is root."""
    if subprocess.run(["unshare", "--mount", "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounts of its own need a user who may mount")
    return ["unshare", "--mount", "/bin/sh", "-c", f'{command} && exec "$@"', "sh"]


def read_only(path: Path) -> list[str]:
    return in_mounts(f"mount --bind {path} {path} && mount -o remount,bind,ro {path}")


def test_a_signal_ends_a_set_up_that_hangs(serve: Start) -> None:
    server = serve(DUMMY="wait")
    while len(server.below()) < 2:
        time.sleep(0.05)
    below = server.below()
    server.process.terminate()
    assert server.ended() == 0
    wait_until_gone(below)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("refuse", "error: There are no base weights.\n"),
        ("bug", "error: TypeError: not this\n"),
        (
            "import",
            "error: failed to load predictor: ModuleNotFoundError: No module named 'a_module_that_does_not_exist'\n",
        ),
        ("exit", "error: The process that draws died during set-up, perhaps killed for want of memory.\n"),
    ],
)
def test_a_set_up_that_fails_ends_it_with_the_reason(serve: Start, mode: str, expected: str) -> None:
    server = serve(DUMMY=mode)
    assert server.ended() == 1
    assert server.output.endswith(expected)
    assert "Ready" not in server.output


def test_a_worker_that_cannot_start_ends_it(serve: Start, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import os, sys\nif sys.argv[0] == '-c': os._exit(7)\n")
    server = serve(PYTHONPATH=str(tmp_path / "site"))
    assert server.ended() == 1
    assert "error: The process that draws has died" in server.output


def test_a_worker_that_is_killed_ends_it(serve: Start) -> None:
    server = serve()
    server.wait_for("Ready")
    server.worker().kill()
    assert server.ended() == 1
    assert "error: The process that draws has died" in server.output


def test_a_worker_that_dies_of_a_request_answers_it_and_ends(serve: Start) -> None:
    server = serve()
    server.wait_for("Ready")
    assert server.predict("exit").json()["error"] == "Worker crashed"
    assert server.ended() == 1
    assert "error: The process that draws has died" in server.output


def test_a_port_in_use_is_refused_in_one_sentence(serve: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = serve("--port", str(port))
        assert server.ended() == 1
    assert server.output == f"error: Port {port} on 127.0.0.1 is in use: choose another with --port.\n"


@pytest.mark.parametrize("arguments", [["--port", "0"], ["--port", "65536"], ["--port", "http"], ["--threads", "2"]])
def test_arguments_that_mean_nothing_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        serve_command.main(arguments)


@pytest.mark.parametrize("url", ["https://host/x?signature=1", "https://host/x/?", "https://host/x/#part"])
def test_an_upload_address_with_a_query_is_refused(capsys: pytest.CaptureFixture[str], url: str) -> None:
    """Cog would put a picture to ``…?signature=10-seed7.webp``, and say that it succeeded."""
    with pytest.raises(SystemExit):
        serve_command.main(["--upload-url", url])
    assert "has a query" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["nonsense", "ftp://host/x", "http://"])
def test_an_upload_address_that_is_none_is_refused_at_once(capsys: pytest.CaptureFixture[str], url: str) -> None:
    with pytest.raises(SystemExit):
        serve_command.main(["--upload-url", url])
    assert "is not an http or https address" in capsys.readouterr().err


EXTENDED = (
    PREDICTOR.replace('prompt: str = Input(default="x")', 'image: str = Input(default="x")')
    .replace("return prompt", "return image")
    .replace("prompt ==", "image ==")
)


def test_two_doors_of_one_project_are_served_side_by_side(serve: Start, project: Path) -> None:
    """Each with its own schema, also where nothing can be written into the project."""
    (project / "predict_extended.py").write_text(EXTENDED)
    (project / "openapi.extended.json").write_text(SCHEMA.replace("prompt", "image").replace("Prompt", "Image"))
    first, second = serve(prefix=read_only(project)), serve("--extended", prefix=read_only(project))
    for server, name in ((first, "prompt"), (second, "image")):
        server.wait_for("Ready")
        document = httpx2.get(f"{server.url}/openapi.json").json()
        assert list(document["components"]["schemas"]["Input"]["properties"]) == [name]
    answer = httpx2.post(f"{second.url}/predictions", json={"input": {"image": "http://127.0.0.1:9/a"}}, timeout=30)
    assert answer.json()["output"] == "http://127.0.0.1:9/a"
    assert first.predict("a tomato").json()["output"] == "a tomato"


def test_inputs_that_cog_drops_are_named_in_the_log(serve: Start) -> None:
    server = serve()
    server.wait_for("Ready")
    inputs = {"prompt": "a tomato", "pormpt": "a pear", "lora\x1b[31m": 1}
    answer = httpx2.post(f"{server.url}/predictions", json={"input": inputs}, timeout=30)
    assert answer.json()["output"] == "a tomato"
    server.wait_for("not an input of this model, and so ignored: ")
    (line,) = [line for line in server.lines if line.startswith("not an input")]
    assert "pormpt" in line
    assert "lora" in line
    assert "\x1b" not in line
