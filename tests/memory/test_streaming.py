"""Blocks that pass through slots, on the CPU with real copies: results, order, interruptions, and what is where."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux_lora.device.transfers import Lane
from flux_lora.memory.plans import SLOTS
from flux_lora.memory.streaming import Stream, StreamedBlock

CPU = torch.device("cpu")


class Blocks(nn.Module):
    """Blocks of two shapes, as FLUX.1 has them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(count)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8)) for width in (24, 16, 8, 16, 40, 8, 8)[:count]
        )
        self.requires_grad_(False)

    def layer(self, block: int) -> nn.Linear:
        """The first of a block's two."""
        layer = self.blocks[block].get_submodule("0")
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return hidden


class CountingLane(Lane):
    """Counts its copies."""

    sent = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
        self.sent += 1
        return super().copy(target, source)


def streamed(module: Blocks, passing: list[int], lane: Lane | None = None) -> tuple[Stream, list[StreamedBlock]]:
    made = []
    for index in passing:
        prefix = f"blocks.{index}."
        parameters = {name: p for name, p in module.named_parameters() if name.startswith(prefix)}
        made.append(StreamedBlock(parameters, CPU))
        for name, parameter in parameters.items():
            made[-1].host.tensors[name].copy_(parameter)
    stream = Stream([module.blocks[index] for index in passing], made, CPU, lane)
    stream.reset()
    return stream, made


def within(tensor: torch.Tensor, memory: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("every", [1, 2])
def test_results_are_those_of_blocks_that_stay(count: int, every: int) -> None:
    module, inputs = Blocks(count), torch.randn(5, 3, 8)
    expected = [module(x) for x in inputs]
    stream, _ = streamed(module, list(range(0, count, every)))
    for x, result in zip(inputs, expected, strict=True):
        assert torch.equal(module(x), result)
    stream.end()
    assert torch.equal(module(inputs[0]), expected[0])


def test_a_block_computes_in_a_slot_and_rests_in_the_host() -> None:
    module = Blocks(5)
    stream, blocks = streamed(module, [0, 1, 3, 4])
    seen = []

    def look(block: Any, _: Any) -> None:
        seen.append([slot for slot, memory in enumerate(stream.slots) if within(block[0].weight, memory)])

    for block in module.blocks:
        block.register_forward_pre_hook(look)
    module(torch.randn(2, 8))
    module(torch.randn(2, 8))
    assert [len(slots) for slots in seen] == [1, 1, 0, 1, 1] * 2
    assert [slots[0] for slots in seen if slots] == [1, 0] * 4  # in turns
    assert len(stream.slots) == SLOTS
    for index, streamed_block in zip([0, 1, 3, 4], blocks, strict=True):
        assert all(within(parameter, streamed_block.host.memory) for parameter in module.blocks[index].parameters())
    stream.free_slots()
    assert stream.slots == []


def test_each_block_is_sent_once_for_each_pass() -> None:
    module, lane = Blocks(7), CountingLane(CPU)
    streamed(module, list(range(7)), lane)
    for _ in range(3):
        module(torch.randn(1, 8))
    assert lane.sent == 3 * 7 + SLOTS  # the first blocks of the next pass wait in the slots already


def test_few_blocks_stay_in_their_slots() -> None:
    module, lane = Blocks(SLOTS), CountingLane(CPU)
    streamed(module, list(range(SLOTS)), lane)
    for _ in range(2):
        module(torch.randn(1, 8))
        assert lane.sent == SLOTS


def test_what_is_merged_in_the_host_is_computed_with_after_a_rest() -> None:
    module, x = Blocks(4), torch.randn(2, 8)
    stream, _ = streamed(module, [0, 1, 2, 3])
    before = module(x)
    stream.reset()
    with torch.no_grad():
        module.layer(1).weight.mul_(2)
    changed = module(x)
    assert not torch.equal(changed, before)
    assert torch.equal(module(x), changed)
    stream.reset()
    with torch.no_grad():
        module.layer(1).weight.div_(2)
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("interrupted", range(5))
def test_an_interrupted_pass_leaves_the_next_one_right(interrupted: int) -> None:
    module, x = Blocks(5), torch.randn(2, 8)
    expected = module(x)
    stream, _ = streamed(module, [0, 1, 2, 3, 4])

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for rest in (False, True):
        hook = module.layer(interrupted).register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            module(x)
        hook.remove()
        if rest:
            stream.reset()
        assert torch.equal(module(x), expected)
        assert torch.equal(module(x), expected)


def test_what_was_compiled_is_called_again_at_the_end() -> None:
    module = Blocks(3)
    called: list[int] = []

    def compiled(index: int, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(hidden: Tensor) -> Tensor:
            called.append(index)
            return forward(hidden)

        return call

    for index, block in enumerate(module.blocks):
        block._compiled_call_impl = compiled(index, block.forward)
    stream, _ = streamed(module, [0, 2])
    expected = module(torch.ones(2, 8))
    assert called == [1]
    stream.end()
    assert torch.equal(module(torch.ones(2, 8)), expected)
    assert called == [1, 0, 1, 2]
