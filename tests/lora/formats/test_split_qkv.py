"""sd-scripts' ``split_qkv=True`` against converters that write the same shapes.

Trainer: networks/lora_flux.py of kohya-ss/sd-scripts, LoRAModule.forward with split_dims and LoRANetwork.state_dict.
Converters: networks/convert_flux_lora.py there; lora_fuse_qkv in modules/util/convert_util.py of Nerogar/OneTrainer.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.lora.formats.helpers import (
    INPUTS,
    State,
    bfl_flux,
    check,
    file_tensor,
    linears,
    to_diffusers,
    write,
)

RANK, ALPHA = 2, 3
PARTS = {"qkv": (3072,) * 3, "linear1": (3072,) * 3 + (12288,)}


SPLIT, WHOLE = ({"ss_network_args": json.dumps({"split_qkv": said})} for said in ("True", "False"))


def train(*, converted: bool, only: str = "", alpha: int = ALPHA) -> tuple[State, State, State]:
    """Adapters of rank 2 for each part: a file's tensors, the weights without and with them."""
    model = bfl_flux(single=1)
    base = dict(model.state_dict())
    tensors, trained = {}, dict(base)
    for name, layer in linears(model).items():
        sizes = PARTS.get(name.rpartition(".")[2], (layer.out_features,))
        if only in name:
            ups, downs = [file_tensor(size, RANK) for size in sizes], [file_tensor(RANK, INPUTS) for _ in sizes]
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.cat(downs)
            tensors[f"{key}.lora_up.weight"] = torch.block_diag(*ups)
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha * (len(sizes) if converted else 1)))
            product: Tensor = torch.cat([up @ down for up, down in zip(ups, downs, strict=True)])
            trained[f"{name}.weight"] = base[f"{name}.weight"] + alpha / RANK * product
    return tensors, to_diffusers(base), to_diffusers(trained)


@pytest.mark.parametrize(
    ("metadata", "converted", "only", "alpha", "told"),
    [
        (SPLIT, False, "", ALPHA, "split qkv, by ss_network_args"),
        (SPLIT, False, "qkv", ALPHA, "split qkv, by ss_network_args"),
        ({"ss_network_dim": "2"}, False, "linear1", ALPHA, "split qkv, by ss_network_dim"),
        ({}, False, "", ALPHA, "split qkv, by alpha"),
        ({}, False, "qkv", ALPHA, "split qkv, by the block-diagonal lora_up"),
        ({}, False, "linear1", ALPHA, "split qkv, by the block-diagonal lora_up"),
        (WHOLE, True, "", ALPHA, "not split qkv, by ss_network_args"),
        ({"ss_network_dim": "8"}, True, "linear1", ALPHA, "not split qkv, by ss_network_dim"),
        ({}, True, "", ALPHA, "not split qkv, by alpha"),
        ({}, True, "qkv", RANK, "not split qkv, by alpha, which is the whole rank"),
    ],
)
def test_alpha_goes_with_the_rank_it_was_trained_with(
    metadata: dict[str, str], converted: bool, only: str, alpha: int, told: str, tmp_path: Path
) -> None:
    tensors, base, trained = train(converted=converted, only=only, alpha=alpha)
    adapter = check(write(tmp_path / "x.safetensors", tensors, metadata), base, trained)
    assert f", {told}, sha256" in adapter.summary
    assert ("rank 2, alpha 3" in adapter.summary) == told.startswith("split")


@pytest.mark.parametrize("metadata", [SPLIT, {}])
def test_other_names_of_the_same_layers_mean_the_same(metadata: dict[str, str], tmp_path: Path) -> None:
    tensors, base, trained = train(converted=False)
    names = {name.replace(".", "_"): name for name in linears(bfl_flux(single=1))}
    renamed = {}
    for key, tensor in tensors.items():
        layer, _, end = key.removeprefix("lora_unet_").partition(".")
        renamed[f"diffusion_model.{names[layer]}.{end}"] = tensor
    assert "split qkv" in check(write(tmp_path / "x.safetensors", renamed, metadata), base, trained).summary


def test_zeros_need_no_decision(tmp_path: Path) -> None:
    tensors, base, _ = train(converted=False, only="linear1")
    zeros = {key: torch.zeros_like(tensor) if ".lora_up" in key else tensor for key, tensor in tensors.items()}
    check(write(tmp_path / "x.safetensors", zeros), base, base)
