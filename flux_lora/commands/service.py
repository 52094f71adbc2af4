"""``scripts/service``: a queue, a replica for each GPU, and HTTP APIs before them, on Ray Serve."""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from flux_lora.commands import drawing_settings
from flux_lora.commands.serving import listening
from flux_lora.errors import FluxLoraError, SettingsError
from flux_lora.service import access, cluster
from flux_lora.service.logs import Log
from flux_lora.settings import Settings
from flux_lora.wording import complain, say

ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - they are compared with, not listened on
"""Where a client on this machine finds what listens on all addresses."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; the exit status is 1 when it ended with a reason."""
    options = _parser().parse_args(arguments)
    stop = threading.Event()
    try:
        host = listening.numeric_address(options.host, options.port).strip("[]")
        settings = drawing_settings()
        if options.extended:
            settings = settings.model_copy(update={"extended": True})
        keys = access.keys_of(settings, host, open_to_all=options.open)
        _serve(settings, keys, host, options.port, stop)
    except FluxLoraError as error:
        complain(f"error: {error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/service",
        description=(
            "Serve the model in the weights directory (FLUX_WEIGHTS, default: weights) with a queue, one replica for "
            "each GPU, and several HTTP APIs: docs/service.md."
        ),
    )
    parser.add_argument("--port", type=listening.port, default=8000, help="default: %(default)s")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, 0.0.0.0 for all; default: %(default)s"
    )
    parser.add_argument("--extended", action="store_true", help="take the extended inputs: docs/inputs.md")
    parser.add_argument("--open", action="store_true", help="serve whoever reaches that address, without keys")
    return parser


def _serve(settings: Settings, keys: tuple[str, ...], host: str, port: int, stop: threading.Event) -> None:
    """Start, wait until told to stop, and leave nothing behind.

    Raises:
        ServiceError: it cannot start, or Ray has ended.
        SettingsError: a setting contradicts this machine.
    """
    _on_signals(stop)
    deadline = time.monotonic() + settings.start_deadline
    with ExitStack() as stack:
        log = Log(json=settings.json_log)
        if settings.ray_address:
            say(f"Connecting to the Ray cluster at {settings.ray_address} …")
            stack.enter_context(cluster.remote_ray(settings.ray_address))
            cpus, gpus = 1, cluster.gpus()
        else:
            gpus, threads = _gpus(settings.device), torch.get_num_threads()
            say("Starting Ray …")
            most = max(settings.replicas or gpus or 1, settings.max_replicas or 1)
            cpus = max(1, threads // most)
            folder = stack.enter_context(cluster.local_folder())
            log = Log(json=settings.json_log, pipe=folder / "log")
            cluster.show(folder / "log")
            stack.enter_context(cluster.local_ray(folder, most * cpus, gpus))
        _on_signals(stop)  # Ray has its own ideas of them

        from flux_lora.service.deployment import application  # imports Ray, whose settings are made by now

        replicas = settings.replicas or gpus or 1
        settings = settings.model_copy(update={"replicas": replicas, "device": "cuda" if gpus else "cpu"})
        here = None if settings.ray_address else (host, port)
        cluster.run(
            application(
                settings,
                keys,
                local=access.is_loopback(host),
                log=log,
                cpus=cpus,
                gpus=1 if gpus else 0,
                listen=here,
            ),
            proxy=None if here else (host, port),
        )
        reached = ANY.get(host, host)
        address = f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
        cluster.wait_until_ready(f"{address}/health", stop, deadline, settings.start_deadline)
        if not stop.is_set():
            say(f"Ready at {address}, until Ctrl-C. What it answers: {address}/docs")
        cluster.watch(stop)
        say("Ending …")


def _on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, lambda *_: stop.set())


def _gpus(device: str) -> int:
    """How many GPUs of this machine draw.

    Raises:
        SettingsError: there is none, or a single one is named.
    """
    if device.startswith("cuda:"):
        raise SettingsError(f"FLUX_DEVICE={device} names one GPU: choose with CUDA_VISIBLE_DEVICES which ones draw.")
    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not count:
        raise SettingsError("FLUX_DEVICE=cuda cannot be used: there is no GPU here.")
    return count


if __name__ == "__main__":
    sys.exit(main())
