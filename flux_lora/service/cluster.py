"""Ray on this machine: started for one application, seen from nowhere else, and gone without a trace."""

import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2

from flux_lora import errors
from flux_lora.errors import FluxLoraError
from flux_lora.wording import say

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "flux-lora"
"""Of the application."""

DRAWING = "Drawing"
"""Of the deployment that holds the replicas."""

LONGEST_FOLDER = 40
"""Characters of Ray's folder: it puts sockets far below, whose names are short."""

JANITOR = """
trap '' HUP INT TERM
cat
sleep 3
for round in 1 2 3 4 5 6 7 8 9 10; do
    found=
    for of in /proc/[0-9]*; do
        [ "$of" = "/proc/$PPID" ] && continue
        if grep -qsaF "RAY_TMPDIR=$1" "$of/environ" || ls -l "$of/fd" 2>/dev/null | grep -qF -- "-> $1/"; then
            found=1
            kill -9 "${of#/proc/}"
        fi
    done
    [ "$found" ] || break
    sleep 1
done
rm -rf -- "$1"
"""
"""Ends what is left, and removes the folder, when whoever started this has ended, however that was.

It looks until it finds none, for Ray may be starting a process while it looks. Ray's agents write their titles over
their environment: these are known by what they have open there, as whoever started this has, who waits for its end.
"""

POLL_SECONDS = 0.3
"""Between two looks at how starting goes."""

CONNECT_SECONDS = 10.0
"""That a cluster's machine may take to answer."""

JOIN_SECONDS = 30.0
"""That Ray may take to become a part of a cluster."""

WATCH_SECONDS = 15.0
"""Between two looks at whether it still lives, each of which takes a twentieth of a second of processors."""

OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory for what travels between processes: pictures of a few MB."""


class ServiceError(FluxLoraError):
    """A service that cannot start, or cannot go on; the message is the reason."""


def _environment(folder: Path) -> dict[str, str]:
    """What Ray reads from nowhere else, when it is imported, and its processes inherit."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the name is historical: no cluster, so all ports on loopback alone
        "RAY_TMPDIR": str(folder),  # also what its processes are known by
        "RAY_AUTH_MODE": "token",  # loopback is shared with other users of the machine
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # One event loop in each actor: nothing in ours blocks it, and each change of threads costs time.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # from the front to the replicas: cheaper than tasks and objects
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # pictures are longer than its 4 MB
        # What Ray does of itself is done beside drawing.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_enable_metrics_collection": "0",  # the front has its own
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "60000",
    }


@contextmanager
def local_folder() -> Iterator[Path]:
    """A folder for Ray's files and sockets, and a pipe ``log`` in it; it goes when this process ends, however it ends.

    Raises:
        ServiceError: there is no place for it.
    """
    parent = tempfile.gettempdir()
    if len(parent) > LONGEST_FOLDER - len("/fl-ray-12345678"):
        parent = "/tmp"  # noqa: S108 - the folder in it is this user's alone
    try:
        folder = Path(tempfile.mkdtemp(prefix="fl-ray-", dir=parent))
        os.mkfifo(folder / "log", 0o600)
    except OSError as error:
        raise ServiceError(
            f"Ray's files cannot be kept in {parent}: {error.strerror}. Name another in TMPDIR."
        ) from None
    janitor = subprocess.Popen(
        ["/bin/sh", "-c", JANITOR, "sh", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        janitor.communicate()


def show(pipe: Path) -> None:
    """Print what comes through a pipe, from now on, on a thread of its own."""
    descriptor = os.open(pipe, os.O_RDWR)  # its own writer too, so that it never ends

    def read() -> None:
        with os.fdopen(descriptor, "rb") as lines:
            for line in lines:
                print(line.decode(errors="replace"), end="", flush=True)

    threading.Thread(target=read, daemon=True).start()


@contextmanager
def local_ray(folder: Path, cpus: int, gpus: int) -> Iterator[None]:
    """Ray, on this machine alone, until the end of the block.

    Args:
        folder: for its files.
        cpus: that it hands out, whether or not there are so many.
        gpus: of this machine.
    """
    os.environ |= _environment(folder)
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        num_gpus=gpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(folder),
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def remote_ray(address: str) -> Iterator[None]:
    """A connection to a cluster until the end of the block.

    Raises:
        ServiceError: it cannot be reached.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto" and not (host and "/" not in host and port.isdecimal()):
        raise ServiceError(f"RAY_ADDRESS={address}: name a cluster as HOST:PORT, which `ray start --head` prints.")
    try:
        if host:  # Ray itself would try for two minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        _join(address)
    except (OSError, OverflowError) as error:
        raise ServiceError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}).") from None
    import ray

    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    """Connect to a cluster, on a thread beside: Ray waits for minutes for what answers and is no Ray.

    Raises:
        OSError: there is none, or it takes too long.
    """
    import ray

    joining: Future[None] = Future()

    def join() -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            joining.set_result(None)
        except BaseException as error:  # noqa: BLE001 - it is raised again where this is waited for
            joining.set_exception(error)

    threading.Thread(target=join, daemon=True).start()
    try:
        joining.result(JOIN_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"what does is no Ray, or takes over {JOIN_SECONDS:g} s") from None
    except RuntimeError as error:  # Ray's word for a cluster of another version, or without the token
        raise ConnectionError(str(error).partition("\n")[0]) from error


def run(application: "Application", proxy: tuple[str, int] | None) -> None:
    """Have Ray Serve begin to run an application; it is not ready yet.

    Args:
        application: bound.
        proxy: address and port that Ray's own HTTP proxies listen on; None: there are none, the application listens.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # the next line makes it talk, whatever it is told
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    if proxy:
        serve.start(http_options={"host": proxy[0], "port": proxy[1]}, logging_config=quiet)
    else:
        serve.start(proxy_location="Disabled", logging_config=quiet)
    serve.run_many(
        [serve.RunTarget(application, name=NAME, route_prefix="/", logging_config=quiet)],
        wait_for_applications_running=False,
    )


def wait_until_ready(health: str, stop: threading.Event, deadline: float, seconds: float) -> None:
    """Wait until all replicas run and the front says so, and say how it goes.

    Args:
        health: where the front says it.
        stop: ends waiting.
        deadline: by ``time.monotonic``.
        seconds: that starting may take, for the message.

    Raises:
        ServiceError: set-up failed, or took too long; the message says why.
    """
    shown = ""
    while not stop.wait(POLL_SECONDS):
        status, message, progress = _progress()
        if status == "RUNNING" and _answers(health):
            return
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServiceError(message)
        if progress != shown:
            say(progress)
            shown = progress
        if time.monotonic() > deadline:
            raise ServiceError(
                f"It did not start in {seconds:g} s ({progress}). FLUX_START_DEADLINE gives it longer; {message}"
            )


def _answers(health: str) -> bool:
    """Whether a caller is told that pictures can be drawn: the front knows it a moment later than Ray."""
    try:
        return httpx2.get(health, timeout=POLL_SECONDS, trust_env=False).is_success
    except httpx2.TransportError:
        return False


def watch(stop: threading.Event) -> None:
    """Wait until the end is asked for, and say when replicas die and come back.

    Raises:
        ServiceError: Ray has ended.
    """
    from ray.exceptions import RayError

    shown = ""
    while not stop.wait(WATCH_SECONDS):
        try:
            _, _, progress = _progress()
        except RayError as error:
            raise ServiceError(f"Ray has ended: {error}") from None
        if shown and progress != shown:
            say(progress)
        shown = progress


def gpus() -> int:
    """How many GPUs the cluster has."""
    import ray

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray's function is untyped
    return int(resources.get("GPU", 0))


def _progress() -> tuple[str, str, str]:
    """The application's status, what is wrong with it, and how many replicas are ready, as a line."""
    from ray import serve

    application = serve.status().applications.get(NAME)
    if application is None or DRAWING not in application.deployments:
        return "DEPLOYING", "", "starting Ray Serve …"
    drawing = application.deployments[DRAWING]
    ready = sum(count for state, count in drawing.replica_states.items() if state == "RUNNING")
    total = sum(drawing.replica_states.values())
    return application.status, reason(drawing.message or application.message), f"{ready} of {total} replicas ready …"


def reason(message: str) -> str:
    """Our own sentence in what Ray says of a replica that could not be set up, or else all of it."""
    names = "|".join(name for name, kind in vars(errors).items() if isinstance(kind, type))
    found = re.findall(rf"(?:flux_lora\.errors\.)?(?:{names}): (.+)", message)
    return found[-1] if found else message
