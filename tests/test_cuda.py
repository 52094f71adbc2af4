"""What must hold on a GPU, tried on the CPU too: so what is wrong with a check shows where there is no GPU.

On a GPU: ``scripts/test tests/test_cuda.py -k "not cpu"``.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_lora.assembly import assemble
from flux_lora.checkpoint.reading import fill, stored_tensors
from flux_lora.errors import DeviceMemoryError
from flux_lora.generator import Generator, Observer, Step
from flux_lora.lora.formats import Adapter, read
from flux_lora.memory import measure
from flux_lora.memory.plans import Room
from flux_lora.request import SIZES, Request
from flux_lora.settings import PlanName, ProfileName, Settings
from flux_lora.speed import attention, cuda_graphs, fastest, profiles, projections
from flux_lora.speed.quantization import FORMATS, emulated_product, hardware_product, quantized_layers
from tests.conftest import MINI
from tests.loaded import Loaded, load
from tests.speed.test_cuda_graphs import Again
from tests.speed.test_quantization import half_steps
from training.random_weights import random_lora

PLENTY = 2**40
HAS_GPU = torch.cuda.is_available()
HAS_FP8 = not HAS_GPU or torch.cuda.get_device_capability() >= profiles.FP8_CAPABILITY

on_gpu = pytest.param(torch.device("cuda:0"), id="cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"))
on_cpu = pytest.param(torch.device("cpu"), id="cpu")
on_cpu_slowly = pytest.param(torch.device("cpu"), id="cpu", marks=pytest.mark.slow)

needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="needs fp8")


@pytest.fixture(params=[on_cpu, on_gpu])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the check runs."""
    found: torch.device = request.param
    return found


def build(device: torch.device, room: Room | None = None, **settings: Any) -> Generator:
    chosen: dict[str, Any] = {"weights": MINI, "device": str(device), "profile": "eager"} | settings
    return assemble(Settings(**chosen), log=lambda _: None, room=room)


def ask(generator: Generator, **inputs: Any) -> Request:
    """A picture of one megapixel in four steps; on a CPU a smaller one in two."""
    size: dict[str, Any] = {}
    if generator.parts.device.type == "cpu" and "aspect_ratio" not in inputs:
        size = {"aspect_ratio": "custom", "width": 256, "height": 256, "num_inference_steps": 2}
    witness = {"prompt": "a witness", "seed": 7, "num_inference_steps": 4, "output_format": "png"}
    return Request.parse(**witness | size | inputs)


def draw(generator: Generator, observer: Observer | None = None, **inputs: Any) -> list[bytes]:
    files = generator.draw(ask(generator, **inputs), lambda *_: None, observer)
    return [path.read_bytes() for path in files]


def pixels(generator: Generator, observer: Observer | None = None, **inputs: Any) -> np.ndarray:
    (path,) = generator.draw(ask(generator, **inputs), lambda *_: None, observer)
    return np.asarray(Image.open(path)).astype(int)


def lora(folder: Path, loaded: Loaded) -> tuple[Adapter, dict[str, Tensor]]:
    """A LoRA on all linear layers of the transformer's blocks; and its tensors, float64."""
    torch.manual_seed(0)
    save_file(random_lora(loaded.pipeline().transformer, rank=4), folder / "lora.safetensors")
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "lora.safetensors").items()}
    return read(folder / "lora.safetensors", {"transformer": loaded.merged().shapes}), tensors


def test_pictures_are_the_same_after_a_restart_in_any_batch_and_after_any_change(device: torch.device) -> None:
    generator = build(device)
    first = draw(generator, num_outputs=4)
    assert [draw(generator, seed=7 + k)[0] for k in range(4)] == first
    for scale in (0, 0.3, -1, 2):
        draw(generator, lora_scale=scale)
        draw(generator, model="schnell", lora_scale=scale)
    assert draw(generator, num_outputs=4) == first
    assert draw(build(device), num_outputs=4) == first


def test_the_picture_is_that_of_float32_up_to_rounding(device: torch.device) -> None:
    """Close on average, not in each pixel."""
    rounded, expected = build(device, cpu_dtype="bfloat16"), build(torch.device("cpu"))
    assert np.abs(pixels(rounded, aspect_ratio="1:1") - pixels(expected, aspect_ratio="1:1")).mean() < 4


@pytest.mark.parametrize("plan", ["resident", "alternating"])
def test_merged_weights_are_the_formula_in_float64(device: torch.device, plan: PlanName, tmp_path: Path) -> None:
    """With the base weights kept on the device, and in pinned host memory."""
    loaded = load(torch.bfloat16, device=device, plan=plan)
    module, merged = loaded.pipeline().transformer, loaded.merged()
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    adapter, tensors = lora(tmp_path, loaded)
    merged.bring([(adapter, 0.7)])
    touched = 0
    for name, weight in module.state_dict().items():
        key = f"transformer.{name.removesuffix('.weight')}"
        if name.endswith(".weight") and f"{key}.lora_A.weight" in tensors:
            up, down = (tensors[f"{key}.lora_{part}.weight"].to(device) for part in "BA")
            largest = torch.maximum(base[name].double().abs(), 0.7 * (up.abs() @ down.abs()))
            ulp = torch.finfo(torch.bfloat16).eps * 2.0 ** largest.clamp_min(1e-30).log2().floor()
            distance = (weight.double() - (base[name].double() + 0.7 * up @ down)).abs()
            assert (distance <= 1.001 * ulp).all(), name  # float32 decides ties
            waiting = loaded.memory.placed("dev").base(name)
            assert (plan == "resident") == (waiting is None)
            assert not isinstance(waiting, Tensor) or waiting.is_pinned() == (device.type == "cuda")
            touched += 1
    assert touched == len(tensors) // 2
    merged.bring([])
    assert all(torch.equal(tensor, base[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("device", [on_cpu_slowly, on_gpu])
@pytest.mark.parametrize("projected", ["separate", "fused"])
@pytest.mark.parametrize("profile", ["exact", pytest.param("balanced", marks=needs_fp8)])
def test_compiled_pictures_are_the_same_after_a_restart_and_nothing_is_compiled_again(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: ProfileName, projected: str
) -> None:
    monkeypatch.setitem(projections.CANDIDATES, device.type, (projected,))
    generator = build(device, profile=profile, cache=tmp_path)
    attention_by = generator.parts.environments["dev"].attention
    assert (", fused qkv" in attention_by, ", fused blocks" in attention_by) == (projected == "fused", HAS_GPU)
    first = draw(generator)
    changes: list[dict[str, Any]] = [{"lora_scale": 0.3}, {"model": "schnell"}, {"num_outputs": 2}, {"seed": 9}]
    for change in [*changes, *({"aspect_ratio": ratio} for ratio in SIZES), {}]:
        metrics: dict[str, Any] = {}
        generator.draw(ask(generator, **change), metrics.__setitem__)
        assert metrics["recompilations"] == 0, change
    assert draw(generator) == first
    torch.compiler.reset()
    assert draw(build(device, profile=profile, cache=tmp_path)) == first


STEPS: list[dict[str, Any]] = [
    {}, {"lora_scale": 0.3}, {"seed": 9, "prompt": "a cat", "guidance_scale": 2}, {"model": "schnell"},
    {"num_outputs": 2}, {"aspect_ratio": "16:9"}, {},
]  # fmt: skip


def test_replayed_steps_draw_what_launched_steps_draw(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By CUDA graphs on a GPU, which are recorded anew after they were forgotten, too."""
    monkeypatch.setattr(cuda_graphs, "AFTER", 1)
    generator, said = build(device), list[str]()
    expected = [draw(generator, **each) for each in STEPS]
    recorder = cuda_graphs.CudaRecorder(device) if device.type == "cuda" else Again()
    recorded: list[int] = []

    def record(work: cuda_graphs.Work) -> cuda_graphs.Work:
        recorded.append(1)
        return recorder(work)

    graphs = cuda_graphs.StepGraphs(record, lambda: generator.parts.beside.idle, said.append)
    for pipeline in generator.parts.pipelines.values():
        graphs.place(pipeline.transformer)
    for turn in (1, 2):
        assert [draw(generator, **each) for each in STEPS] == expected
        assert len(recorded) == 3 * turn  # dev, schnell, and dev with the tokens of 16:9
        graphs.forget()
    assert said == []


@pytest.mark.parametrize("device", [on_cpu_slowly, on_gpu])
def test_compiled_steps_are_replayed_without_compiling_anything_again(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that replays, from its set-up on."""
    monkeypatch.setattr(cuda_graphs, "AFTER", 1)
    monkeypatch.setattr(cuda_graphs, "FREE_BYTES", 0)
    made: list[Any] = []

    def recorder(device: torch.device) -> cuda_graphs.Record:
        made.append(real(device) if device.type == "cuda" else Again())
        return made[-1]  # type: ignore[no-any-return]

    real, drawn = cuda_graphs.CudaRecorder, []
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", recorder)
    for name in ("launched", "replayed"):
        monkeypatch.setitem(cuda_graphs.CANDIDATES, device.type, (name,))
        generator = build(device, profile="exact", cache=tmp_path)
        served = [vars(pipeline.transformer).get("forward") for pipeline in generator.parts.pipelines.values()]
        assert all(served) == any(served) == (name == "replayed")
        files = []
        for each in STEPS:
            metrics: dict[str, Any] = {}
            files.append([path.read_bytes() for path in generator.draw(ask(generator, **each), metrics.__setitem__)])
            assert metrics["recompilations"] == 0, each
        drawn.append(files)
    assert drawn[0] == drawn[1]
    assert device.type == "cuda" or made[-1].recorded == 3


@pytest.mark.parametrize("device", [on_cpu_slowly, on_gpu])
def test_compiled_steps_are_timed_launched_and_replayed(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was measured at set-up is kept for the next one."""
    monkeypatch.setattr(cuda_graphs, "FREE_BYTES", 0)
    monkeypatch.setitem(cuda_graphs.CANDIDATES, device.type, ("launched", "replayed"))
    if device.type == "cpu":
        monkeypatch.setattr(cuda_graphs, "CudaRecorder", Again)
    build(device, profile="exact", cache=tmp_path)
    (file,) = tmp_path.glob("steps-*.json")
    kept = json.loads(file.read_text())
    assert kept["choice"] in kept["seconds"]
    assert all(seconds > 0 for seconds in kept["seconds"].values())
    lines: list[str] = []
    assemble(Settings(weights=MINI, device=str(device), profile="exact", cache=tmp_path), log=lines.append)
    assert not [line for line in lines if line.startswith("steps:")]


@needs_fp8
def test_a_product_in_eight_bits_is_that_of_float64(device: torch.device) -> None:
    """By the hardware on a GPU, emulated elsewhere."""
    torch.manual_seed(0)
    count, numbers = 333 if device.type == "cuda" else 17, FORMATS["fp8"].dtype
    tokens, weight = (torch.randn(rows, 3072).to(device, numbers) for rows in (count, 9216))
    scales, bias = (torch.rand(count, 1, device=device), torch.rand(9216, device=device)), torch.randn(9216).to(device)
    product = hardware_product if device.type == "cuda" else emulated_product
    actual = product(tokens, weight, *scales, bias.bfloat16(), torch.bfloat16).double()
    expected = tokens.double() @ weight.double().T * scales[0].double() * scales[1].double() + bias.bfloat16().double()
    assert (actual - expected).norm() / expected.norm() < 0.005  # the hardware's accumulator is narrower than float32


@needs_fp8
@pytest.mark.parametrize("plan", ["resident", "alternating"])
def test_quantized_weights_are_within_half_a_step_of_the_formula_in_float64(
    device: torch.device, plan: PlanName, tmp_path: Path
) -> None:
    base = {
        name: tensor.double().cpu() for name, tensor in load(torch.bfloat16).pipeline().transformer.named_parameters()
    }
    loaded = load(torch.bfloat16, device=device, scheme="fp8", plan=plan)
    adapter, tensors = lora(tmp_path, load(torch.bfloat16))
    loaded.merged().bring([(adapter, 0.7)])
    layers = quantized_layers(loaded.pipeline().transformer)
    assert layers
    for name, layer in layers.items():
        key = f"transformer.{name.removesuffix('.weight')}"
        up, down = tensors[f"{key}.lora_B.weight"], tensors[f"{key}.lora_A.weight"]
        exact = base[name] + 0.7 * up @ down
        # What float32 may lose of a sum of rank + 1 terms, and of the row's scale.
        lost = 2**-21 * (base[name].abs() + 0.7 * up.abs() @ down.abs())
        distance = (layer.dequantized().double().cpu() - exact).abs()
        assert (distance <= half_steps(exact) * (1 + 1e-4) + lost).all(), name


def test_the_attention_kernel_is_one_that_computes_right(device: torch.device, tmp_path: Path) -> None:
    if device.type == "cuda":
        candidates, shape = attention.EXACT["cuda"], attention.Shape(4608, heads=24, width=128, dtype="bfloat16")
    else:
        candidates, shape = ("native", "_native_math"), attention.Shape(64, heads=2, width=32, dtype="bfloat16")

    def time(name: str) -> float | None:
        return attention.time_kernel(name, shape, device)

    given = "attention", candidates, asdict(shape), device, tmp_path, time
    name, measured = fastest.choose_fastest(*given)
    assert measured
    assert time(name) is not None
    assert fastest.choose_fastest(*given) == (name, False)


PLANS: dict[str, tuple[PlanName, Room]] = {
    "alternating": ("alternating", Room(PLENTY, PLENTY)),
    "alternating, from files": ("alternating", Room(PLENTY, 0)),
    "offload-text": ("offload-text", Room(PLENTY, PLENTY)),
    "streamed": ("streamed", Room(0, PLENTY)),  # no block stays: all pass through the slots, on a stream of their own
}


@pytest.mark.parametrize("case", PLANS)
def test_every_plan_draws_what_resident_draws(device: torch.device, case: str) -> None:
    plan, room = PLANS[case]
    expected, generator = build(device, memory_plan="resident"), build(device, room, memory_plan=plan)
    assert generator.parts.memory.choice.plan.name == plan
    for model, scale in (("dev", 1.0), ("schnell", 0.3), ("dev", 1.0), ("dev", 0.0)):
        asked: dict[str, Any] = {"model": model, "lora_scale": scale}
        one, other = pixels(generator, **asked), pixels(expected, **asked)
        if generator.parts.memory.choice.strips:
            assert np.abs(one - other).max() <= 16  # bfloat16 rounds elsewhere
        else:
            assert np.array_equal(one, other)


def test_what_streams_lies_in_pinned_memory(device: torch.device) -> None:
    placed = build(device, memory_plan="offload-text").parts.memory.placed("text_encoder_2")
    names = [name for block in measure.block_names("text_encoder_2", placed.network).values() for name in block]
    assert names
    for name in names:
        weight = placed.network.parameters[name].data
        assert weight.device.type == "cpu"
        assert weight.is_pinned() == (device.type == "cuda")


def test_loading_to_the_device_gives_what_the_files_hold(device: torch.device) -> None:
    file = MINI / "dev/transformer/diffusion_pytorch_model.safetensors"
    stored = dict(stored_tensors(file))
    targets = {name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in stored.items()}
    fill((stored[name], targets[name]) for name in stored)
    assert all(torch.equal(targets[name].cpu(), tensor) for name, tensor in load_file(file).items())


def test_an_exhausted_device_is_survived(device: torch.device) -> None:
    """The request is drawn under another plan, or fails with the numbers; a CPU is told that memory ran out."""
    generator = build(device)
    before = pixels(generator)
    told = iter([torch.OutOfMemoryError("told to")])

    def observe(_: Step) -> None:
        if device.type == "cpu" and (error := next(told, None)):
            raise error

    with exhausted(device), suppress(DeviceMemoryError):
        draw(generator, observe, aspect_ratio="custom", width=1440, height=1440)
    assert np.abs(pixels(generator) - before).max() <= 16


@contextmanager
def exhausted(device: torch.device) -> Iterator[None]:
    """Leave a GPU's allocator one more megabyte."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.empty_cache()
    try:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_budget_limits_what_is_taken(device: torch.device) -> None:
    """On a GPU it becomes the allocator's cap."""
    try:
        budget = 4 * 2**30
        room = measure.available_room(device, budget)
        assert room.device <= budget - (measure.CONTEXT_BYTES if device.type == "cuda" else 0)
        if device.type == "cuda":
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(budget, dtype=torch.uint8, device=device)
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
