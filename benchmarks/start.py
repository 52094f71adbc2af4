"""From Enter to the first step of scripts/predict, against the one import that takes most of it.

    scripts/bench start

All are fresh processes with everything in the page cache. The import is diffusers' FLUX transformer, which nobody who
draws with diffusers is spared; it brings PyTorch, and `torch._dynamo`. Target: at most 2 s more than that.
"""

import argparse
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Contender, machine, table, take_turns
from flux_lora.commands import PROJECT

THE_IMPORT, OURS = "diffusers' FLUX transformer imported", "scripts/predict, Enter to first step"
IMPORTS = {
    "torch imported": "import torch",
    THE_IMPORT: "from diffusers import FluxTransformer2DModel",
    "all of ours imported": "import flux_lora.assembly",
}
STEP = "1/28"
MOST_OVER = 2.0
"""Seconds."""


def main() -> int:
    """Print the table; exit with 1 when the target is missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench start", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(machine(), flush=True)
    with TemporaryDirectory() as folder:
        contenders: dict[str, Contender] = {name: partial(_import, code) for name, code in IMPORTS.items()}
        contenders[OURS] = partial(first_step, Path(folder))
        seconds = take_turns(contenders, options.rounds, warm_up=1)
    print(table(seconds, THE_IMPORT))
    over = statistics.median(seconds[OURS]) - statistics.median(seconds[THE_IMPORT])
    print(f"target: at most {MOST_OVER:g} s over the import, measured {over:.2f} s")
    return int(over > MOST_OVER)


def _import(code: str, _: int = 0) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, stderr=subprocess.DEVNULL, check=True)


def first_step(folder: Path, _: int = 0) -> None:
    """Call scripts/predict for a picture in a folder, and end it once it has taken a step."""
    command = ["scripts/predict", "-i", "prompt=a tomato", "-i", "num_inference_steps=28", "-o", str(folder)]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with process:
        log = []
        for line in process.stderr or ():
            log.append(line)
            if STEP in line:
                process.kill()
                return
        raise RuntimeError(f"scripts/predict took no step: {''.join(log[-5:])}")


if __name__ == "__main__":
    sys.exit(main())
