"""What is measured to be the fastest, once for each device and software version, and then kept.

Another choice rounds differently, so what was chosen is kept in a file and taken again by the next process.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from flux_lora.device import devices
from flux_lora.storage import trusted_bytes, write_whole

PACKAGES = ("torch", "diffusers", "flash-attn", "flash-attn-3", "flash-attn-4", "sageattention")
"""Those whose versions decide what is fast."""


def choose_fastest(
    kind: str,
    candidates: tuple[str, ...],
    shape: Mapping[str, object],
    device: torch.device,
    folder: Path,
    measure: Callable[[str], float | None],
) -> tuple[str, bool]:
    """The fastest candidate, from the file of an earlier choice if there is one; and whether it was measured just now.

    Args:
        kind: of the choice, in the file's name.
        candidates: names; a single one is taken without measuring, and the first where none can be used.
        shape: what the times depend on.
        device: likewise.
        folder: where choices are kept, a directory of the operator's own; where it cannot be written to, nothing is.
        measure: seconds of a candidate, None when it cannot be used.

    Raises:
        SettingsError: the directory is not this user's alone.
    """
    if len(candidates) == 1:
        return candidates[0], False
    key = {"device": devices.describe(device), **shape, "candidates": candidates, **_versions()}
    file = folder / f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    kept = b""
    with suppress(OSError):
        kept = trusted_bytes(file, "FLUX_CACHE")
    with suppress(ValueError, KeyError, TypeError):
        if (known := json.loads(kept)["choice"]) in candidates:
            return str(known), False
    timed = {name: measure(name) for name in candidates}
    usable = {name: spent for name, spent in timed.items() if spent is not None}
    name = min(usable, key=lambda candidate: usable[candidate], default=candidates[0])
    with suppress(OSError):
        write_whole(file, (json.dumps({"choice": name, "seconds": timed, "key": key}, indent=2) + "\n").encode())
    return name, True


def time_call(work: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """Measure the seconds of a call: the mean of some, after they were begun at once."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(rounds):
        work()
    _wait(device)
    return (time.perf_counter() - started) / rounds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _versions() -> Mapping[str, str]:
    found = {"cuda": str(torch.version.cuda)}
    found["cudnn"] = str(torch.backends.cudnn.version())
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
