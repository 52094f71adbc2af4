"""Blocks of a network that stay in host memory and pass through a few slots of device memory as they compute.

diffusers' group offloading does this too, but a copy of its own of all weights, which a merge would not reach, is what
it sends; and it sends each block at each step, where here those that fit stay on the device.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flux_lora.device.transfers import Lane, host_memory, lay_out
from flux_lora.memory.plans import SLOTS


class StreamedBlock:
    """One block, and its weights in the host."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
        """Make room in the host for a block's parameters, by their names within the network; it is not filled yet."""
        self._parameters = parameters
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._dtype = next(iter(parameters.values())).dtype
        self.host = lay_out(self._shapes, self._dtype, lambda size: host_memory(size, device))

    def within(self, slot: Tensor) -> Mapping[str, Tensor]:
        """The weights as they lie in a slot."""
        return lay_out(self._shapes, self._dtype, lambda size: slot[:size]).tensors

    def use(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the block compute with these weights, by name."""
        for name, parameter in self._parameters.items():
            parameter.data = tensors[name]


class Stream:
    """Sends blocks through slots, in the order in which they compute, again and again."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        blocks: Sequence[StreamedBlock],
        device: torch.device,
        lane: Lane | None = None,
    ) -> None:
        """Take the modules, in the order in which they compute, and the weights of each.

        Args:
            modules: whose calls send the blocks.
            blocks: the weights of each module.
            device: computes.
            lane: copies to the device; None: one of its own.
        """
        self._blocks = blocks
        self._device = device
        self._lane = lane or Lane(device)
        self.slots: list[Tensor] = []
        """The device memory that blocks pass through; empty while nothing computes."""
        self._free: list[int] = []
        self._coming: dict[int, tuple[int, Any]] = {}  # block -> its slot, and what to wait for
        # A module's call is no longer what was compiled, since it sends blocks.
        self._compiled = [(module, module._compiled_call_impl) for module in modules]
        for module in modules:
            module._compiled_call_impl = None
        self._within: dict[
            tuple[int, int], Mapping[str, Tensor]
        ] = {}  # (block, slot) -> weights; making them takes time
        self._hooks = [
            hook
            for index, module in enumerate(modules)
            for hook in (
                module.register_forward_pre_hook(partial(self._before, index)),
                module.register_forward_hook(partial(self._after, index)),
            )
        ]

    def reset(self) -> None:
        """Let all weights be those of the host again, and forget what is on the device: the host's may change now."""
        self._lane.finish()
        self._coming.clear()
        self._free = list(range(len(self.slots)))
        for block in self._blocks:
            block.use(block.host.tensors)

    def free_slots(self) -> None:
        """Forget what is on the device, and free its memory until the next block computes."""
        self.reset()
        self._lane.drain()
        self.slots, self._free, self._within = [], [], {}

    def end(self) -> None:
        """Leave the modules as they were before; the weights are no longer sent."""
        self.free_slots()
        for hook in self._hooks:
            hook.remove()
        for module, compiled in self._compiled:
            module._compiled_call_impl = compiled

    def _before(self, index: int, *_: Any) -> None:
        if not self.slots:
            size = max(len(block.host.memory) for block in self._blocks)
            count = min(SLOTS, len(self._blocks))
            self.slots = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(count)]
            self._free = list(range(count))
        if index not in self._coming:  # the first of all, or after an interruption
            self._send(index)
        slot, arrived = self._coming[index]
        following = (index + 1) % len(self._blocks)
        if self._free and following not in self._coming:
            self._send(following)
        self._lane.wait(arrived)
        if (index, slot) not in self._within:
            self._within[index, slot] = self._blocks[index].within(self.slots[slot])
        self._blocks[index].use(self._within[index, slot])

    def _after(self, index: int, *_: Any) -> None:
        self._blocks[index].use(self._blocks[index].host.tensors)
        following = (index + len(self.slots)) % len(self._blocks)
        if following not in self._coming:
            self._free.append(self._coming.pop(index)[0])
            self._send(following)

    def _send(self, index: int) -> None:
        if not self._free:  # the slots hold what an interrupted pass left: the block that computes last gives way
            last = max(self._coming, key=lambda waiting: (waiting - index) % len(self._blocks))
            self._free.append(self._coming.pop(last)[0])
        slot, block = self._free.pop(), self._blocks[index]
        self._coming[index] = (slot, self._lane.copy(self.slots[slot][: len(block.host.memory)], block.host.memory))
