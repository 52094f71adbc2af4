"""What must hold on a GPU too; the same checks on the CPU are in test_generator.py and adapters/test_merge.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flux_lora import checkpoints, devices
from flux_lora.adapters.formats import read
from flux_lora.adapters.merge import MergedModule
from flux_lora.generator import Generator
from flux_lora.request import Request
from flux_lora.settings import Settings
from tests.conftest import MINI

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

WITNESS = {"prompt": "a witness", "seed": 7, "num_inference_steps": 4, "output_format": "png"}


def build(weights: Path = MINI) -> Generator:
    return Generator(Settings(weights=weights, device="cuda"), log=lambda _: None)


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
    pipeline = checkpoints.load(MINI, torch.device("cuda:0"), torch.bfloat16).pipelines["dev"]
    module = pipeline.transformer
    pristine = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    merged = MergedModule("transformer", module, {})
    shapes = {name: MergedModule(name, getattr(pipeline, name), {}).shapes for name in checkpoints.ADAPTABLE}
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
