"""Eight-bit weights, judged by hand in float64 from the definition of the numbers."""

import copy
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux_lora.device import devices
from flux_lora.lora.formats import Adapter, read
from flux_lora.lora.merge import MergedModule
from flux_lora.speed.quantization import (
    FORMATS,
    QuantizedLinear,
    emulated_product,
    hardware_product,
    prepare,
    quantized_layers,
)
from tests.loaded import Loaded, load
from training.random_weights import random_lora

FP8 = FORMATS["fp8"]


def e4m3() -> Tensor:
    """All finite numbers of E4M3, from the sign, exponent and mantissa (https://arxiv.org/abs/2209.05433), float64."""
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    positive = torch.tensor(subnormal + normal, dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive])


def half_steps(exact: Tensor) -> Tensor:
    """How far each weight (out, in), float64, may be from the eight-bit one: half the gap around it, in its row."""
    numbers = e4m3().unique()
    scales = exact.abs().amax(dim=1, keepdim=True) / 448
    place = torch.searchsorted(numbers, exact / scales).clamp(1, len(numbers) - 1)
    half: Tensor = (numbers[place] - numbers[place - 1]) / 2 * scales
    return half


@pytest.fixture
def loaded() -> Loaded:
    """The miniature with a transformer in eight bits."""
    return load(torch.bfloat16, scheme="fp8")


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """The miniature's transformer as its files have it; not to be changed."""
    transformer: nn.Module = load(torch.bfloat16).pipeline().transformer
    return transformer


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, plain: nn.Module) -> list[tuple[Path, Adapter]]:
    """LoRAs of ranks 4 and 2; the second touches single blocks only."""
    folder, shapes = tmp_path_factory.mktemp("loras"), {"transformer": MergedModule("transformer", plain, {}).shapes}
    found = []
    for seed, rank in enumerate((4, 2)):
        torch.manual_seed(seed)
        tensors = random_lora(plain, rank=rank)
        if seed == 1:
            tensors = {name: tensor for name, tensor in tensors.items() if ".single_transformer_blocks." in name}
        save_file(tensors, path := folder / f"{seed}.safetensors")
        found.append((path, read(path, shapes)))
    return found


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.view(torch.uint8).clone() for name, tensor in module.state_dict().items()}


def same_bits(module: nn.Module, expected: dict[str, Tensor]) -> bool:
    now = bits(module)
    return now.keys() == expected.keys() and all(torch.equal(now[name], tensor) for name, tensor in expected.items())


def test_the_numbers_are_those_of_the_definition() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FP8.dtype).double()
    assert torch.equal(every[every.isfinite()].unique(), e4m3().unique())


def test_weights_are_within_half_a_step() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    with torch.no_grad():
        linear.weight[7] *= 1e-20
        linear.weight[8] *= 1e20
        linear.weight[9] = 0
        linear.weight[10, 1:] *= 1e-6
    layer = QuantizedLinear(linear, "fp8")
    layer.write_rows(0, 48, linear.weight)
    exact = linear.weight.detach().double()
    allowed = torch.where(exact.abs().amax(dim=1, keepdim=True) > 0, half_steps(exact), 0)
    assert ((layer.dequantized().double() - exact).abs() <= allowed * (1 + 1e-5)).all()
    assert torch.equal(layer.dequantized()[9], torch.zeros(64))


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_the_eight_bit_numbers_in_float64(bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(64, 32, bias=bias)
    layer = QuantizedLinear(linear, "fp8")
    layer.write_rows(0, 32, linear.weight)
    x = torch.randn(2, 5, 64)
    x[0, 3] = 0
    scales = x.double().abs().amax(dim=-1, keepdim=True) / 448
    ratios = torch.where(scales > 0, x.double() / scales, 0.0)
    numbers = e4m3().unique()
    nearest = (ratios[..., None] - numbers).abs().argmin(dim=-1)
    expected = (numbers[nearest] * scales) @ layer.dequantized().double().T
    expected += linear.bias.double() if bias else 0
    assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    # Four significant bits cost accuracy, and no more than theirs.
    assert 1e-3 < (layer(x) - linear(x)).norm() / linear(x).norm() < 2**-4


def test_the_hardwares_product_is_the_emulated_one() -> None:
    torch.manual_seed(2)
    tokens, weight = torch.randn(16, 64).to(FP8.dtype), torch.randn(32, 64).to(FP8.dtype)
    operands = (tokens, weight, torch.rand(16, 1), torch.rand(32), torch.randn(32).bfloat16(), torch.bfloat16)
    try:
        actual = hardware_product(*operands)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this PyTorch has no eight-bit product on the CPU: {error}")
    assert torch.allclose(actual.float(), emulated_product(*operands).float(), rtol=2**-7, atol=1e-2)


def test_blocks_are_quantized_and_modulations_are_not(plain: nn.Module) -> None:
    transformer = copy.deepcopy(plain)
    before = dict(transformer.named_parameters())
    layers = prepare(transformer, "fp8")
    assert layers.keys() == quantized_layers(transformer).keys()
    assert layers.keys() == before.keys() - dict(transformer.named_parameters()).keys()
    assert all(layer.device.type == "meta" for layer in layers.values())
    assert "transformer_blocks.0.attn.to_q.weight" in layers
    assert "single_transformer_blocks.1.proj_out.weight" in layers
    assert not any("norm" in name or not name.split(".")[0].endswith("blocks") for name in layers)


@pytest.mark.parametrize("scale", [-1, 0, 0.3, 1, 2])
def test_merged_weights_are_within_half_a_step_of_the_formula_in_float64(
    loaded: Loaded, plain: nn.Module, adapters: list[tuple[Path, Adapter]], scale: float
) -> None:
    pristine = {name: tensor.detach().double() for name, tensor in plain.named_parameters()}
    file, adapter = adapters[0]
    lora = load_file(file)
    merged, transformer = loaded.merged(), loaded.pipeline().transformer
    places = {name: layer.values.data_ptr() for name, layer in quantized_layers(transformer).items()}
    merged.bring([(adapter, scale)])
    layers = quantized_layers(transformer)
    assert places == {name: layer.values.data_ptr() for name, layer in layers.items()}
    for name, layer in layers.items():
        key = f"transformer.{name.removesuffix('.weight')}"
        down, up = lora[f"{key}.lora_A.weight"].double(), lora[f"{key}.lora_B.weight"].double()
        exact = pristine[name] + scale * up @ down
        # What float32 may lose of a sum of rank + 1 terms, and of the row's scale.
        lost = 2**-21 * (pristine[name].abs() + abs(scale) * up.abs() @ down.abs())
        distance = (layer.dequantized().double() - exact).abs()
        assert (distance <= half_steps(exact) + lost).all(), name


@pytest.mark.parametrize("room", [True, False], ids=["kept in memory", "read from the files"])
def test_changes_end_where_they_began(
    loaded: Loaded, adapters: list[tuple[Path, Adapter]], monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    if not room:
        monkeypatch.setattr(devices, "free_memory", lambda _: 0)
    merged, transformer = loaded.merged(), loaded.pipeline().transformer
    base = bits(transformer)
    merged.bring([(adapters[0][1], 0.8)])
    start = bits(transformer)
    assert not same_bits(transformer, base)
    chance = random.Random(0)
    for _ in range(30):
        merged.bring([(adapter, chance.uniform(-1, 2)) for _, adapter in chance.sample(adapters, chance.randrange(3))])
    merged.bring([(adapters[0][1], 0.8)])
    assert same_bits(transformer, start)
    assert room == ("in their files" not in merged.where())
    merged.bring([])
    assert same_bits(transformer, base)
