"""Peak host memory at set-up, on a generated weights directory.

    scripts/bench setup --gigabytes 2

Target: peak anonymous host memory at most what stays resident there plus 1.2 times the largest single file.
"""

import argparse
import re
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import machine
from flux_lora.checkpoint.assembling import open_directory
from flux_lora.memory import placement
from flux_lora.settings import Settings
from training import random_weights

ALLOWED_FILES = 1.2


def main() -> int:
    """Print the numbers for each type on the CPU, or for the GPU; exit with 1 when the target is missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench setup", description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the generated weights")
    parser.add_argument("--folder", type=Path, help="where to generate them (default: a temporary folder)")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    print(machine())
    missed = False
    with TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        random_weights.write(folder, _sizes(options.gigabytes))
        files = [file.stat().st_size for file in folder.glob("*/**/*.safetensors")]
        print(f"weights: {sum(files) / 1e9:.2f} GB in {len(files)} files, the largest {max(files) / 1e9:.2f} GB\n")
        for dtype in (torch.bfloat16,) if cuda else (torch.bfloat16, torch.float32):
            missed |= _measure(folder, torch.device("cuda:0" if cuda else "cpu"), dtype, max(files))
    return int(missed)


def _measure(folder: Path, device: torch.device, dtype: torch.dtype, largest: int) -> bool:
    with Peak() as peak:
        started = time.perf_counter()
        settings = Settings(weights=folder, memory_plan="resident")
        loaded = placement.place(open_directory(folder, dtype), settings, device, dtype, lambda _: None)
        seconds = time.perf_counter() - started
    extra = peak.highest - max(peak.after, peak.before)
    print(
        f"{device!s:8}{str(dtype).removeprefix('torch.'):10}{seconds:6.1f} s   resident anonymous "
        f"{(peak.after - peak.before) / 1e9:.2f} GB   peak above it {extra / 1e9:.2f} GB = "
        f"{extra / largest:.2f} of the largest file (target at most {ALLOWED_FILES})"
    )
    del loaded
    return extra > ALLOWED_FILES * largest


class Peak:
    """Watches the anonymous memory of this process."""

    def __enter__(self) -> "Peak":
        """Begin to watch."""
        self.before = self.highest = _anonymous_bytes()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.highest = max(self.highest, _anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        """End watching."""
        self.after = _anonymous_bytes()
        self._done.set()
        self._watcher.join()


def _anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not found:
        raise SystemExit("This benchmark reads /proc/self/status and needs Linux.")
    return int(found[1]) * 1024


def _sizes(gigabytes: float) -> dict[str, dict[str, object]]:
    """Transformers of 16 heads × 128, with as many single blocks as fill most of the size, and a T5 of 0.4 GB."""
    single_blocks = max(1, round((gigabytes - 0.6) / 2 / 0.118) - 2)
    return {
        **random_weights.MINI,
        "transformer": {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": single_blocks,
            "attention_head_dim": 128,
            "num_attention_heads": 16,
            "axes_dims_rope": (16, 56, 56),
        },
        "t5": {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 4, "num_heads": 32},
    }


if __name__ == "__main__":
    sys.exit(main())
