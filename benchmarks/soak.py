"""The server as strangers treat it: whatever one request does, the next picture is the same to the bit.

    scripts/bench soak            # an hour at most
    scripts/bench soak --short    # some minutes

Real ``scripts/serve`` with the weights of FLUX_WEIGHTS. Requests are made by schemathesis from the served schema, LoRAs
by damaging good ones; then come cancels at random moments, kills, a full disk, read-only caches and too little memory.
After each the witness, one picture, must have the bytes of the first time. Nothing may hang, answer 500 or show a
traceback, and descriptors, threads, files and memory of the worker must not grow over the second half of a stage.
"""

import argparse
import base64
import contextlib
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import psutil
import schemathesis
from safetensors.torch import load_file, save

from benchmarks.measure import machine

WITNESS = {"prompt": "a witness", "seed": 7, "aspect_ratio": "custom", "width": 256, "height": 256}
WITNESS |= {"num_inference_steps": 2, "output_format": "png"}
LONG = WITNESS | {"num_inference_steps": 50, "num_outputs": 4, "width": 512, "height": 512}
HANG_SECONDS = 120
SAMPLES = 20
"""Measurements of a stage."""

GROWTH_BYTES = 64 * 2**20
"""How much more memory the second half of a stage may take than the first: allocators keep what they once had."""


class SoakError(Exception):
    """What must not happen, did."""


@dataclass
class Target:
    """A running server, and what its witness looked like at first."""

    url: str
    temporary: Path
    worker: psutil.Process
    command: subprocess.Popen[bytes] | None = None
    """``scripts/serve``, where this started it …"""
    log: Path | None = None
    """… and what it printed."""
    witness: str = ""
    plan: str = ""
    """The memory plan that drew the witness; the file names it."""
    counts: Counter[str] = field(default_factory=Counter)

    def send(self, body: object, path: str = "/predictions", method: str = "POST", **how: Any) -> httpx.Response:
        """Send a request, and again while the slot is taken; what must not come back raises SoakError."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **how}
        deadline = time.monotonic() + HANG_SECONDS
        while True:
            try:
                answer = httpx.request(method, self.url + path, content=content, headers=headers, timeout=HANG_SECONDS)
            except httpx.TimeoutException:
                raise SoakError(f"no answer for {HANG_SECONDS} s: {content[:300]!r}") from None
            if answer.status_code != 409:
                break
            if time.monotonic() > deadline:
                raise SoakError(f"the slot did not come back within {HANG_SECONDS} s, before {content[:300]!r}")
            time.sleep(0.02)
        if answer.status_code >= 500 or "Traceback" in answer.text:
            raise SoakError(f"{answer.status_code} {answer.text[:300]!r} for {content[:300]!r}")
        self.counts[str(answer.status_code)] += 1
        return answer

    def draw(self, **inputs: object) -> dict[str, Any]:
        """The answer to a valid request."""
        answer: dict[str, Any] = self.send({"input": inputs}).json()
        self.counts[str(answer.get("status", "no status"))] += 1
        return answer

    def check(self) -> None:
        """Draw the witness and compare it with the first one."""
        answer = self.draw(**WITNESS)
        if answer["status"] != "succeeded":
            raise SoakError(f"the witness failed: {answer.get('error')}")
        picture = answer["output"][0]
        plan = answer["metrics"]["memory_plan"]
        self.witness, self.plan = self.witness or picture, self.plan or plan
        if picture != self.witness:
            raise SoakError(f"the witness has changed, drawn under the memory plan {plan}, at first {self.plan}")

    def sizes(self) -> tuple[int, int, int, int]:
        """Memory in bytes, descriptors, threads, and files in the temporary directory."""
        files = sum(1 for path in self.temporary.rglob("*") if path.is_file())
        return self.worker.memory_info().rss, self.worker.num_fds(), self.worker.num_threads(), files


def fuzz(target: Target, requests: int, seed: int = 0) -> None:
    """Send what schemathesis makes of the served schema, right and wrong in turn; what would draw is made small."""
    schema = schemathesis.openapi.from_url(f"{target.url}/openapi.json")
    chance = random.Random(seed)
    for method, path in (("POST", "/predictions"), ("PUT", "/predictions/{prediction_id}")):
        for mode in schemathesis.GenerationMode:
            cases = schema[path][method].as_strategy(generation_mode=mode)
            _send_each(target, cases, method, path, max(1, requests // 4), chance)


def _send_each(target: Target, cases: Any, method: str, path: str, count: int, chance: random.Random) -> None:
    @hypothesis.seed(chance.randrange(2**32))
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def send(case: Any) -> None:
        place = path.replace("{prediction_id}", f"fuzz-{chance.randrange(10**9)}")  # ids are a front's to check
        target.send(_tamed(case.body, chance), place, method)

    send()


def _tamed(body: Any, chance: random.Random) -> object:
    """A generated body: without webhooks, which are a front's to check, and where it would draw, with few steps."""
    if not isinstance(body, dict | list | str | int | float | bool | bytes | None):
        return b""  # schemathesis' mark for none
    if not isinstance(body, dict):
        return body
    body = {name: value for name, value in body.items() if name not in ("webhook", "id")}
    if isinstance(inputs := body.get("input"), dict):
        steps = inputs.get("num_inference_steps", 28)
        if isinstance(steps, int) and 1 <= steps <= 50:
            inputs = inputs | {"num_inference_steps": 1 + steps % 2}
        if chance.random() < 0.7:
            inputs = {"prompt": "a tomato"} | inputs
        body["input"] = inputs
    return body


def hostile_sources(target: Target, lora: Path, count: int, seed: int = 0) -> None:
    """Name ``count`` LoRAs that cannot be applied: damaged files, and addresses that must not be asked."""
    chance = random.Random(seed)
    good, tensors = lora.read_bytes(), load_file(lora)
    addresses = (
        "https://127.0.0.1/x.safetensors", "https://[::1]/x.safetensors", "https://169.254.169.254/latest/meta-data",
        "http://example.com/x.safetensors", "https://localhost/x.safetensors", "file:///etc/passwd", "/etc/passwd",
        "../../etc/passwd", "..%2f..%2fetc/passwd", "ftp://example.com/x", "//example.com/x", "\x1b[31m", "a" * 5000,
        "data:,", "data:;base64,!!!!", "data:;base64," + "A" * 100_000, "data:," + "%41" * 50_000, "https://", "hf://",
        "~",
    )  # fmt: skip

    def damaged() -> bytes:
        data = bytearray(good)
        match chance.randrange(6):
            case 0:
                return bytes(data[: chance.randrange(len(data))])
            case 1:
                data[:8] = chance.randbytes(8)
            case 2:  # somewhere in the header
                for _ in range(chance.randrange(1, 20)):
                    data[8 + chance.randrange(min(4000, len(data) - 8))] = chance.randrange(256)
            case 3:
                return chance.randbytes(chance.randrange(5000))
            case 4:
                names = chance.sample(sorted(tensors), 3)
                return save({name: tensors[name].flatten()[: chance.randrange(1, 9)].contiguous() for name in names})
            case 5:
                first = next(iter(tensors))
                return save(tensors | {first: tensors[first] * float("nan")})
        return bytes(data)

    for number in range(count):
        file = "data:;base64," + base64.b64encode(damaged()).decode()
        target.draw(**WITNESS, replicate_weights=file if number % 3 else chance.choice(addresses))


def cancels(target: Target, count: int, seed: int = 0) -> None:
    """Cancel ``count`` predictions, each at a random moment; every tenth by hanging up."""
    chance = random.Random(seed)
    for number in range(count):
        inputs = LONG | {"lora_scale": chance.choice([0, 0.5, 1]), "seed": number}
        delay = chance.random() * 2
        if number % 10 == 9:
            _hang_up(target, {"input": inputs}, delay)
        else:
            path = f"/predictions/cancel-{number}"
            target.send({"input": inputs}, path, "PUT", Prefer="respond-async")
            time.sleep(delay)
            httpx.post(f"{target.url}{path}/cancel", timeout=HANG_SECONDS)
        target.counts["cancelled"] += 1


def _hang_up(target: Target, body: object, delay: float) -> None:
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(f"{target.url}/predictions", json=body, timeout=delay + 0.01)


def flat(target: Target, stage: Callable[[int], None], pieces: int = SAMPLES) -> str:
    """Run a stage in pieces, the witness after each, and hold it to what may not grow.

    Returns:
        A phrase for the table.
    """
    sizes, before = [], target.counts.copy()
    for piece in range(pieces):
        stage(piece)
        target.check()
        sizes.append(target.sizes())
    middle = len(sizes) // 2
    first, second = (list(zip(*half, strict=True)) for half in (sizes[middle // 2 : middle + 1], sizes[middle:]))
    grown = [max(later) - max(earlier) for earlier, later in zip(first, second, strict=True)]
    names, limits = ("memory", "descriptors", "threads", "files"), (GROWTH_BYTES, 4, 4, 8)
    for name, more, allowed in zip(names, grown, limits, strict=True):
        if more > allowed:
            raise SoakError(f"{name} grow: {more} more in the second half of {sizes}")
    if target.log and (text := target.log.read_text(errors="replace")).count("Traceback"):
        raise SoakError(f"a traceback in the log: {text[text.index('Traceback') :][:1000]!r}")
    made = target.counts - before
    said = ", ".join(f"{count} {name}" for name, count in sorted(made.items()))
    return f"{said}; second half: {grown[0] / 2**20:+.0f} MiB, {grown[1]:+d} descriptors, {grown[2]:+d} threads"


@contextmanager
def serving(folder: Path, prefix: Sequence[str] = (), **environment: str) -> Iterator[Target]:
    """Run ``scripts/serve`` in a folder of its own; ``prefix`` is a command that runs it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("tmp", "cache"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    log = (folder / "log").open("ab")
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "flux_lora.commands.serve", "--port", str(port)],
        env={**os.environ, "TMPDIR": str(folder / "tmp"), "FLUX_ADAPTER_CACHE": str(folder / "cache"), **environment},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not _ready(url):
            if process.poll() is not None:
                raise SoakError(f"the server ended: {(folder / 'log').read_text()[-500:]}")
            time.sleep(0.1)
        below = psutil.Process(process.pid).children(recursive=True)
        worker = max(below, key=lambda each: each.memory_info().rss)
        yield Target(url, folder / "tmp", worker, process, folder / "log")
    finally:
        process.terminate()
        process.wait(HANG_SECONDS)
        log.close()


def _ready(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/health-check", timeout=5).json()["status"] in ("READY", "BUSY"))
    except httpx.TransportError:
        return False


def kills(folder: Path, count: int, witness: str) -> str:
    """Kill the worker ``count`` times, in the middle of a picture: the server ends and says why, the next one draws."""
    for number in range(count):
        with serving(folder / f"kill-{number}") as target:
            target.witness = witness
            target.check()
            target.send({"input": LONG}, f"/predictions/kill-{number}", "PUT", Prefer="respond-async")
            time.sleep(random.Random(number).random())
            target.worker.kill()
            try:
                if target.command:
                    target.command.wait(30)
            except subprocess.TimeoutExpired:
                raise SoakError("the server goes on without the process that draws") from None
        said = (folder / f"kill-{number}" / "log").read_text()
        if "error: The process that draws has died" not in said:
            raise SoakError(f"the server ended without its reason: {said[-300:]}")
    return f"{count} ended with the reason"


def full_disk(folder: Path, witness: str) -> str:
    """Draw into a temporary directory that is full, then make room."""
    place = folder / "disk"
    mount = f'mount -t tmpfs -o size=1m tmpfs {place / "tmp"} && exec "$@"'
    (place / "tmp").mkdir(parents=True)
    with serving(place, ["unshare", "--mount", "/bin/sh", "-c", mount, "sh"]) as target:
        target.witness = witness
        target.check()
        filler = Path(f"/proc/{target.worker.pid}/root{place / 'tmp'}/filler")
        with contextlib.suppress(OSError):  # as much as there is room for
            filler.write_bytes(bytes(2**20))
        answer = target.draw(**LONG | {"num_inference_steps": 1, "output_format": "png"})
        if answer["status"] != "failed":
            raise SoakError("a picture was written onto a full disk")
        filler.unlink()
        target.check()
    return str(answer["error"])[-110:]


def read_only_caches(folder: Path, lora: Path, witness: str) -> str:
    """Ask for a LoRA that can be kept nowhere."""
    place = folder / "read-only"
    (place / "cache").mkdir(parents=True)
    mount = f'mount -t tmpfs -o ro,mode=0700 tmpfs {place / "cache"} && exec "$@"'
    with serving(place, ["unshare", "--mount", "/bin/sh", "-c", mount, "sh"]) as target:
        target.witness = witness
        target.check()
        source = "data:;base64," + base64.b64encode(lora.read_bytes()).decode()
        answer = target.draw(**WITNESS, replicate_weights=source)
        if answer["status"] != "failed" or "FLUX_ADAPTER_CACHE" not in str(answer["error"]):
            raise SoakError(f"a LoRA that can be kept nowhere: {answer}"[:300])
        target.check()
    return f"{answer['status']}: {answer.get('error', '')}"[-110:]


def little_memory(target: Target, rounds: int) -> str:
    """Let the worker have hardly more memory than it has, ask for large pictures, and give the memory back."""
    failed = 0
    for number in range(rounds):
        unlimited = target.worker.rlimit(psutil.RLIMIT_AS)
        room = target.worker.memory_info().vms + (16 + 32 * number) * 2**20
        target.worker.rlimit(psutil.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        try:
            answer = target.draw(**WITNESS | {"width": 1440, "height": 1440, "num_inference_steps": 1})
        finally:
            target.worker.rlimit(psutil.RLIMIT_AS, unlimited)
        failed += answer["status"] == "failed"
        target.check()
    return f"{failed} of {rounds} failed"


def main() -> int:
    """Print a row for each stage; exit with 1 when something happened that must not."""
    parser = argparse.ArgumentParser(prog="scripts/bench soak", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a twentieth of everything")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    part = 20 if options.short else 1
    weights = Path(os.environ["FLUX_WEIGHTS"]).absolute()
    os.environ["FLUX_WEIGHTS"] = str(weights)
    lora = weights / "lora.safetensors"
    print(machine())
    rows: list[tuple[str, ...]] = []

    def stage(name: str, run: Callable[[], str]) -> None:
        started = time.monotonic()
        try:
            said = run()
        except SoakError as error:
            said = f"FAILED: {error}"
        rows.append((name, f"{time.monotonic() - started:.0f} s", said))
        print(*rows[-1], sep=" · ", flush=True)

    with tempfile.TemporaryDirectory(prefix="flux-lora-soak-") as place:
        folder = Path(place)
        with serving(folder / "main") as target:
            target.check()

            def piece(run: Callable[..., None], total: int, *arguments: Any) -> Callable[[], str]:
                each = max(4, total // part // SAMPLES)
                pieces = max(4, total // part // each)
                return lambda: flat(target, lambda n: run(target, *arguments, each, seed=options.seed + n), pieces)

            stage("requests from the schema", piece(fuzz, 2000))
            stage("hostile sources", piece(hostile_sources, 300, lora))
            stage("cancels", piece(cancels, 200))
            stage("too little memory", lambda: little_memory(target, max(2, 20 // part)))
            witness = target.witness
            print(", ".join(f"{count} {name}" for name, count in sorted(target.counts.items())))
        stage("kills of the worker", lambda: kills(folder, max(1, 20 // part), witness))
        if shutil.which("unshare") and os.geteuid() == 0:
            stage("full disk", lambda: full_disk(folder, witness))
            stage("read-only caches", lambda: read_only_caches(folder, lora, witness))
    return int(any("FAILED" in row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
