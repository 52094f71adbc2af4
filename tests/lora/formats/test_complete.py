"""Files that adapt every layer of the real FLUX.1, CLIP-L and T5-XXL: each key is accounted for, each layer touched."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_lora.checkpoint.header import read_header
from flux_lora.lora.formats import foreign, read
from flux_lora.lora.formats.layouts import layers
from tests.lora.formats.helpers import bfl_sizes, linears

Sizes = dict[str, tuple[int, int]]
Parts = dict[str, tuple[int, ...]]


def real_models() -> dict[str, nn.Module]:
    """FLUX.1-dev as published: the defaults of each configuration, or the numbers of its config.json."""
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    t5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24}
    with torch.device("meta"):
        return {
            "transformer": FluxTransformer2DModel(guidance_embeds=True),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**clip)),
            "text_encoder_2": T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu")),
        }


MODELS = real_models()
SHAPES = {
    component: {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    for component, model in MODELS.items()
}
SIZES = {
    component: {name: (layer.out_features, layer.in_features) for name, layer in linears(model).items()}
    for component, model in MODELS.items()
}


def lora(rows: int, columns: int) -> Parts:
    return {"lora_A.weight": (1, columns), "lora_B.weight": (rows, 1)}


def kohya_lora(rows: int, columns: int) -> Parts:
    return {"lora_down.weight": (1, columns), "lora_up.weight": (rows, 1), "alpha": ()}


def kohya_dora(rows: int, columns: int) -> Parts:
    return kohya_lora(rows, columns) | {"dora_scale": (1, columns)}


def peft_dora(rows: int, columns: int) -> Parts:
    return lora(rows, columns) | {"lora_magnitude_vector": (rows,)}


def loha(rows: int, columns: int) -> Parts:
    return {f"hada_w{i}_{end}": size for i in (1, 2) for end, size in (("a", (rows, 1)), ("b", (1, columns)))}


def lokr(rows: int, columns: int) -> Parts:
    return {"lokr_w1": (32, 32), "lokr_w2_a": (rows // 32, 1), "lokr_w2_b": (1, columns // 32), "alpha": ()}


def xlabs_sizes() -> Sizes:
    doubles = [f"double_blocks.{i}.processor" for i in range(19)]
    sizes = {f"{p}.qkv_lora{i}": (9216, 3072) for p in doubles for i in (1, 2)}
    sizes |= {f"{p}.proj_lora{i}": (3072, 3072) for p in doubles for i in (1, 2)}
    singles = [f"single_blocks.{i}.processor" for i in range(38)]
    return sizes | {f"{p}.qkv_lora": (9216, 3072) for p in singles} | {f"{p}.proj_lora": (3072, 15360) for p in singles}


def underscores(name: str) -> str:
    return name.replace(".", "_")


FLUX, BFL, CLIP, T5 = SIZES["transformer"], bfl_sizes(19, 38), SIZES["text_encoder"], SIZES["text_encoder_2"]

ROWS: dict[str, tuple[Callable[[str], str], Callable[[int, int], Parts], Sizes]] = {
    "diffusers LoRA": (lambda name: f"transformer.{name}", lora, FLUX),
    "diffusers DoRA": (lambda name: f"transformer.{name}", peft_dora, FLUX),
    "diffusers CLIP": (lambda name: f"text_encoder.text_model.{name}", lora, CLIP),
    "kohya LoRA": (lambda name: f"lora_unet_{underscores(name)}", kohya_lora, BFL),
    "kohya DoRA": (lambda name: f"lora_unet_{underscores(name)}", kohya_dora, BFL),
    "kohya CLIP": (lambda name: f"lora_te1_text_model_{underscores(name)}", kohya_lora, CLIP),
    "kohya T5": (lambda name: f"lora_te3_{underscores(name)}", kohya_lora, T5),
    "BFL LoRA": (lambda name: f"diffusion_model.{name}", lora, BFL),
    "fal LoRA": (lambda name: f"base_model.model.{name}", lora, BFL),
    "OneTrainer LoRA": (lambda name: f"lora_transformer_{underscores(name)}", kohya_lora, FLUX),
    "OneTrainer LoHa": (lambda name: f"lora_transformer_{underscores(name)}", loha, FLUX),
    "OneTrainer T5": (lambda name: f"lora_te2_{underscores(name)}", kohya_dora, T5),
    "kohya LoHa": (lambda name: f"lora_unet_{underscores(name)}", loha, BFL),
    "kohya LoKr": (lambda name: f"lora_unet_{underscores(name)}", lokr, BFL),
    "BFL LoKr": (lambda name: f"diffusion_model.{name}", lokr, BFL),
    "LyCORIS LoKr": (lambda name: f"lycoris_{underscores(name)}", lokr, FLUX),
    "ai-toolkit LoKr": (lambda name: f"transformer.{name}", lokr, FLUX),
}


def write(path: Path, name_of: Callable[[str], str], parts_of: Callable[[int, int], Parts], sizes: Sizes) -> Path:
    tensors = {
        f"{name_of(name)}.{part}": torch.ones(shape, dtype=torch.float8_e5m2)
        for name, size in sizes.items()
        for part, shape in parts_of(*size).items()
    }
    save_file(tensors, path)
    return path


def touched(path: Path) -> set[tuple[str, str]]:
    """(component, parameter) that the file updates; every key does, and the file looks like no other model's."""
    adapter = read(path, SHAPES)
    assert not adapter.ignored
    assert foreign.recognise(read_header(path), SHAPES) is None
    return {
        (component, rows.parameter)
        for component, updates in adapter.updates.items()
        for update in updates
        for rows in update.target
    }


@pytest.mark.parametrize("row", ROWS)
def test_every_layer(row: str, tmp_path: Path) -> None:
    component = {"CLIP": "text_encoder", "T5": "text_encoder_2"}.get(row.split()[-1], "transformer")
    expected = {(component, f"{name}.weight") for name in SIZES[component]}
    assert touched(write(tmp_path / "x.safetensors", *ROWS[row])) == expected


def test_xlabs_adapts_attention(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.safetensors",
        str,
        lambda rows, columns: {"down.weight": (1, columns), "up.weight": (rows, 1)},
        xlabs_sizes(),
    )
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    expected = {f"{name}.weight" for name in FLUX if name.endswith(attention)}
    expected |= {f"single_transformer_blocks.{i}.proj_out.weight" for i in range(38)}
    assert touched(path) == {("transformer", name) for name in expected}


@pytest.mark.parametrize("component", SHAPES)
def test_no_two_layers_differ_only_in_dots(component: str) -> None:
    names = [layer.name.replace(".", "_") for layer in layers(component, SHAPES[component])]
    assert len(names) == len(set(names))
