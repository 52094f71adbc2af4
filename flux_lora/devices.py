"""The device that draws: choosing it, naming it, and how much memory it has left."""

import psutil
import torch

from flux_lora.errors import SettingsError


def choose(name: str) -> torch.device:
    """The device that ``FLUX_DEVICE`` names; ``auto`` is the first CUDA device, else the CPU.

    Raises:
        SettingsError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu, cuda and cuda:N are served")
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
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def computes(device: torch.device) -> bool:
    """Whether a device still gives right results."""
    try:
        return bool((torch.ones(2, device=device).sum() == 2).item())
    except RuntimeError:
        return False
