"""What must hold on a GPU too; the same checks on the CPU are in test_generator.py and lora/test_merge.py."""

from contextlib import suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flux_lora.checkpoint import assembling
from flux_lora.checkpoint.reading import fill, stored_tensors
from flux_lora.device import devices
from flux_lora.errors import DeviceMemoryError
from flux_lora.generator import Generator
from flux_lora.lora.formats import read
from flux_lora.lora.merge import MergedModule
from flux_lora.memory import measure
from flux_lora.memory.plans import Room
from flux_lora.request import SIZES, Request
from flux_lora.settings import PlanName, ProfileName, Settings
from flux_lora.speed import attention, fastest, profiles, projections
from flux_lora.speed.quantization import FORMATS, emulated_product, hardware_product, quantized_layers
from tests.conftest import MINI
from tests.speed.test_quantization import half_steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

WITNESS = {"prompt": "a witness", "seed": 7, "num_inference_steps": 4, "output_format": "png"}


needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < profiles.FP8_CAPABILITY, reason="needs fp8"
)


def build(weights: Path = MINI, **settings: Any) -> Generator:
    return Generator(Settings(weights=weights, device="cuda", **settings), log=lambda _: None)


def draw(generator: Generator, **inputs: Any) -> list[bytes]:
    return [path.read_bytes() for path in generator.draw(Request.parse(**WITNESS | inputs), lambda *_: None)]


def test_pictures_are_the_same_after_a_restart_in_any_batch_and_after_any_change() -> None:
    generator = build()
    first = draw(generator, num_outputs=4)
    assert [draw(generator, seed=7 + k)[0] for k in range(4)] == first
    for scale in (0, 0.3, -1, 2):
        draw(generator, lora_scale=scale)
        draw(generator, model="schnell", lora_scale=scale)
    assert draw(generator, num_outputs=4) == first
    assert draw(build(), num_outputs=4) == first


def test_the_picture_is_that_of_the_cpu_up_to_rounding() -> None:
    """bfloat16 against float32 on random weights: close on average, not in each pixel."""
    on_gpu, on_cpu = build(), Generator(Settings(weights=MINI, device="cpu"), log=lambda _: None)
    pictures = [np.asarray(Image.open(g.draw(Request.parse(**WITNESS), lambda *_: None)[0])) for g in (on_gpu, on_cpu)]
    assert np.abs(pictures[0].astype(int) - pictures[1].astype(int)).mean() < 4


@pytest.mark.parametrize("room", [True, False], ids=["pristine on the device", "pristine in pinned memory"])
def test_merged_weights_are_the_formula_in_float64(monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    if not room:
        monkeypatch.setattr(devices, "free_memory", lambda device: 0 if device.type == "cuda" else 2**40)
    pipeline = assembling.load(MINI, torch.device("cuda:0"), torch.bfloat16).pipelines["dev"]
    module = pipeline.transformer
    pristine = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    merged = MergedModule("transformer", module, {})
    shapes = {name: MergedModule(name, getattr(pipeline, name), {}).shapes for name in assembling.ADAPTABLE}
    adapter = read(MINI / "lora.safetensors", shapes)
    lora = {name: tensor.double().cuda() for name, tensor in load_file(MINI / "lora.safetensors").items()}
    merged.bring([(adapter, 0.7)])
    for name, weight in module.state_dict().items():
        key = f"transformer.{name.removesuffix('.weight')}"
        if name.endswith(".weight") and f"{key}.lora_A.weight" in lora:
            up, down, base = lora[f"{key}.lora_B.weight"], lora[f"{key}.lora_A.weight"], pristine[name].double()
            largest = torch.maximum(base.abs(), 0.7 * (up.abs() @ down.abs()))
            ulp = torch.finfo(torch.bfloat16).eps * 2.0 ** largest.clamp_min(1e-30).log2().floor()
            assert ((weight.double() - (base + 0.7 * up @ down)).abs() <= 1.001 * ulp).all()  # float32 decides ties
    merged.bring([])
    assert all(torch.equal(tensor, pristine[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("projected", ["separate", "fused"])
@pytest.mark.parametrize("profile", ["exact", pytest.param("balanced", marks=needs_fp8)])
def test_compiled_pictures_are_the_same_after_a_restart_and_nothing_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: ProfileName, projected: str
) -> None:
    monkeypatch.setitem(projections.CANDIDATES, "cuda", (projected,))
    generator = build(profile=profile, cache=tmp_path)
    assert generator._attention.endswith(", fused qkv") == (projected == "fused")
    first = draw(generator)
    changes: list[dict[str, Any]] = [{"lora_scale": 0.3}, {"model": "schnell"}, {"num_outputs": 2}, {"seed": 9}]
    for change in [*changes, *({"aspect_ratio": ratio} for ratio in SIZES), {}]:
        metrics: dict[str, Any] = {}
        generator.draw(Request.parse(**WITNESS | change), metrics.__setitem__)
        assert metrics["recompilations"] == 0, change
    assert draw(generator) == first
    torch._dynamo.reset()
    assert draw(build(profile=profile, cache=tmp_path)) == first


@needs_fp8
def test_the_product_of_the_hardware_is_the_emulated_one() -> None:
    torch.manual_seed(0)
    numbers = FORMATS["fp8"].dtype
    tokens, weight = torch.randn(333, 3072).cuda().to(numbers), torch.randn(9216, 3072).cuda().to(numbers)
    scales = torch.rand(333, 1).cuda(), torch.rand(9216).cuda()
    operands = (tokens, weight, *scales, torch.randn(9216).cuda().bfloat16(), torch.bfloat16)
    actual, expected = hardware_product(*operands).float(), emulated_product(*operands).float()
    assert (actual - expected).norm() / expected.norm() < 0.005  # its accumulator is narrower than float32


@needs_fp8
def test_quantized_weights_are_within_half_a_step_of_the_formula_in_float64() -> None:
    pipeline = assembling.load(MINI, torch.device("cuda:0"), torch.bfloat16).pipelines["dev"]
    module = pipeline.transformer
    pristine = {name: tensor.double() for name, tensor in module.named_parameters()}
    shapes = {name: MergedModule(name, getattr(pipeline, name), {}).shapes for name in assembling.ADAPTABLE}
    adapter = read(MINI / "lora.safetensors", shapes)
    MergedModule("transformer", module, {}, "fp8").bring([(adapter, 0.7)])
    lora = {name: tensor.double().cuda() for name, tensor in load_file(MINI / "lora.safetensors").items()}
    for name, layer in quantized_layers(module).items():
        key = f"transformer.{name.removesuffix('.weight')}"
        exact = pristine[name] + 0.7 * lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
        distance = (layer.dequantized().double() - exact).abs().cpu()
        assert (distance <= half_steps(exact.cpu()) * (1 + 1e-4)).all(), name


def test_the_attention_kernel_is_one_that_computes_right(tmp_path: Path) -> None:
    shape = attention.Shape(tokens=4608, heads=24, width=128, dtype="bfloat16")
    device = torch.device("cuda:0")

    def measure(name: str) -> float | None:
        return attention.time_kernel(name, shape, device)

    given = "attention", attention.EXACT["cuda"], asdict(shape), device, tmp_path, measure
    name, measured = fastest.choose_fastest(*given)
    assert measured
    assert measure(name) is not None
    assert fastest.choose_fastest(*given) == (name, False)


@pytest.mark.parametrize("plan", ["alternating", "offload-text", "streamed"])
def test_every_plan_draws_what_resident_draws(plan: PlanName, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for no block to stay: all of them pass through the slots, on a stream of their own."""
    monkeypatch.setattr(measure, "available_room", lambda *_: Room(0, 2**40))
    expected, generator = (
        build(),
        Generator(Settings(weights=MINI, device="cuda", memory_plan=plan), log=lambda _: None),
    )
    for model, scale in (("dev", 1.0), ("schnell", 0.3), ("dev", 1.0), ("dev", 0.0)):
        asked = {"model": model, "lora_scale": scale}
        one, other = (g.draw(Request.parse(**WITNESS | asked), lambda *_: None) for g in (generator, expected))
        pictures = [np.asarray(Image.open(files[0])).astype(int) for files in (one, other)]
        if generator._memory.choice.strips:
            assert np.abs(pictures[0] - pictures[1]).max() <= 16  # bfloat16 rounds elsewhere
        else:
            assert np.array_equal(*pictures)


def test_what_streams_lies_in_pinned_memory() -> None:
    generator = Generator(Settings(weights=MINI, device="cuda", memory_plan="offload-text"), log=lambda _: None)
    stream = generator._memory._placed["text_encoder_2"].stream
    assert stream
    assert all(block.host.memory.is_pinned() for block in stream._blocks)


def test_loading_to_the_device_gives_what_the_files_hold() -> None:
    file = MINI / "dev/transformer/diffusion_pytorch_model.safetensors"
    stored = dict(stored_tensors(file))
    targets = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in stored.items()}
    fill((stored[name], targets[name]) for name in stored)
    torch.cuda.synchronize()
    assert all(torch.equal(targets[name].cpu(), tensor) for name, tensor in load_file(file).items())


def test_an_exhausted_device_is_survived() -> None:
    """By the allocator's cap: the request is drawn under another plan, or fails with the numbers."""
    generator = build()
    before = draw(generator)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
        with suppress(DeviceMemoryError):
            draw(generator, aspect_ratio="custom", width=1440, height=1440)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    after = [np.asarray(Image.open(path)) for path in generator.draw(Request.parse(**WITNESS), lambda *_: None)]
    again = [np.asarray(Image.open(BytesIO(content))) for content in before]
    assert all(np.abs(a.astype(int) - b.astype(int)).max() <= 16 for a, b in zip(after, again, strict=True))


def test_a_budget_becomes_the_allocators_cap() -> None:
    try:
        measured = measure.available_room(torch.device("cuda:0"), 4 * 2**30)
        assert measured.device <= 4 * 2**30 - measure.CONTEXT_BYTES
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(4 * 2**30, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
