"""What the service costs beyond drawing: a queue, HTTP and processes, against generators that nothing is before.

    scripts/bench service

Overhead: one caller, one request after the other, through the service and in this process by ``Generator.draw``, which
take turns; the median of the differences. Throughput: two replicas under load from four callers, against two bare
processes that draw the same requests; one thread each. They take turns, too, for a machine is not equally fast all the
time; the service stands still while the bare processes draw, and the median of the turns counts. Targets: at most
15 ms, and at least 0.85.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from benchmarks.measure import machine
from flux_lora.assembly import assemble
from flux_lora.request import Request
from flux_lora.settings import Settings

OVERHEAD_MS = 15
THROUGHPUT = 0.85
START_SECONDS = 180
PORT = 8417


def main() -> int:
    """Print the numbers; exit with 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench service", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="requests of each contender for the overhead")
    parser.add_argument("--load", type=int, default=180, help="requests for the throughput")
    parser.add_argument("--turns", type=int, default=3, help="in which they are drawn")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = Settings.from_environment()
    print(machine())
    print(f"weights {settings.weights}, dev, {options.steps} steps, 512×512")
    requests = [_inputs(number, options.steps) for number in range(options.load)]
    with _service(settings.weights) as (url, service):
        with httpx.Client(base_url=url, timeout=120) as client:
            overhead = _overhead(client, settings, options.rounds, options.steps)
        print(f"overhead: {overhead * 1000:.1f} ms at the median of {options.rounds} (target: at most {OVERHEAD_MS})")
        with _bare(settings) as drawers:
            _load(url, requests[:4])
            _draw_bare(drawers, requests[:4])
            turns = []
            for turn in range(options.turns):
                drawn = requests[turn :: options.turns]
                served = _seconds(partial(_load, url, drawn))
                with _standing_still(service):
                    bare = _seconds(partial(_draw_bare, drawers, drawn))
                turns.append(bare / served)
                print(
                    f"  {len(drawn) / served:.2f} pictures/s by two replicas, {len(drawn) / bare:.2f} by two bare "
                    f"processes: {turns[-1]:.2f}"
                )
    ratio = statistics.median(turns)
    print(f"throughput: {ratio:.2f} at the median of {options.turns} turns (target: at least {THROUGHPUT})")
    return int(overhead * 1000 > OVERHEAD_MS or ratio < THROUGHPUT)


def _inputs(seed: int, steps: int) -> dict[str, Any]:
    size = {"aspect_ratio": "custom", "width": 512, "height": 512}
    return {"prompt": "a tomato", "seed": seed, "num_inference_steps": steps, **size}


@contextmanager
def _service(weights: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The service with two replicas, ready; gives its address and its first process."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flux_lora.commands.service", "--port", str(PORT)],
            env={**os.environ, "FLUX_WEIGHTS": str(weights), "FLUX_REPLICAS": "2"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline, url = time.monotonic() + START_SECONDS, f"http://127.0.0.1:{PORT}"
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(log.read().decode())
                time.sleep(0.5)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def _is_ready(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/health").json().get("replicas") == 2)
    except (httpx.TransportError, ValueError):
        return False


def _overhead(client: httpx.Client, settings: Settings, rounds: int, steps: int) -> float:
    """Seconds that a request takes longer through the service than in this process, at the median."""
    generator = assemble(settings, log=lambda _: None)

    def served(number: int) -> object:
        return client.post("/predictions", json={"input": _inputs(number, steps)}).raise_for_status().json()

    def bare(number: int) -> object:
        return [path.read_bytes() for path in generator.draw(Request.parse(**_inputs(number, steps)))]

    differences, alone = [], []
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        for turn in range(-4, rounds):
            order = [served, bare] if turn % 2 else [bare, served]
            took = {draw: _seconds(partial(draw, turn % 1000)) for draw in order}
            if turn >= 0:
                differences.append(took[served] - took[bare])
                alone.append(took[bare])
    print(f"a request alone: {statistics.median(alone) * 1000:.0f} ms")
    return statistics.median(differences)


def _load(url: str, requests: list[dict[str, Any]]) -> None:
    with httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(4) as callers:
        for answer in callers.map(lambda inputs: client.post("/predictions", json={"input": inputs}), requests):
            if answer.json()["status"] != "succeeded":
                raise RuntimeError(f"A request failed, so nothing is measured: {answer.text[:500]}")


@contextmanager
def _standing_still(process: psutil.Process) -> Iterator[None]:
    """Stop a process and all below it meanwhile: even idle, Ray takes 75 ms of a core in each second."""
    stopped = [process, *process.children(recursive=True)]
    try:
        for one in stopped:
            with suppress(psutil.NoSuchProcess):
                one.suspend()
        yield
    finally:
        for one in stopped:
            with suppress(psutil.NoSuchProcess):
                one.resume()


@contextmanager
def _bare(settings: Settings) -> Iterator[list[Connection]]:
    """Two processes, ready, which draw the requests that they are sent and then answer."""
    context = multiprocessing.get_context("spawn")
    drawers = []
    for _ in range(2):
        here, there = context.Pipe()
        context.Process(target=_drawer, args=(settings, there), daemon=True).start()
        there.close()  # so that an end of the process is an end of the connection
        drawers.append(here)
    _draw_bare(drawers, [])
    try:
        yield drawers
    finally:
        for drawer in drawers:
            drawer.close()


def _draw_bare(drawers: list[Connection], requests: list[dict[str, Any]]) -> None:
    try:
        for number, drawer in enumerate(drawers):
            drawer.send(requests[number :: len(drawers)])
        for drawer in drawers:
            drawer.recv()
    except (EOFError, OSError):
        raise RuntimeError("A bare process has died, so nothing is measured.") from None


def _drawer(settings: Settings, requests: Connection) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:  # noqa: PTH123 - names of the system
        generator = assemble(settings, log=lambda _: None)
        with suppress(EOFError):  # there are no more
            while True:
                for inputs in requests.recv():
                    generator.draw(Request.parse(**inputs))
                requests.send(None)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
