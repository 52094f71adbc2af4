"""Merging by Triton programs, run by its interpreter or on a GPU: against float64, and against PyTorch's products."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux_lora.lora import fused
from flux_lora.lora.deltas import Full, LowRank, Rows, Update
from flux_lora.lora.formats import Adapter
from flux_lora.lora.merge import Contribution, MergedModule
from flux_lora.speed.quantization import QuantizedLinear, quantized_layers
from tests.speed.test_quantization import half_steps

pytest.importorskip("triton", reason="Triton is there for Linux only")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 1), (3, 70), (64, 128), (65, 257), (130, 48), (48, 300)]


def noise(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size).to(DEVICE, dtype)


def contribution(rows: int, columns: int, rank: int, start: int, stop: int, offset: int, scale: float) -> Contribution:
    """Rows of an update that has ``rows`` of them; its file is in bfloat16."""
    update = LowRank(
        (Rows("", 0, rows),), torch.randn(rows, rank).bfloat16(), 0.1 * torch.randn(rank, columns).bfloat16(), 0.5
    )
    return Contribution("", update, scale, start, stop, offset)


def exactly(pristine: Tensor, contributions: list[Contribution]) -> tuple[Tensor, Tensor]:
    """W + Σ s·ΔW in float64, and the sum of what is added without signs: the scale of float32's roundings."""
    total, size = pristine.double(), pristine.double().abs()
    for item in contributions:
        assert isinstance(item.update, LowRank)
        up, down = item.update.up.double().to(DEVICE), item.update.down.double().to(DEVICE)
        rows, factor = slice(item.offset, item.offset + item.stop - item.start), item.scale * item.update.factor
        total[item.start : item.stop] += factor * up[rows] @ down
        size[item.start : item.stop] += abs(factor) * up[rows].abs() @ down.abs()
    return total, size


def cases(height: int, width: int) -> dict[str, list[Contribution]]:
    third = height // 3
    return {
        "one": [contribution(height, width, 16, 0, height, 0, 0.7)],
        "of an odd rank": [contribution(height, width, 5, 0, height, 0, -1.3)],
        "from the middle of a fused one": [contribution(3 * height, width, 32, 0, height, height, 0.7)],
        "some rows only": [contribution(height, width, 16, third, height, 0, 1.0)],
        "several": [
            contribution(height, width, 16, 0, height, 0, 0.7),
            contribution(height, width, 1, third, height, third, 2.0),
            contribution(height, width, 0, 0, height, 0, 1.0),
            contribution(height, width, 20, 0, height, 0, -0.2),
        ],
        "of rank 0": [contribution(height, width, 0, 0, height, 0, 1.0)],
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_sums_are_within_half_a_step_of_float64(dtype: torch.dtype, height: int, width: int) -> None:
    torch.manual_seed(height)
    for name, contributions in cases(height, width).items():
        pristine, weight = noise(height, width, dtype=dtype), noise(height, width, dtype=dtype)
        assert fused.merge(weight, pristine, contributions, DEVICE)
        exact, size = exactly(pristine, contributions)
        step = torch.finfo(dtype).eps * 2.0 ** exact.abs().clamp_min(1e-30).log2().floor()
        rounded = 40 * torch.finfo(torch.float32).eps * size  # of some forty sums and products in float32
        assert ((weight.double() - exact).abs() <= step / 2 + rounded).all(), name


@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 304), (80, 64)])
def test_quantized_rows_are_within_half_a_step_of_float64(height: int, width: int) -> None:
    torch.manual_seed(height)
    for name, contributions in cases(height, width).items():
        pristine, layer = noise(height, width, dtype=torch.bfloat16), eight_bits(height, width)
        pristine[height // 2] = 0
        assert fused.merge(layer, pristine, contributions, DEVICE)
        exact, size = exactly(pristine, contributions)
        rounded = 40 * torch.finfo(torch.float32).eps * size
        distance = (layer.dequantized().double() - exact).abs()
        assert (distance.cpu() <= half_steps(exact.cpu()) * (1 + 1e-4) + rounded.cpu()).all(), name


def eight_bits(height: int, width: int) -> QuantizedLinear:
    return QuantizedLinear(nn.Linear(width, height, bias=False, dtype=torch.bfloat16, device="meta"), "fp8", DEVICE)


def test_without_contributions_the_base_weights_are_written_bit_by_bit() -> None:
    torch.manual_seed(0)
    pristine = noise(50, 48, dtype=torch.bfloat16)
    pristine[3] = 0
    nothing = [contribution(50, 48, 0, 0, 50, 0, 1.0)]
    weight, layer, by_torch = torch.empty_like(pristine), eight_bits(50, 48), eight_bits(50, 48)
    assert fused.merge(weight, pristine, nothing, DEVICE)
    assert torch.equal(weight, pristine)
    assert fused.merge(layer, pristine, nothing, DEVICE)
    by_torch.write_rows(0, 50, pristine)
    assert torch.equal(layer.scales, by_torch.scales)
    assert torch.equal(layer.values.view(torch.uint8), by_torch.values.view(torch.uint8))


def test_what_is_not_low_rank_is_left_to_others() -> None:
    weight = noise(4, 4)
    before = weight.clone()
    full = Contribution("", Full((Rows("", 0, 4),), torch.ones(4, 4)), 1.0, 0, 4, 0)
    assert not fused.merge(weight, before, [contribution(4, 4, 16, 0, 4, 0, 1.0), full], DEVICE)
    assert not fused.merge(weight[0], before[0], [contribution(4, 4, 16, 0, 4, 0, 1.0)], DEVICE)
    assert torch.equal(weight, before)


class Attention(nn.Module):
    """What adapters change: three layers that an update covers together, others, and what is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(48, 48) for _ in range(4))
        self.norm = nn.LayerNorm(48)


def adapter(digest: str, *updates: Update) -> Adapter:
    return Adapter(digest, digest, "", "", {"transformer": updates}, {}, "", 0)


def low_rank(*parameters: str, rank: int) -> LowRank:
    rows = tuple(Rows(f"{name}.weight", 0, 48) for name in parameters)
    return LowRank(rows, torch.randn(48 * len(rows), rank), 0.1 * torch.randn(rank, 48), 0.5)


def attention(dtype: torch.dtype, *, quantized: bool, programs: bool) -> tuple[nn.Module, MergedModule]:
    torch.manual_seed(0)
    module = Attention().to(DEVICE, dtype)
    pristine = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    if quantized:
        for name in ("to_q", "to_k", "out"):
            linear = module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            layer = QuantizedLinear(linear, "fp8")
            layer.write_rows(0, 48, pristine[f"{name}.weight"])
            module.set_submodule(name, layer)
    return module, MergedModule("transformer", module, {}, base=pristine.get, programs=programs)


def written(module: nn.Module) -> dict[str, Tensor]:
    """What the weights hold, and the scales of those that are quantized."""
    found = {name: weight.detach().float() for name, weight in module.named_parameters()}
    for name, layer in quantized_layers(module).items():
        found |= {name: layer.values.float(), f"{name} scales": layer.scales.clone()}
    return found


@pytest.mark.parametrize("quantized", [False, True])
def test_a_module_is_merged_as_by_pytorchs_products_but_for_ties(quantized: bool) -> None:
    """And by any way to the same adapters to the same bits."""
    torch.manual_seed(1)
    wholes = {"norm.weight": (48,), "out.weight": (48, 48)}
    adapters = [
        adapter("a", low_rank("to_q", "to_k", "to_v", rank=24), low_rank("out", rank=3)),
        adapter("b", low_rank("to_k", rank=16), low_rank("out", rank=16)),
        adapter("c", *(Full((Rows(name, 0, 48),), torch.randn(size)) for name, size in wholes.items())),
    ]
    (ours, by_programs), (theirs, by_products), (other, backward) = (
        attention(torch.bfloat16, quantized=quantized, programs=programs) for programs in (True, False, True)
    )
    states = [[(adapters[0], 0.7)], [(adapters[0], 1.0), (adapters[1], -0.5)], [(each, 0.3) for each in adapters], []]
    for state in states:
        for merged in (by_programs, by_products):
            merged.bring(state)
        expected = written(theirs)
        for name, weight in written(ours).items():
            if name.endswith(" scales"):
                torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=0)
            else:
                assert (weight != expected[name]).float().mean() <= 0.002, name
                assert ((weight - expected[name]).abs() <= expected[name].abs() / 8).all(), name  # a step of E4M3
    for state in (*states[2::-1], states[1]):
        backward.bring(state[::-1])
    by_programs.bring(states[1])
    for name, weight in written(other).items():
        assert torch.equal(weight, written(ours)[name]), name


def test_the_programs_are_compiled_ahead_for_what_merging_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    launch = fused.launch

    def note(name: str, *rest: Any) -> None:
        launched.append(name)
        launch(name, *rest)

    monkeypatch.setattr(fused, "launch", note)
    fused.warm_up(DEVICE, torch.bfloat16, None)
    fused.warm_up(DEVICE, torch.bfloat16, "fp8")
    assert launched == ["merge", "merge", "merge_eight_bits"]
