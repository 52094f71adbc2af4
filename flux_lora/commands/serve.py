"""``scripts/serve``: Cog's own HTTP server without Docker, watched over.

It ends with a reason where Cog would start for ever, and is started again where Cog would never draw again.
"""

import argparse
import ipaddress
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from flux_lora.commands import PROJECT, drawing_settings, environment_for
from flux_lora.commands.serving import folder, listening, log, process
from flux_lora.commands.serving.watch import watch
from flux_lora.errors import FluxLoraError
from flux_lora.wording import complain

NOT_ALONE = (
    "This is Cog's own server, for callers who are trusted: whoever reaches it can end it, read a running prediction "
    "by its id, and have it post to any address. For others put a gateway in front: docs/operating.md."
)


DOCUMENTED = (PROJECT / "predict.py", PROJECT / "openapi.json")
EXTENDED = (PROJECT / "predict_extended.py", PROJECT / "openapi.extended.json")
"""The doors: the file that holds the ``Predictor``, and its OpenAPI document."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; the exit status is 1 when it ended with a reason."""
    options = _parser().parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, lambda *_: stop.set())
    try:
        host = listening.numeric_address(options.host, options.port)
        folder.require()
        settings = drawing_settings()
        if not ipaddress.ip_address(host.strip("[]")).is_loopback:
            complain(NOT_ALONE)
        door = EXTENDED if options.extended else DOCUMENTED
        while lost := _serve(door, host, options.port, options.upload_url, environment_for(settings), stop):
            complain(f"Cog has lost its only slot and would never draw again, so it is started again: {lost}.")
    except FluxLoraError as error:
        complain(f"error: {error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/serve",
        description="Serve the model in the weights directory (FLUX_WEIGHTS, default: weights) over HTTP, as Cog does.",
    )
    parser.add_argument("--extended", action="store_true", help="take the extended inputs: docs/inputs.md")
    parser.add_argument("--port", type=listening.port, default=5000, help="default: %(default)s")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, 0.0.0.0 for all; default: %(default)s"
    )
    parser.add_argument(
        "--upload-url", type=_address, metavar="URL", help="where pictures are put; default: they are in the answer"
    )
    return parser


def _address(url: str) -> str:
    """An address that pictures can be put to; Cog itself would only find out after drawing one."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{url!r} is not an http or https address")
    if parts.query or parts.fragment or url[-1] in "?#":
        raise argparse.ArgumentTypeError(
            f"{url!r} has a query: Cog appends a file's name to the address, so it has to end with a folder"
        )
    return url


def _serve(
    door: tuple[Path, Path],
    host: str,
    port: int,
    upload_url: str | None,
    settings: Mapping[str, str],
    stop: threading.Event,
) -> str:
    """Run Cog's server until it is told to stop, or has to be started again: then return why.

    Raises:
        ServerError: set-up failed, or the server or its worker died.
    """
    server = process.start(*door, host, port, upload_url, settings)
    slot, ending = log.Slot(), threading.Event()
    reader = threading.Thread(target=log.show, args=(server.process.stdout, slot, ending))
    reader.start()
    try:
        return watch(server, slot, stop)
    finally:
        ending.set()
        server.end()
        reader.join()
        slot.clear()


if __name__ == "__main__":
    sys.exit(main())
