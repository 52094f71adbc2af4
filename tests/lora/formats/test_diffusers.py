"""Files written by PEFT and by diffusers' ``save_lora_weights``, judged by PEFT's own forward pass."""

from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import Linear
from torch import nn

from flux_lora.lora.formats import read
from tests.lora.formats.helpers import (
    State,
    acting,
    check,
    check_component,
    linears,
    randomize,
    shapes,
    small_text_encoder,
    tiny_flux,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "alpha equals rank": {"r": 4, "lora_alpha": 4},
    "alpha differs": {"r": 4, "lora_alpha": 7},
    "rank-stabilised": {"r": 4, "lora_alpha": 7, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {"attn.to_q": 2, "proj_mlp": 8},
        "alpha_pattern": {"attn.to_q": 5, r"^single_transformer_blocks.*proj_out": 3},
    },
    "dora": {"r": 4, "lora_alpha": 7, "use_dora": True},
    "lora bias": {"r": 4, "lora_alpha": 7, "lora_bias": True},
}


def train(model: Any, config: dict[str, Any]) -> tuple[State, State]:
    """Give a model random adapters; its weights without them, and as it acts with them."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_adapter(LoraConfig(target_modules=list(linears(model)), **config))
    model.double()
    randomize(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    trained = dict(base)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            weight, bias = acting(layer, layer.in_features)
            trained |= {f"{name}.weight": weight} | ({f"{name}.bias": bias} if f"{name}.bias" in base else {})
    return base, trained


def save(directory: Path, **models: nn.Module) -> Path:
    """As diffusers' DreamBooth script for FLUX.1 does it."""
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(model) for name, model in models.items()}
    FluxPipeline.save_lora_weights(directory, **layers, **_collate_lora_metadata(models))
    return directory / "pytorch_lora_weights.safetensors"


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes its own lora_B biases for broken matrices
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformer(config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_flux()
    base, trained = train(model, config)
    adapter = check(save(tmp_path, transformer=model), base, trained)
    assert adapter.family == "diffusers/PEFT"
    assert not adapter.ignored


def test_each_component_has_its_own_settings(tmp_path: Path) -> None:
    models = {"transformer": tiny_flux(), "text_encoder": small_text_encoder("text_encoder")}
    configs = {"transformer": CONFIGS["alpha differs"], "text_encoder": CONFIGS["rank-stabilised"]}
    states = {name: train(model, configs[name]) for name, model in models.items()}
    adapter = read(save(tmp_path, **models), {name: shapes(base) for name, (base, _) in states.items()})
    for name, (base, trained) in states.items():
        check_component(adapter, base, trained, name)


def test_one_model_saved_alone_has_no_prefix(tmp_path: Path) -> None:
    model = tiny_flux()
    base, trained = train(model, CONFIGS["rank-stabilised"])
    model.save_lora_adapter(tmp_path)
    check(tmp_path / "pytorch_lora_weights.safetensors", base, trained)
