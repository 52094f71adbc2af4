"""Loading weights against a plain read of the same files, and the host memory that it takes.

    scripts/bench loading --gigabytes 4

Cold, the files' pages are dropped from the cache before each turn (posix_fadvise); where the system keeps some, the
turn counts as warm. Targets: cold at most 1.3 times the read; warm, on a GPU, at most 1.5 times the copy to the device.
"""

import argparse
import mmap
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from benchmarks.measure import machine, table, take_turns
from benchmarks.setup import Peak
from flux_lora.checkpoint.reading import fill, stored_tensors

OURS, READ, COPY, THEIRS = "ours", "plain read of the files", "copy to the device", "safetensors' load_file"
MAX_OVER_READ, MAX_OVER_COPY = 1.3, 1.5
FILES = 4


def main() -> int:
    """Print the tables, cold and warm; exit with 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench loading", description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the generated weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to generate them (default: a temporary folder)")
    options = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    print(machine())
    missed = False
    with TemporaryDirectory(dir=options.folder) as name:
        files = _generate(Path(name), options.gigabytes)
        total = sum(file.stat().st_size for file in files)
        print(f"{total / 1e9:.2f} GB in {len(files)} files, bfloat16, to {device}\n")
        with Peak() as peak:
            loaded = _ours(files, device)
        resident = sum(tensor.nbytes for tensor in loaded if tensor.device.type == "cpu")
        extra = peak.highest - peak.before - resident
        print(f"peak host memory above the loaded weights: {extra / 1e6:.0f} MB\n")
        del loaded
        for cold in (True, False):
            missed |= _measure(files, device, options.rounds, cold)
    return int(missed)


def _measure(files: list[Path], device: torch.device, rounds: int, cold: bool) -> bool:
    left: list[float] = []

    def prepared(work: Callable[[], object]) -> Callable[[int], None]:
        def run(_: int) -> None:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    contenders = {READ: lambda: _read(files), OURS: lambda: _ours(files, device)}
    if device.type == "cuda" and not cold:
        source = [torch.empty(file.stat().st_size, dtype=torch.uint8, pin_memory=True) for file in files]
        contenders[COPY] = lambda: [tensor.to(device, non_blocking=True) for tensor in source]
    seconds = {name: [0.0] * 0 for name in contenders}
    for _ in range(rounds + 1):
        for name, work in contenders.items():
            if cold:
                left.append(_drop(files))
            seconds[name] += take_turns({name: prepared(work)}, 1, warm_up=0)[name]
    seconds = {name: values[1:] for name, values in seconds.items()}
    truly = cold and max(left) < 0.01
    print("cold" if truly else f"warm ({max(left):.0%} of the pages could not be dropped)" if cold else "warm")
    reference = COPY if COPY in contenders else READ
    print(table(seconds, reference))
    ratio = statistics.median(seconds[OURS]) / statistics.median(seconds[reference])
    if truly:
        print(f"target: at most {MAX_OVER_READ} × the read, measured {ratio:.2f}\n")
        return ratio > MAX_OVER_READ
    if reference == COPY:
        print(f"target: at most {MAX_OVER_COPY} × the copy to the device, measured {ratio:.2f}\n")
        return ratio > MAX_OVER_COPY
    print("no target without a GPU; the copy to a device: not yet measured\n")
    return False


def _ours(files: list[Path], device: torch.device) -> list[torch.Tensor]:
    stored = [tensor for file in files for _, tensor in stored_tensors(file)]
    targets = [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in stored]
    fill(zip(stored, targets, strict=True))
    return targets


def _read(files: list[Path]) -> None:
    buffer = bytearray(16 * 2**20)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def _drop(files: list[Path]) -> float:
    """Drop the files' pages from the cache; returns which part of them is still there."""
    there = pages = 0
    for file in files:
        with file.open("r+b") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            there, pages = there + _cached_pages(stream.fileno()), pages + -(-file.stat().st_size // mmap.PAGESIZE)
    return there / pages


def _cached_pages(file: int) -> int:
    import ctypes

    size = os.fstat(file).st_size
    library = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(file, size) as mapped:
        begin = ctypes.c_char.from_buffer(mapped)
        present = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        failed = library.mincore(ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(size), present)
        del begin
    return len(present) if failed else sum(page & 1 for page in present)


def _generate(folder: Path, gigabytes: float) -> list[Path]:
    layers = max(1, round(gigabytes * 1e9 / FILES / (2 * 3072 * 12288)))
    files = []
    for index in range(FILES):
        tensors = {f"layers.{n}.weight": torch.full((12288, 3072), n, dtype=torch.bfloat16) for n in range(layers)}
        files.append(folder / f"model-{index}.safetensors")
        save_file(tensors, files[-1])
    return files


if __name__ == "__main__":
    sys.exit(main())
