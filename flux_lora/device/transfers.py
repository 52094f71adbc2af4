"""Memory that a GPU copies from by itself, and copies that run beside the computation: all that is CUDA's own.

On a CPU the same calls make plain copies, so that everything above this file is tested without a GPU.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 512
"""Bytes to which tensors are aligned in an arena, as PyTorch's own allocator aligns them on a GPU."""


def host_memory(size: int, device: torch.device) -> Tensor:
    """``size`` bytes of host memory, pinned for ``device`` if that is a GPU and the system lets it be.

    Registered rather than allocated by CUDA: PyTorch's allocator of pinned memory rounds up to a power of two.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size:
        cudart: Any = torch.cuda.cudart()
        address = memory.data_ptr()
        if int(cudart.cudaHostRegister(address, size, 1)) == 0:  # 1: cudaHostRegisterPortable
            weakref.finalize(memory.untyped_storage(), cudart.cudaHostUnregister, address)
    return memory


@dataclass(frozen=True)
class Arena:
    """Tensors that lie in one stretch of memory, which is copied at once."""

    memory: Tensor
    tensors: Mapping[str, Tensor]


def lay_out(shapes: Mapping[str, torch.Size], dtype: torch.dtype, get: Callable[[int], Tensor]) -> Arena:
    """Lay tensors out in memory; ``get`` gives as many bytes of it as it is asked for."""
    end, places = 0, {}
    for name, shape in shapes.items():
        places[name] = (end, end + shape.numel() * dtype.itemsize)
        end += -(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    memory = get(end)
    return Arena(memory, {name: memory[a:b].view(dtype).view(shapes[name]) for name, (a, b) in places.items()})


def event() -> torch.cuda.Event:
    """A mark in a GPU's work that can be waited for."""
    made: torch.cuda.Event = torch.cuda.Event()
    return made


def _stream(device: torch.device) -> torch.cuda.Stream:
    made: torch.cuda.Stream = torch.cuda.Stream(device)
    return made


class Lane:
    """Copies from the host that run beside the computation, each after what the computation had been given by then."""

    def __init__(self, device: torch.device) -> None:
        """Make a lane to ``device``."""
        self._device = device
        self._stream = _stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Begin a copy; what was asked of the device before may still read ``target``.

        Returns:
            What to hand to `wait` before the copy is used.
        """
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            arrived = event()
            arrived.record(self._stream)
        return arrived

    def wait(self, arrived: torch.cuda.Event | None) -> None:
        """Let what is asked of the device from now on wait for a copy."""
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)

    def drain(self) -> None:
        """Let what is asked of the device from now on wait for all copies: their targets may be freed then."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def finish(self) -> None:
        """Wait until all copies are done: their sources may be changed then."""
        if self._stream is not None:
            self._stream.synchronize()


def release(device: torch.device) -> None:
    """Give memory that nothing holds any more back to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
