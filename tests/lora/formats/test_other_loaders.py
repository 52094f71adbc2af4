"""Where the usual loaders agree with the trainers, and where they do not.

A failure here after an upgrade means that a loader was mended; then the docstrings that name its deviation must follow.
"""

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from flux_lora.lora.formats import read
from tests.lora.formats.helpers import State, bfl_flux, file_tensor, linears, merged, shapes, to_diffusers, write

ALPHA, RANK = 3, 2


def kohya(layer: str, down: Tensor, up: Tensor) -> State:
    key = f"lora_unet_{layer.replace('.', '_')}"
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(ALPHA))}


def ours(tensors: State, path: Path) -> State:
    base = to_diffusers(bfl_flux().state_dict())
    adapter = read(write(path / "x.safetensors", tensors), {"transformer": shapes(base)})
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    return merged(zero, adapter, 1, torch.float32, "transformer")


def diffusers(tensors: State) -> State:
    converted = _convert_kohya_flux_lora_to_diffusers({key: tensor.float() for key, tensor in tensors.items()})
    return {
        f"{key.removeprefix('transformer.').removesuffix('.lora_A.weight')}.weight": (
            converted[key.replace("lora_A", "lora_B")] @ down
        ).double()
        for key, down in converted.items()
        if ".lora_A." in key
    }


@pytest.mark.parametrize(
    "layer", ["double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "txt_in", "time_in.in_layer"]
)
def test_diffusers_agrees_on_kohya_layers(layer: str, tmp_path: Path) -> None:
    linear = linears(bfl_flux())[layer]
    tensors = kohya(layer, file_tensor(RANK, linear.in_features), file_tensor(linear.out_features, RANK))
    theirs, mine = diffusers(dict(tensors)), ours(tensors, tmp_path)
    assert theirs
    for name, change in theirs.items():
        torch.testing.assert_close(mine[name], change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", ["final_layer.linear", "final_layer.adaLN_modulation.1"])
def test_diffusers_drops_the_alpha_of_the_final_layer(layer: str, tmp_path: Path) -> None:
    linear = linears(bfl_flux())[layer]
    tensors = kohya(layer, file_tensor(RANK, linear.in_features), file_tensor(linear.out_features, RANK))
    [(name, change)] = diffusers(dict(tensors)).items()
    torch.testing.assert_close(ours(tensors, tmp_path)[name], ALPHA / RANK * change, rtol=1e-5, atol=1e-5)


def test_diffusers_drops_dora_scale() -> None:
    key = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{key}.{end}": torch.ones(2, 2) for end in ("lora_A.weight", "lora_B.weight", "dora_scale")}
    assert not any("dora" in key for key in FluxPipeline.lora_state_dict(tensors))


def test_lycoris_merges_lokr_at_its_scale_squared() -> None:
    """``get_diff_weight`` against ``get_weight``, which the forward pass uses."""
    module = LokrModule("x", nn.Linear(64, 64), lora_dim=RANK, alpha=ALPHA, factor=4)
    nn.init.normal_(module.lokr_w2_b)
    torch.testing.assert_close(module.get_diff_weight()[0], ALPHA / RANK * module.get_weight((64, 64)))
