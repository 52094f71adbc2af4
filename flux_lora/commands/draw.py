"""``scripts/draw``: have any Cog server draw, and write its pictures here."""

import argparse
import base64
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from flux_lora.commands import flags
from flux_lora.errors import FluxLoraError, OutputError, RequestError
from flux_lora.wording import complain

TRIES, PAUSE = 20, 0.5
"""How often, and after how many seconds each time, a server that is busy is asked again: one draws at a time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Send one prediction, and print the paths of its pictures."""
    parser = argparse.ArgumentParser(
        prog="scripts/draw",
        description="Have a Cog server draw, and write its pictures here.",
        epilog='example: scripts/draw http://127.0.0.1:5000 -i prompt="a tomato" -i seed=7',
    )
    parser.add_argument("address", help="of the server: http://HOST:PORT")
    parser.add_argument("-i", "--input", action="append", metavar="NAME=VALUE", default=[], help="an input; repeatable")
    parser.add_argument("-o", "--output", type=Path, default=Path(), metavar="FOLDER", help="default: here")
    options = parser.parse_args(arguments)
    try:
        answer = predict(options.address, flags.read(options.input))
        for index, address in enumerate(answer["output"]):
            print(save(address, options.output / f"{answer['id']}-{index}"))
    except FluxLoraError as error:
        complain(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def predict(address: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Send a prediction to a Cog server and wait for its answer.

    Raises:
        OutputError: the server cannot be reached, refuses the inputs, or cannot draw; the message has its reason.
    """
    if urlsplit(address).scheme not in ("http", "https"):
        raise RequestError(f"{address} is not an address: give it as http://HOST:PORT.")
    for _ in range(TRIES):
        try:
            response = httpx2.post(f"{address.rstrip('/')}/predictions", json={"input": inputs}, timeout=None)
        except httpx2.HTTPError as error:
            raise OutputError(f"{address} cannot be reached: {error}. Is the server running (scripts/serve)?") from None
        if response.status_code != httpx2.codes.CONFLICT:
            break
        time.sleep(PAUSE)
    if response.status_code != httpx2.codes.OK:
        raise OutputError(f"{address} answered {response.status_code}: {response.text[:500]}")
    answer: dict[str, Any] = response.json()
    if answer.get("status") != "succeeded":
        raise OutputError(f"{address} could not draw: {answer.get('error')}")
    return answer


def save(address: str, stem: Path) -> Path:
    """Write a picture, a ``data:`` URI or an address, under a name that gets its type's ending.

    Raises:
        OutputError: the file cannot be written.
    """
    if address.startswith("data:"):
        head, _, text = address.partition(",")
        kind, content = head.removeprefix("data:").split(";")[0], base64.b64decode(text)
    else:
        response = httpx2.get(address).raise_for_status()
        kind, content = response.headers.get("content-type", ""), response.content
    path = stem.with_name(f"{stem.name}.{kind.partition('/')[2].replace('jpeg', 'jpg') or 'webp'}")
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from None
    return path


if __name__ == "__main__":
    sys.exit(main())
