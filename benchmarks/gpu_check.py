"""All that is worth measuring on a GPU, in one command: most important first, within the time there is.

Before the machine is asked for, put what it lacks beside PyTorch into .site/ (one archive, for Python 3.12 on x86-64):

    scripts/bench gpu_check --prepare

There, in a bare checkout that has .site/ too, without a network:

    python3 -m tarfile -e .site/site.tar.xz /tmp/site && export PYTHONPATH=/tmp/site
    python3 -m benchmarks.gpu_check --out RESULTS

Each part runs in a process of its own with a limit of its own. What it finds is in RESULTS as soon as it is found:
gpu.json (the rows of `scripts/bench gpu`), kernels.json, products.json, card.json, memory.json, check.json (which
parts are done, and their times), and log.txt. No part begins for which too little of --seconds (400) is left, so a
second call does the rest:

    python3 -m benchmarks.gpu_check --out MORE-RESULTS --resume RESULTS

On the same machine the second call finds what the first one has compiled. The first is expected to measure exact,
peer2, balanced and fast; the second peer2-fp8, a warm start, the tests that compile, peer1, merging and the kernels,
and the VAE's encoder; a third the products by templates, schnell, the other tests and the rest. Afterwards, anywhere:
`scripts/bench gpu table --results MORE-RESULTS`.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / ".site"

GPU = ("-m", "benchmarks.gpu")
RESULTS, SMALL, CACHE = "{results}", "{small}", "{cache}"
COMPILED, UNCOMPILED = "{compiled tests}", "{other tests}"


@dataclass(frozen=True)
class Part:
    """Something to run."""

    name: str
    seconds: int
    """What it is expected to take, on an H100 of which nothing is compiled yet."""
    limit: int
    """After so many seconds it is ended."""
    command: tuple[str, ...]
    """Arguments for Python; those in braces are filled in."""
    needs: str = ""
    """A module without which it is left out."""
    instead_of: str = ""
    """A part: it is run only when that one was run in vain."""


def _row(
    name: str,
    row: str,
    seconds: int,
    limit: int,
    *measures: str,
    images: int = 2,
    needs: str = "",
    instead_of: str = "",
) -> Part:
    command = (
        *GPU,
        row,
        "--measure",
        *measures,
        "--images",
        str(images),
        "--results",
        RESULTS,
        "--cache",
        CACHE,
        SMALL,
    )
    return Part(name, seconds, limit, command, needs, instead_of)


TESTS = ("-m", "pytest", "-rfE", "--durations=8", "tests/test_cuda.py")

KERNELS = ("-m", "benchmarks.kernels", SMALL)

PARTS = (
    _row("exact", "exact", 130, 210, "dev", "four", "steps", "kernels", "switch", images=3),
    _row("peer2", "peer2", 130, 240, "dev"),
    _row("by-blocks", "peer2-blocks", 90, 200, "dev", instead_of="peer2"),
    _row("balanced", "balanced", 85, 150, "dev", "four", "steps", "kernels", "switch", images=3),
    _row("fast", "fast", 45, 100, "dev", images=3),
    _row("peer2-fp8", "peer2-fp8", 140, 240, "dev", needs="torchao"),
    _row("warm", "exact", 40, 90, "first"),
    Part("compiled", 105, 200, (*TESTS, "-n", "4", "-k", COMPILED)),
    _row("peer1", "peer1", 45, 100, "dev"),
    Part("kernels", 40, 90, (*KERNELS, "--parts", "merge,kernels,attention,host", "--json", f"{RESULTS}/kernels.json")),
    Part("encode", 25, 60, ("-m", "benchmarks.encode", "--vae", SMALL)),
    Part("products", 80, 150, (*KERNELS, "--parts", "products", "--json", f"{RESULTS}/products.json")),
    _row("schnell", "exact", 40, 100, "schnell", images=3),
    Part("tests", 40, 100, (*TESTS, "-n", "4", "-k", UNCOMPILED)),
    Part("card", 25, 60, ("-m", "benchmarks.card", "--results", RESULTS, SMALL)),
    Part(
        "memory",
        50,
        100,
        ("-m", "benchmarks.memory", "--budgets", "24", "--models", "dev", "--ours", "--results", RESULTS, SMALL),
    ),
    Part("blocks", 90, 150, (*KERNELS, "--parts", "blocks,references", "--json", f"{RESULTS}/blocks.json")),
    _row("turns", "exact", 60, 120, "turns"),
    _row("sizes", "exact", 40, 90, "wide", "sizes"),
    _row("warm-balanced", "balanced", 40, 90, "first"),
    _row("schnell-balanced", "balanced", 45, 100, "schnell"),
    _row("peer2-kernels", "peer2", 60, 240, "kernels", "switch"),
    _row("reference", "peer1", 40, 100, "reference"),
    _row("peer2-blocks", "peer2-blocks", 100, 200, "dev"),
    _row("peer2-autotune", "peer2-autotune", 300, 400, "dev"),
)
"""In the order of their worth: what was not measured since it changed, and the peers on the same card, come first."""

DONE, LEFT_OUT = "done", "left out"

HAVE = """
accelerate annotated-doc anyio certifi charset-normalizer click colorama coverage filelock flatbuffers fsspec h11 hf-xet
httpcore httpx hypothesis idna jinja2 markdown-it-py markupsafe mdurl mpmath networkx numpy onnxruntime packaging pillow
protobuf psutil pygments pytest pytest-timeout pytest-xdist pyyaml regex requests rich safetensors setuptools
shellingham sympy torch tqdm triton typer urllib3 zipp
"""
"""What an image for PyTorch brings along, as the one that this was first run on; requirements beyond it travel."""

FOR_THE_CHECK = ("peft",)
"""What is taken from requirements-dev.txt."""

ALONE = (
    "torchao==0.18.0",
    "annotated-types==0.8.0",
    "importlib_metadata==10.2.0",
    "python-dotenv==1.2.4",
    "truststore==0.10.5",
    "typing-extensions==4.16.0",
    "typing-inspection==0.4.5",
)
"""What peer2-fp8 needs; and what requirements need, where they do not say so themselves."""

PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
PYTHON = "3.12"


def main() -> int:
    """Run the parts; 1 when one of them fails."""
    options = _options()
    if options.prepare:
        return _prepare()
    names = options.only or [part.name for part in PARTS]
    with TemporaryDirectory() as empty:
        check = Check(options.out, options.small, options.seconds, Path(empty))
        check.resume(options.resume)
        parts = sorted((part for part in PARTS if part.name in names), key=lambda part: check.has_tried(part.name))
        for part in parts:
            check.run(part)
    print(check.summary(), flush=True)
    return int(any(check.failed(part.name) for part in parts))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepare", action="store_true", help="make .site/, here, with a network")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="a folder for the results")
    parser.add_argument("--resume", type=Path, help="results of an earlier call, whose parts are not run again")
    parser.add_argument("--seconds", type=float, default=400, help="what the call may take")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts")
    parser.add_argument("--small", action="store_true", help="a small model, to try it on a CPU")
    return parser.parse_args()


class Check:
    """One call: runs parts, and writes down at once how they end."""

    def __init__(self, out: Path, small: bool, seconds: float, empty: Path) -> None:
        """Begin.

        Args:
            out: a folder for the results.
            small: whether a small model is to be tried.
            seconds: what the call may take.
            empty: a folder, without anything that was compiled before, for a machine that must not be kept from it.
        """
        out.mkdir(parents=True, exist_ok=True)
        self._out, self._small, self._end = out.resolve(), small, time.monotonic() + seconds
        self._file = self._out / "check.json"
        self._cache = empty / "cache" if small else Path(gettempdir()) / "flux-lora-check"
        self._parts: dict[str, Any] = {}

    def resume(self, earlier: Path | None) -> None:
        """Go on from the results of an earlier call."""
        if earlier and earlier.resolve() != self._out:
            for file in sorted(earlier.iterdir()):
                if file.is_file():
                    shutil.copyfile(file, self._out / file.name)
        if earlier and self._file.exists():
            self._parts = json.loads(self._file.read_text())

    def has_tried(self, name: str) -> bool:
        """Whether an earlier call has run a part, with success or without."""
        return name in self._parts and self._parts[name]["outcome"] != LEFT_OUT

    def failed(self, name: str) -> bool:
        """Whether a part was run, and failed."""
        return self.has_tried(name) and self._parts[name]["outcome"] != DONE

    def run(self, part: Part) -> None:
        """Run a part, unless it is done, there is too little time for it, or nothing to run."""
        left = self._end - time.monotonic()
        if self._parts.get(part.name, {}).get("outcome") == DONE:
            return
        if part.instead_of and not self.failed(part.instead_of):
            return
        if part.needs and not _is_there(part.needs):
            self._note(part, LEFT_OUT, 0, f"there is no {part.needs}")
        elif left < part.seconds and not self._small:
            self._note(part, LEFT_OUT, 0, f"{left:.0f} s were left, and it takes {part.seconds}")
        else:
            started = time.monotonic()
            outcome, tail = self._run(part, left if self._small else min(part.limit, left))
            self._note(part, outcome, time.monotonic() - started, tail)

    def summary(self) -> str:
        """Tell how each part ended, and show the rows."""
        lines = [f"{name:18}{part['outcome']:24}{part['seconds']:7.1f} s" for name, part in self._parts.items()]
        table = [sys.executable, *GPU, "table", "--results", str(self._out), *(["--small"] if self._small else [])]
        shown = subprocess.run(table, cwd=ROOT, capture_output=True, text=True, check=False)
        return "\n".join([*lines, shown.stdout, shown.stderr[-2000:]])

    def _run(self, part: Part, limit: float) -> tuple[str, str]:
        where = "" if self._small else " and not cpu"
        filled = {
            RESULTS: str(self._out),
            SMALL: "--small" if self._small else "",
            CACHE: str(self._cache),
            COMPILED: f"compiled{where}",
            UNCOMPILED: f"not compiled{where}",
        }
        command = [sys.executable]
        for argument in part.command:
            for name, value in filled.items():
                argument = argument.replace(name, value)
            command += [argument] if argument else []
        print(f"{part.name}: at most {limit:.0f} s", flush=True)
        with (self._out / "log.txt").open("ab") as log:
            log.write(f"\n=== {part.name}: {' '.join(command)}\n".encode())
            log.flush()
            start = log.tell()
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            # A group of its own: what it has started (compilers, workers) ends with it.
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, process_group=0
            )
            try:
                code = process.wait(limit)
                outcome = DONE if code == 0 else f"failed with {code}"
            except subprocess.TimeoutExpired:
                outcome = f"ended after {limit:.0f} s"
            finally:
                _end(process)
        with (self._out / "log.txt").open("rb") as log:
            return outcome, _tail(log, start)

    def _note(self, part: Part, outcome: str, seconds: float, tail: str) -> None:
        self._parts[part.name] = {"outcome": outcome, "seconds": round(seconds, 1), "tail": tail}
        unfinished = self._file.with_suffix(".part")
        unfinished.write_text(json.dumps(self._parts, indent=2) + "\n")
        unfinished.replace(self._file)
        print(f"{part.name}: {outcome}, {seconds:.1f} s", flush=True)
        if outcome not in (DONE, LEFT_OUT):
            print(tail, flush=True)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it has started, and wait for it."""
    with suppress(ProcessLookupError):  # all of it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: BinaryIO, start: int, size: int = 1500) -> str:
    end = log.seek(0, os.SEEK_END)
    log.seek(max(start, end - size))
    return log.read().decode(errors="replace")


def _is_there(module: str) -> bool:
    return find_spec(module) is not None


# Before


def _prepare() -> int:
    """Install what an image lacks into a folder, for that machine's Python, and pack it."""
    packages = wanted((ROOT / "requirements.txt").read_text(), (ROOT / "requirements-dev.txt").read_text())
    platforms = [f"--platform={name}_x86_64" for name in PLATFORMS]
    SITE.mkdir(exist_ok=True)
    archive = SITE / "site.tar.xz"
    with TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-compile", "--only-binary=:all:"]
        install += ["--implementation=cp", f"--python-version={PYTHON}", *platforms, f"--target={folder}", *packages]
        subprocess.run(install, check=True)
        print(f"{', '.join(packages)}; packing them takes a while", flush=True)
        with tarfile.open(archive, "w:xz", preset=1) as packed:  # a higher one takes minutes for a tenth
            packed.add(folder, ".")
    tree = _travelling() + archive.stat().st_size
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB; with the checkout's files {tree / 2**20:.1f} MiB")
    return 0


def wanted(requirements: str, development: str) -> list[str]:
    """The requirements that an image lacks, as ``name==version``."""
    pinned = _pinned(requirements) | {
        name: version for name, version in _pinned(development).items() if name in FOR_THE_CHECK
    }
    alone = {name: version for name, version in _pinned("\n".join(ALONE)).items() if name not in pinned}
    return sorted(f"{name}=={version}" for name, version in (pinned | alone).items() if name not in HAVE.split())


def _pinned(requirements: str) -> dict[str, str]:
    """Names and versions of a file of requirements, with or without hashes, that are for this kind of machine."""
    found = re.findall(r"^([A-Za-z0-9_.-]+) ?==([^\s;\\]+)[ \t]*(;.*)?", requirements, re.MULTILINE)
    return {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, version, condition in found
        if "emscripten'" not in condition.replace("!= 'emscripten'", "") and "win32" not in condition
    }


def _travelling() -> int:
    """Bytes of the files that git knows, or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files: Sequence[Path] = [ROOT / name for name in names if name]
    return sum(file.stat().st_size for file in files if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
