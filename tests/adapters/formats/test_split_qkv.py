"""sd-scripts' ``split_qkv=True`` against converters that write the same shapes.

Trainer: networks/lora_flux.py of kohya-ss/sd-scripts, LoRAModule.forward with split_dims and LoRANetwork.state_dict.
Converters: networks/convert_flux_lora.py there; lora_fuse_qkv in modules/util/convert_util.py of Nerogar/OneTrainer.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flux_lora.adapters.formats import read
from flux_lora.errors import FormatError
from tests.adapters.formats.helpers import (
    INPUTS,
    State,
    bfl_flux,
    check,
    file_tensor,
    linears,
    shapes,
    to_diffusers,
    write,
)

RANK, ALPHA = 2, 3
PARTS = {"qkv": (3072,) * 3, "linear1": (3072,) * 3 + (12288,)}


def train(*, converted: bool, only: str = "") -> tuple[State, State, State]:
    """Adapters of rank 2 and alpha 3 for each part: a file's tensors, the weights without and with them."""
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
            tensors[f"{key}.alpha"] = torch.tensor(float(ALPHA * (len(sizes) if converted else 1)))
            product: Tensor = torch.cat([up @ down for up, down in zip(ups, downs, strict=True)])
            trained[f"{name}.weight"] = base[f"{name}.weight"] + ALPHA / RANK * product
    return tensors, to_diffusers(base), to_diffusers(trained)


@pytest.mark.parametrize(
    ("metadata", "converted", "only", "told_by"),
    [
        ({"ss_network_args": json.dumps({"split_qkv": "True"})}, False, "", "ss_network_args"),
        ({"ss_network_args": json.dumps({"split_qkv": "True"})}, False, "qkv", "ss_network_args"),
        ({"ss_network_dim": "2"}, False, "linear1", "ss_network_dim"),
        ({}, False, "", "alpha"),
        ({"ss_network_args": json.dumps({"split_qkv": "False"})}, True, "", None),
        ({}, True, "", None),
    ],
)
def test_alpha_goes_with_the_rank_it_was_trained_with(
    metadata: dict[str, str], converted: bool, only: str, told_by: str | None, tmp_path: Path
) -> None:
    tensors, base, trained = train(converted=converted, only=only)
    adapter = check(write(tmp_path / "x.safetensors", tensors, metadata), base, trained)
    if told_by:
        assert "rank 2, alpha 3" in adapter.summary
        assert f"split qkv, by {told_by}" in adapter.summary
    else:
        assert "split qkv" not in adapter.summary


def test_what_does_not_tell_is_refused(tmp_path: Path) -> None:
    tensors, base, _ = train(converted=False, only="linear1")
    with pytest.raises(FormatError, match="split_qkv"):
        read(write(tmp_path / "x.safetensors", tensors), {"transformer": shapes(base)})


def test_zeros_need_no_decision(tmp_path: Path) -> None:
    tensors, base, _ = train(converted=False, only="linear1")
    zeros = {key: torch.zeros_like(tensor) if ".lora_up" in key else tensor for key, tensor in tensors.items()}
    check(write(tmp_path / "x.safetensors", zeros), base, base)
