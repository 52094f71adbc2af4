"""Who watches over Cog's server: it must draw, and its one slot must come back after each prediction."""

import math
import shlex
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx2

from flux_lora.commands.serving.log import Slot
from flux_lora.commands.serving.process import Server
from flux_lora.commands.serving.records import unwrapped
from flux_lora.errors import FluxLoraError

EXAMPLE = '{"input": {"prompt": "a tomato on a blue background"}}'

POLL_SECONDS = 0.2
WORKER_GONE_SECONDS = 1
"""Time for Cog to answer the request that a worker died of, or to say why set-up failed."""

IDLE_POLL_SECONDS = 5
BUSY_SECONDS = 60
"""How long the server may be busy while it draws nothing: each upload may take 25 s."""


WITHOUT_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Of a client that trusts nobody: the address is plain HTTP, and to read all certificates takes 27 ms at each look."""


class ServerError(FluxLoraError):
    """A server that cannot go on; the message is the reason."""


def watch(server: Server, slot: Slot, stop: threading.Event) -> str:
    """Watch until the end is asked for, or the server has to be started again.

    Returns:
        Why it has to be started again; nothing if the end was asked for.

    Raises:
        ServerError: set-up failed, or the server or its worker died.
    """
    _wait_for_set_up(server, slot, stop)
    command = f"curl -s {server.address}/predictions -H 'Content-Type: application/json' -d {shlex.quote(EXAMPLE)}"
    if not stop.is_set():
        print(f"Ready at {server.address}, until Ctrl-C. A first picture:\n  {command} -o answer.json", flush=True)
    idleness = Idleness()
    while not stop.wait(POLL_SECONDS):
        _require_server(server, slot)
        lost = slot.lost or idleness.of(server.address, slot)
        if lost or not server.draws():
            stop.wait(WORKER_GONE_SECONDS)
            if stop.is_set():
                break
            _require_server(server, slot)
            if server.draws():  # a worker that dies takes the slot along, and then that is what has to be said
                return lost
            raise _no_worker()
    return ""


def _wait_for_set_up(server: Server, slot: Slot, stop: threading.Event) -> None:
    deadline = math.inf
    while not stop.wait(POLL_SECONDS):
        _require_server(server, slot)
        health = _health(server.address)
        if health.get("status") in ("SETUP_FAILED", "DEFUNCT"):
            raise ServerError(_set_up_error(health["setup"]["logs"]))
        if health.get("status") in ("READY", "BUSY"):
            return
        if server.draws():
            deadline = math.inf
        elif health:  # the server answers, so it has started its worker
            deadline = min(deadline, time.monotonic() + WORKER_GONE_SECONDS)
            if time.monotonic() > deadline:
                raise _no_worker()


@dataclass
class Idleness:
    """How long the server has been busy without drawing anything."""

    since: float = math.inf
    asked: float = 0.0

    def of(self, address: str, slot: Slot) -> str:
        """Say it if that is too long."""
        now = time.monotonic()
        if slot.running:
            self.since = math.inf
        elif now - self.asked > IDLE_POLL_SECONDS:
            self.asked = now
            self.since = min(self.since, now) if _health(address).get("status") == "BUSY" else math.inf
        return f"busy for {BUSY_SECONDS} s without a prediction" if now - self.since > BUSY_SECONDS else ""


def _require_server(server: Server, slot: Slot) -> None:
    if (status := server.process.poll()) is None:
        return
    time.sleep(POLL_SECONDS)  # for the end of its log
    if slot.asked_to_end:
        raise ServerError("Cog's server has ended because somebody has called POST /shutdown.")
    raise ServerError(f"Cog's server ended with status {status}.")


def _no_worker() -> ServerError:
    return ServerError("The process that draws has died, perhaps killed for want of memory. Start the server again.")


def _health(address: str) -> dict[str, Any]:
    """What the server says of itself; nothing while it does not answer."""
    try:
        with httpx2.Client(trust_env=False, timeout=2, verify=WITHOUT_TLS) as client:
            return dict(client.get(f"{address}/health-check").json())
    except (httpx2.HTTPError, ValueError):
        return {}


def _set_up_error(text: str) -> str:
    if text == "worker crashed":
        return "The process that draws died during set-up, perhaps killed for want of memory."
    return unwrapped(text)
