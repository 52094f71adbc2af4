"""Trainers' spellings of the same low-rank update: ΔW = α/r · up @ down, by hand in float64."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.lora.formats.helpers import (
    INPUTS,
    State,
    bfl_flux,
    check,
    file_tensor,
    linears,
    small_text_encoder,
    tiny_flux,
    to_diffusers,
    write,
)

RANK, ALPHA = 2, 3


@dataclass(frozen=True)
class Spelling:
    """How a trainer writes a layer's name, and the ends of its keys; whether alpha is stored, and who is named."""

    prefix: str
    underscores: bool
    down: str
    up: str
    alpha: bool
    family: str

    def key(self, layer: str, end: str) -> str:
        return f"{self.prefix}{layer.replace('.', '_') if self.underscores else layer}.{end}"


PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")

IN_BFL_LAYOUT = {
    # kohya-ss/sd-scripts: LoRANetwork in networks/lora_flux.py, and the list that heads networks/convert_flux_lora.py
    "sd-scripts": Spelling("lora_unet_", True, *KOHYA, True, "kohya sd-scripts"),
    # the same with the layer's dots kept, as merging tools write them
    "lora_unet with dots": Spelling("lora_unet_", False, *KOHYA, True, "kohya sd-scripts"),
    # modules/modelSaver/mixin/LoRASaverMixin.py of Nerogar/OneTrainer: _save_comfy and _save_original
    "ComfyUI with alpha": Spelling("diffusion_model.", False, *PEFT, True, "BFL/ComfyUI"),
    "original": Spelling("", False, *PEFT, True, "BFL/ComfyUI"),
    # loaders/lora_conversion_utils.py of huggingface/diffusers: _convert_fal_kontext_lora_to_diffusers
    "fal": Spelling("base_model.model.", False, *PEFT, False, "BFL/ComfyUI"),
    # comfy/lora.py of comfyanonymous/ComfyUI: the generic keys of model_lora_keys_unet with any of its suffixes
    "ComfyUI, kohya suffixes": Spelling("diffusion_model.", False, *KOHYA, True, "BFL/ComfyUI"),
}
IN_DIFFUSERS_LAYOUT = {
    # toolkit/network_mixins.py of ostris/ai-toolkit: get_state_dict with peft_format; Replicate's trainer runs it
    "ai-toolkit": Spelling("transformer.", False, *PEFT, False, "diffusers/PEFT"),
    "without prefix": Spelling("", False, *PEFT, False, "diffusers/PEFT"),
    # loaders/lora_pipeline.py of huggingface/diffusers, FluxLoraLoaderMixin.lora_state_dict: "For state dicts like …"
    "alpha beside": Spelling("transformer.", False, *PEFT, True, "diffusers/PEFT"),
    "PEFT with an adapter's name": Spelling(
        "transformer.", False, "lora_A.default.weight", "lora_B.default.weight", False, "diffusers/PEFT"
    ),
    "PEFT around diffusers": Spelling("transformer.base_model.model.", False, *PEFT, False, "diffusers/PEFT"),
    "kohya suffixes with an adapter's name": Spelling(
        "transformer.", False, "lora_down.default.weight", "lora_up.default.weight", True, "diffusers/PEFT"
    ),
    "older diffusers": Spelling("transformer.", False, "lora.down.weight", "lora.up.weight", False, "diffusers/PEFT"),
    # modules/util/convert_lora_util.py of Nerogar/OneTrainer: convert_to_mixture
    "OneTrainer": Spelling("lora_transformer_", True, *KOHYA, True, "OneTrainer"),
    # simpletuner/helpers/training/lora_format.py of bghira/SimpleTuner: convert_diffusers_to_comfyui
    "SimpleTuner for ComfyUI": Spelling("diffusion_model.", False, *PEFT, True, "BFL/ComfyUI"),
}


def train(model: nn.Module, spelling: Spelling, columns: int | None = None) -> tuple[State, State]:
    """A file's tensors, and the model's weights with their update."""
    torch.manual_seed(1)
    trained = dict(model.state_dict())
    tensors: State = {}
    for name, layer in linears(model).items():
        down, up = file_tensor(RANK, columns or layer.in_features), file_tensor(layer.out_features, RANK)
        tensors |= {spelling.key(name, spelling.down): down, spelling.key(name, spelling.up): up}
        if spelling.alpha:
            tensors[spelling.key(name, "alpha")] = torch.tensor(float(ALPHA))
        trained[f"{name}.weight"] = layer.weight.detach() + up @ down * ((ALPHA if spelling.alpha else RANK) / RANK)
    return tensors, trained


@pytest.mark.parametrize("spelling", IN_BFL_LAYOUT.values(), ids=IN_BFL_LAYOUT)
def test_bfl_layout(spelling: Spelling, tmp_path: Path) -> None:
    model = bfl_flux()
    tensors, trained = train(model, spelling, INPUTS)
    path = write(tmp_path / "x.safetensors", tensors)
    adapter = check(path, to_diffusers(model.state_dict()), to_diffusers(trained))
    assert adapter.family == spelling.family
    assert f"LoRA, rank 2, {'alpha 3' if spelling.alpha else 'no alpha (scale 1)'}" in adapter.summary


@pytest.mark.parametrize("spelling", IN_DIFFUSERS_LAYOUT.values(), ids=IN_DIFFUSERS_LAYOUT)
def test_diffusers_layout(spelling: Spelling, tmp_path: Path) -> None:
    model = tiny_flux()
    tensors, trained = train(model, spelling)
    adapter = check(write(tmp_path / "x.safetensors", tensors), model.state_dict(), trained)
    assert adapter.family == spelling.family


def test_lora_alpha_is_alpha(tmp_path: Path) -> None:
    """SimpleTuner's spelling: simpletuner/helpers/training/lora_format.py of bghira/SimpleTuner."""
    model = tiny_flux()
    tensors, trained = train(model, IN_DIFFUSERS_LAYOUT["alpha beside"])
    renamed = {key.replace(".alpha", ".lora_alpha"): tensor for key, tensor in tensors.items()}
    check(write(tmp_path / "x.safetensors", renamed), model.state_dict(), trained)


@pytest.mark.parametrize(
    ("component", "prefix"),
    [
        ("text_encoder", "lora_te1_"),  # networks/lora_flux.py of kohya-ss/sd-scripts
        ("text_encoder_2", "lora_te3_"),
        ("text_encoder_2", "lora_te2_"),  # LyCORIS in sd-scripts, and OneTrainer
        ("text_encoder", "text_encoders.clip_l.transformer."),  # modules/model/FluxModel.py of Nerogar/OneTrainer
        ("text_encoder_2", "text_encoders.t5xxl.transformer."),
        ("text_encoder_2", "text_encoder_2."),
        ("text_encoder", "text_encoder.base_model.model."),
    ],
)
def test_text_encoders(component: str, prefix: str, tmp_path: Path) -> None:
    model = small_text_encoder(component)
    spelling = Spelling(prefix, prefix.endswith("_"), *KOHYA, True, "")
    tensors, trained = train(model, spelling)
    if component == "text_encoder":  # trainers' transformers has one level more than version 5
        level = "text_model" + prefix[-1]
        tensors = {prefix + level + key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    check(write(tmp_path / "x.safetensors", tensors), dict(model.state_dict()), trained, component)


def test_xlabs(tmp_path: Path) -> None:
    """src/flux/modules/layers.py of XLabs-AI/x-flux: DoubleStreamBlockLoraProcessor, SingleStreamBlockLoraProcessor."""
    model = bfl_flux()
    trained = dict(model.state_dict())
    tensors: State = {}
    for name in linears(model):
        block, _, layer = name.partition(".")[2].partition(".")
        block = f"{name.partition('.')[0]}.{block}.processor"
        adapter = {
            "img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj": "proj_lora1",
            "txt_attn.proj": "proj_lora2", "linear1": "qkv_lora", "linear2": "proj_lora",
        }.get(layer)  # fmt: skip
        if adapter:
            weight = trained[f"{name}.weight"].clone()
            rows = 9216 if layer == "linear1" else len(weight)  # the MLP's rows of linear1 are left alone
            down, up = file_tensor(RANK, INPUTS), file_tensor(rows, RANK)
            tensors |= {f"{block}.{adapter}.down.weight": down, f"{block}.{adapter}.up.weight": up}
            weight[:rows] += up @ down
            trained[f"{name}.weight"] = weight
    assert "single_blocks.1.processor.qkv_lora.up.weight" in tensors
    path = write(tmp_path / "x.safetensors", tensors)
    assert check(path, to_diffusers(model.state_dict()), to_diffusers(trained)).family == "XLabs"
