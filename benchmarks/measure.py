"""Timing: side by side, all contenders taking turns so that a slow minute hits each of them, and of a GPU's work."""

import gc
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version

import torch

Contender = Callable[[int], object]


def take_turns(contenders: Mapping[str, Contender], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each contender in each round; a contender is called with the round's number."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-warm_up, rounds):
        for name in random.Random(turn).sample(list(contenders), len(contenders)):
            started = time.perf_counter()
            contenders[name](turn)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def table(seconds: Mapping[str, list[float]], reference: str) -> str:
    """Median, spread and ratio to the reference's median of each contender."""
    base = statistics.median(seconds[reference])
    rows = [f"{'':44}{'median':>10}{'fastest':>10}{'slowest':>10}{'ratio':>8}"]
    for name, values in seconds.items():
        median = statistics.median(values)
        rows.append(f"{name:44}{median:9.3f}s{min(values):9.3f}s{max(values):9.3f}s{median / base:8.3f}")
    return "\n".join(rows)


def median_seconds(work: Contender, times: int) -> float:
    """The median of some calls, after one that does not count; a call is told its number, that one −1."""
    work(-1)
    return statistics.median(call_seconds(partial(work, turn)) for turn in range(times))


def call_seconds(work: Callable[[], object]) -> float:
    """Seconds of a call, and of what it asked of the GPU."""
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def wait() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Give back memory that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine() -> str:
    """What the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    return f"{device} ({platform.machine()}); Python {platform.python_version()}, {versions}"
