"""Cog's server as a process: started in a folder of its own, ended with all that it has started."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from flux_lora.commands import PROJECT
from flux_lora.errors import SettingsError
from flux_lora.storage import write_whole

ANY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - they are compared with, not listened on
"""Where a client on this machine finds a server that listens on all addresses."""

PATIENCE_SECONDS = 5
"""How long a running prediction may delay the end."""

ORPHANED_SECONDS = 2
"""The same where this command was killed: nobody waits for the picture."""

JANITOR = """
exec 3<&0
{
    trap '' HUP INT TERM
    if ! read -r _ <&3; then
        kill -TERM "-$1" && sleep "$2" && kill -KILL "-$1"
    fi
    rm -rf -- "$3"
} &
"""
"""A shell, no child of ours, that waits for this command to end. If it ends without a word, the shell ends the server,
which would keep port and memory: Cog's server, and its worker, wait for a running prediction whoever has died."""


@dataclass(frozen=True)
class Server:
    """A running server, and where it answers."""

    process: subprocess.Popen[str]
    address: str
    lifeline: IO[bytes]
    """Of the janitor: it breaks when this process ends."""

    def below(self) -> list[psutil.Process]:
        """Its worker, and whatever that has started."""
        try:
            return list(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def draws(self) -> bool:
        """Whether there is a worker."""
        return any(map(_is_alive, self.below()))

    def end(self) -> None:
        """End it and its worker: asked first, so that they can clean up, then killed."""
        below = self.below()
        self.process.terminate()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (self.process.poll() is None or any(map(_is_alive, below))) and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of the session
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError), self.lifeline:  # somebody has killed the janitor
            self.lifeline.write(b"ended\n")


def start(
    predictor: Path, schema: Path, host: str, port: int, upload_url: str | None, settings: Mapping[str, str]
) -> Server:
    """Start Cog's server.

    Args:
        predictor: the file that holds the ``Predictor``.
        schema: its OpenAPI document; Cog reads it under its working directory, and without it validates nothing.
        host: the address to listen on, as Cog takes it.
        port: of it.
        upload_url: where pictures are put; None: they are in the answer.
        settings: as variables of the environment.

    Raises:
        SettingsError: there is no place for the schema.
    """
    command = [sys.executable, "-m", "cog.server.http", "--host", host]
    if upload_url:
        command += ["--upload-url", upload_url]
    home = _home(schema)
    path = os.environ.get("PYTHONPATH")
    environment = {
        **settings,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # for its worker
        "PYTHONPATH": f"{PROJECT}{os.pathsep}{path}" if path else str(PROJECT),
        "COG_PREDICT_TYPE_STUB": f"{predictor}:Predictor",
        "PORT": str(port),
        "TMPDIR": tempfile.gettempdir(),  # where it was a relative path
    }
    process = subprocess.Popen(
        command,
        cwd=home,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        umask=0o077,  # callers' LoRAs and pictures are not for other users of the machine
        start_new_session=True,  # Ctrl-C reaches it through here only, and its process group is its own
    )
    return Server(process, f"http://{ANY.get(host, host)}:{port}", _hire_janitor(process.pid, home))


def _hire_janitor(group: int, home: Path) -> IO[bytes]:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as lifeline:
        subprocess.run(
            ["/bin/sh", "-c", JANITOR, "sh", str(group), str(ORPHANED_SECONDS), str(home)],
            stdin=lifeline,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            check=True,
        )
    return os.fdopen(write, "wb", buffering=0)


def _home(schema: Path) -> Path:
    """A folder for one server, with the schema where Cog looks for it."""
    place, home = tempfile.gettempdir(), None
    try:
        home = Path(tempfile.mkdtemp(prefix="flux-lora-serve-", dir=place))
        (home / ".cog").mkdir()
        write_whole(home / ".cog" / "openapi_schema.json", schema.read_bytes())
    except OSError as error:
        if home:
            shutil.rmtree(home, ignore_errors=True)
        raise SettingsError(
            f"The schema cannot be put into {place}: {error.strerror}. Name another in TMPDIR."
        ) from None
    return home


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
