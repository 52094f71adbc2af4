"""The device that draws: choosing it, naming it, and how much memory it has left."""

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from flux_lora.errors import SettingsError

CGROUP = Path("/sys/fs/cgroup")
CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def find_device(name: str) -> torch.device:
    """Find the device that ``FLUX_DEVICE`` names; ``auto`` is the first CUDA device, else the CPU.

    Raises:
        SettingsError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise SettingsError(f"FLUX_DEVICE={name} cannot be used: take auto, cpu, cuda or cuda:N.")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"FLUX_DEVICE={name} cannot be used: {reason}") from None
    return torch.device("cuda:0") if name == "cuda" else device


def describe(device: torch.device) -> str:
    """What may change the last bits of a picture: the GPU's name, or the CPU's instruction set and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; what a container may use counts as the host's memory.

    On a GPU the allocator's cap (``torch.cuda.set_per_process_memory_fraction``) counts too.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        cached = torch.cuda.memory_reserved(device) - allocated
        return min(free + cached, int(torch.cuda.get_per_process_memory_fraction(device) * total) - allocated)
    return min([int(psutil.virtual_memory().available), *_container_memory(), *_address_space()])


def held_memory(device: torch.device) -> int:
    """Bytes of a device that this process has allocated."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(psutil.Process().memory_info().rss)


def cap(device: torch.device, size: int) -> None:
    """Let this process's tensors take at most ``size`` bytes of a GPU, or less where a smaller cap is in force."""
    total = torch.cuda.mem_get_info(device)[1]
    fraction = min(size / total, torch.cuda.get_per_process_memory_fraction(device))
    torch.cuda.set_per_process_memory_fraction(fraction, device)


def _container_memory() -> Iterator[int]:
    """What is left of the memory limit of this process's control group, if it has one (cgroup v2, then v1)."""
    for folder, limit, used in (("", "memory.max", "memory.current"), ("memory", *CGROUP_V1)):
        try:
            most, now = (int((CGROUP / folder / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # no such group, or the limit is "max"
            continue
        yield max(0, most - now)


def _address_space() -> Iterator[int]:
    """What is left of this process's address space, where it is limited (``ulimit -v``)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield max(0, limit - int(psutil.Process().memory_info().vms))


def computes(device: torch.device) -> bool:
    """Whether a device still gives right results."""
    try:
        return bool((torch.ones(2, device=device).sum() == 2).item())
    except RuntimeError:
        return False
