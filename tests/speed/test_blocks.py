"""Blocks by fused kernels against diffusers' own, on the small model; and compiled as a whole."""

import copy
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from flux_lora.speed import blocks, compilation, kernels, projections
from flux_lora.speed.quantization import QuantizedLinear, prepare, quantized_layers

pytest.importorskip("triton", reason="Triton is there for Linux only")

CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (8, 12, 12),
}
TEXTS, IMAGES = 2, 4


@pytest.fixture(scope="module")
def model() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**CONFIG, guidance_embeds=True).eval()
    for name, parameter in model.named_parameters():
        if "norm_" in name and name.endswith("weight") and parameter.ndim == 1:  # else ones, which hide an exchange
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def inputs(dtype: torch.dtype, batch: int = 1) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.zeros(IMAGES, 3)
    ids[:, 1], ids[:, 2] = torch.arange(IMAGES) // 2, torch.arange(IMAGES) % 2
    return {
        "hidden_states": torch.randn(batch, IMAGES, CONFIG["in_channels"]).to(dtype),
        "encoder_hidden_states": torch.randn(batch, TEXTS, CONFIG["joint_attention_dim"]).to(dtype),
        "pooled_projections": torch.randn(batch, CONFIG["pooled_projection_dim"]).to(dtype),
        "timestep": torch.rand(batch).to(dtype),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXTS, 3),
    }


@torch.no_grad()
def run(model: Any, dtype: torch.dtype, batch: int = 1) -> Tensor:
    out: Tensor = model(**inputs(dtype, batch), return_dict=False)[0]
    return out


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def placed(model: nn.Module, dtype: torch.dtype) -> Any:
    other = copy.deepcopy(model).to(dtype)
    blocks.place(other)
    return other


def quantize(model: nn.Module) -> None:
    weights = dict(model.named_parameters())
    for name, layer in prepare(model, "fp8").items():
        layer.move(torch.device("cpu"))
        layer.write_rows(0, len(weights[name]), weights[name])


@pytest.mark.parametrize(("fused", "batch"), [(False, 2), (True, 1)])
def test_blocks_compute_what_diffusers_computes(model: Any, fused: bool, batch: int) -> None:
    exact = run(copy.deepcopy(model).double(), torch.float64, batch)
    ours = placed(model, torch.float32)
    if fused:
        projections.fuse(ours)
    assert distance(run(ours, torch.float32, batch), exact) < 2e-6


def test_bfloat16_is_rounded_less_often_than_in_diffusers(model: Any) -> None:
    model = copy.deepcopy(model).bfloat16()
    exact = run(copy.deepcopy(model).double(), torch.float64)
    theirs, ours = run(model, torch.bfloat16), run(placed(model, torch.bfloat16), torch.bfloat16)
    assert distance(ours, exact) < 1.1 * distance(theirs, exact) < 0.05


@pytest.mark.parametrize("fused", [False, True])
def test_quantized_blocks_compute_what_diffusers_computes(model: Any, fused: bool) -> None:
    theirs = copy.deepcopy(model)
    quantize(theirs)
    ours = placed(theirs, torch.float32)
    assert len(quantized_layers(ours)) == len(quantized_layers(theirs)) > 0
    if fused:
        projections.fuse(ours)
    # A last bit in float32 now and then decides between two numbers of eight bits.
    assert distance(run(ours, torch.float32), run(theirs, torch.float32).double()) < 1e-3
    assert distance(run(ours, torch.float32), run(model, torch.float32).double()) > 2e-3


def test_a_layer_that_is_not_quantized_gets_tokens_that_are_not(model: Any) -> None:
    theirs = copy.deepcopy(model)
    quantize(theirs)
    for name in (
        "single_transformer_blocks.0.proj_mlp",
        "transformer_blocks.0.ff.net.2",
        "transformer_blocks.0.attn.to_q",
    ):
        theirs.set_submodule(name, copy.deepcopy(model.get_submodule(name)))
        assert not isinstance(theirs.get_submodule(name), QuantizedLinear)
    ours = placed(theirs, torch.float32)
    assert distance(run(ours, torch.float32), run(theirs, torch.float32).double()) < 1e-3


TRACED, COMPILED = {"backend": "eager"}, {"options": compilation.OPTIONS}


@pytest.mark.parametrize(
    ("scheme", "compiler"),
    [
        pytest.param("fp8", TRACED, id="traced"),
        pytest.param("fp8", COMPILED, id="fp8", marks=pytest.mark.slow),
        pytest.param(None, COMPILED, id="bfloat16", marks=pytest.mark.slow),
    ],
)
def test_blocks_are_compiled_as_a_whole_and_once_for_each_class(
    model: Any, scheme: Any, compiler: dict[str, Any]
) -> None:
    ours = placed(model, torch.bfloat16)
    if scheme:
        quantize(ours)
    expected = run(ours, torch.bfloat16)
    before = compilation.graphs()
    ours.compile_repeated_blocks(fullgraph=True, dynamic=True, **compiler)
    compiled = run(ours, torch.bfloat16)
    assert distance(compiled, expected.double()) < 0.02
    assert compilation.graphs() - before == len(blocks.CLASSES)


def test_what_the_kernels_do_not_compute_goes_to_diffusers(model: Any) -> None:
    ours = placed(model, torch.float32)
    block = ours.single_transformer_blocks[0]
    hidden, text, temb = torch.randn(1, 6, 64), torch.randn(1, 3, 64), torch.randn(1, 64)
    with torch.no_grad():
        for one, other in zip(
            block(hidden, text, temb), model.single_transformer_blocks[0](hidden, text, temb), strict=True
        ):
            assert torch.equal(one, other)


def test_the_kernels_are_used(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    launch = kernels.launch

    def note(name: str, *rest: Any, **more: Any) -> None:
        launched.append(name)
        launch(name, *rest, **more)

    monkeypatch.setattr(kernels, "launch", note)
    run(placed(model, torch.float32), torch.float32)
    double = ["modulate", "rotate", "modulate"]
    assert launched == double + 2 * ["modulate", "rotate", "join"]
