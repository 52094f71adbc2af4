"""``scripts/serve``: Cog's own HTTP server without Docker, ended with a reason where Cog would start for ever."""

import argparse
import contextlib
import ctypes
import errno
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import httpx2
import psutil

from flux_lora import errors
from flux_lora.commands import PROJECT, drawing_settings, environment_for
from flux_lora.errors import FluxLoraError, SettingsError

PREDICTOR = "predict.py:Predictor"
EXAMPLE = '{"input": {"prompt": "a tomato on a blue background"}}'

ANY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - they are compared with, not listened on
"""Where a client on this machine finds a server that listens on all addresses."""

PR_SET_PDEATHSIG = 1
"""Of Linux' ``prctl``."""

POLL_SECONDS = 0.2
WORKER_GONE_SECONDS = 1
"""Time for Cog to answer the request that a worker died of, or to say why set-up failed."""

PATIENCE_SECONDS = 5
"""How long a running prediction may delay the end."""

SHOWN_BY_WATCH = ("Setup failed", "Worker initialization failed")
BAR = re.compile(r"\d+%\|")


class ServerError(FluxLoraError):
    """A server that cannot go on; the message is the reason."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    try:
        host = _listen_address(options.host, options.port)
        settings = drawing_settings()
        _place_schema(PROJECT)
        _serve(host, options.port, options.upload_url, environment_for(settings), stop)
    except FluxLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/serve",
        description="Serve the model in the weights directory (FLUX_WEIGHTS, default: weights) over HTTP, as Cog does.",
    )
    parser.add_argument("--port", type=_port, default=5000, help="default: %(default)s")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, 0.0.0.0 for all; default: %(default)s"
    )
    parser.add_argument(
        "--upload-url", type=_address, metavar="URL", help="where pictures are put; default: they are in the answer"
    )
    return parser


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")


def _listen_address(host: str, port: int) -> str:
    """The numeric address to listen on, in brackets if it is of IPv6: the only form that Cog's server takes.

    Raises:
        SettingsError: it is not an address of this machine, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(f"Port {port} on {host} is in use: choose another with --port.") from None
        raise SettingsError(f"{host}, port {port}, cannot be listened on: {error.strerror}.") from None
    return f"[{address[0]}]" if family == socket.AF_INET6 else str(address[0])


def _place_schema(project: Path) -> None:
    """Put ``openapi.json`` where Cog's server reads it; without it, nothing would be validated."""
    folder = project / ".cog"
    try:
        folder.mkdir(exist_ok=True)
        part = folder / f"openapi_schema.{os.getpid()}.part"
        part.write_bytes((project / "openapi.json").read_bytes())
        part.replace(folder / "openapi_schema.json")
    except OSError as error:
        raise SettingsError(f"The schema cannot be put into {folder}: {error.strerror}.") from None


def _address(url: str) -> str:
    """An address that pictures can be put to; Cog itself would only find out after drawing one."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{url!r} is not an http or https address")
    return url


def _serve(host: str, port: int, upload_url: str | None, settings: Mapping[str, str], stop: threading.Event) -> None:
    """Run Cog's server until it is told to stop.

    Raises:
        ServerError: set-up failed, or the server or its worker died.
    """
    command = [sys.executable, "-m", "cog.server.http", "--host", host]
    if upload_url:
        command += ["--upload-url", upload_url]
    environment = {
        **settings,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # for its worker
        "COG_PREDICT_TYPE_STUB": PREDICTOR,
        "PORT": str(port),
    }
    server = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches it through here only
        preexec_fn=_end_with_parent,
    )
    log = threading.Thread(target=_show_log, args=(server.stdout, stop))
    log.start()
    try:
        _watch(server, f"http://{ANY.get(host, host)}:{port}", stop)
    finally:
        stop.set()
        _end(server)
        log.join()


def _end_with_parent() -> None:
    """On Linux, be told to end when the parent is killed: the port must not stay taken by a server that nobody sees."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _watch(server: subprocess.Popen[str], address: str, stop: threading.Event) -> None:
    ready, deadline = False, math.inf
    while not stop.wait(POLL_SECONDS):
        if server.poll() is not None:
            raise ServerError(f"Cog's server ended with status {server.returncode}.")
        health = {} if ready else _health(address)
        if health.get("status") in ("SETUP_FAILED", "DEFUNCT"):
            raise ServerError(_set_up_error(health["setup"]["logs"]))
        if health.get("status") in ("READY", "BUSY"):
            ready = True
            command = f"curl -s {address}/predictions -H 'Content-Type: application/json' -d {shlex.quote(EXAMPLE)}"
            print(f"Ready at {address}, until Ctrl-C. A first picture:\n  {command} -o answer.json", flush=True)
        if any(map(_is_alive, _below(server))):
            deadline = math.inf
        elif ready or health:  # the server answers, so it has started its worker
            deadline = min(deadline, time.monotonic() + WORKER_GONE_SECONDS)
            if time.monotonic() > deadline:
                raise ServerError(
                    "The process that draws has died, perhaps killed for want of memory. Start the server again."
                )


def _health(address: str) -> dict[str, Any]:
    """What the server says of itself; nothing while it does not answer."""
    try:
        with httpx2.Client(trust_env=False, timeout=2) as client:
            return dict(client.get(f"{address}/health-check").json())
    except (httpx2.HTTPError, ValueError):
        return {}


def _set_up_error(text: str) -> str:
    if text == "worker crashed":
        return "The process that draws died during set-up, perhaps killed for want of memory."
    return _unwrapped(text)


def _unwrapped(text: str) -> str:
    """An error without what Cog's layers put before it, nor its class name where it is one of ours."""
    text = re.sub(
        r"^((worker setup failed( \(slot [^)]*\))?|(setup|prediction) failed): )+", "", text, flags=re.IGNORECASE
    )
    name, _, message = text.partition(": ")
    return message if hasattr(errors, name) else text


def _below(server: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return list(psutil.Process(server.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(server: subprocess.Popen[str]) -> None:
    """End the server and its worker: asked first, so that they can clean up, then killed."""
    below = _below(server)
    server.terminate()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (server.poll() is None or any(map(_is_alive, below))) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of the session
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _show_log(stream: IO[str], stop: threading.Event) -> None:
    """Show the server's log as people read it: what the model prints, and Cog's warnings until the end has begun."""
    bar_open = False
    for line in stream:
        text = _readable(line, stop)
        if text is None:
            continue
        if BAR.search(text):
            if sys.stderr.isatty():
                print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
                bar_open = True
            continue
        if bar_open:
            print(file=sys.stderr, flush=True)
            bar_open = False
        if text:
            print(text, file=sys.stderr, flush=True)


def _readable(line: str, stop: threading.Event) -> str | None:
    try:
        record = json.loads(line)
        level, target, fields = record["level"], record["target"], record["fields"]
        message = str(fields["message"]).strip()
    except (ValueError, KeyError, TypeError):
        return line.rstrip()
    if "source" in fields or target == "coglet::user":
        return message
    if message == "Prediction failed":
        return f"prediction failed: {_unwrapped(str(fields.get('error')))}"
    if level in ("WARN", "ERROR") and message not in SHOWN_BY_WATCH and not stop.is_set():
        return f"cog: {message}{f': {error}' if (error := fields.get('error')) else ''}"
    return None


if __name__ == "__main__":
    sys.exit(main())
