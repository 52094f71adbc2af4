"""Files written by LyCORIS's own code, judged by LyCORIS's own forward pass."""

from pathlib import Path

import pytest
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import save_file
from torch import nn

from tests.lora.formats.helpers import INPUTS, State, acting, bfl_flux, check, randomize, tiny_flux, to_diffusers

ALGORITHMS = {
    "lora": {"algo": "lora"},
    "lora, rank-stabilised": {"algo": "lora", "rs_lora": True},
    "dora by rows": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "dora by columns": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "loha, dora": {"algo": "loha", "dora_wd": True, "wd_on_output": False},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr, both decomposed": {"algo": "lokr", "decompose_both": True},
    "lokr, full": {"algo": "lokr", "full_matrix": True},
    "lokr, dora": {"algo": "lokr", "factor": 2, "dora_wd": True},
    "full": {"algo": "full"},
}


@pytest.fixture(autouse=True)
def _prefix() -> object:
    yield
    LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})


def train(model: nn.Module, prefix: str, **options: object) -> State:
    """Wrap the linear layers, give the adapters random numbers, and return the file's tensors."""
    LycorisNetwork.apply_preset({"target_module": ["Linear"], "lora_prefix": prefix})
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=3, **options)
    network.apply_to()
    for adapter in network.loras:
        randomize(adapter.parameters())
    network.double()
    return {key: tensor.contiguous() for key, tensor in network.state_dict().items()}


def state_as_trained(model: nn.Module, base: State, columns: int | None = None) -> State:
    trained = dict(base)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            weight, bias = acting(layer, columns or layer.in_features)
            trained |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return trained


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_kohya_names_over_fused_layers(options: dict[str, object], tmp_path: Path) -> None:
    model = bfl_flux(single=1)
    base = model.state_dict()
    tensors = train(model, "lora_unet", **options)
    save_file(tensors, tmp_path / "x.safetensors")
    assert any(key.startswith("lora_unet_double_blocks_0_img_attn_qkv.") for key in tensors)
    adapter = check(tmp_path / "x.safetensors", to_diffusers(base), to_diffusers(state_as_trained(model, base, INPUTS)))
    assert adapter.family == "kohya sd-scripts"


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_lycoris_names_in_diffusers_layout(options: dict[str, object], tmp_path: Path) -> None:
    model = tiny_flux()
    base = model.state_dict()
    tensors = train(model, "lycoris", **options)
    save_file(tensors, tmp_path / "x.safetensors")
    assert any(key.startswith("lycoris_transformer_blocks_0_attn_to_q.") for key in tensors)
    check(tmp_path / "x.safetensors", base, state_as_trained(model, base))
