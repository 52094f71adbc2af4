"""Parts that are no plain low-rank product: DoRA magnitudes, differences, norms, oddities. By hand in float64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flux_lora.lora.formats import read
from tests.lora.formats.helpers import (
    INPUTS,
    bfl_flux,
    check,
    file_tensor,
    shapes,
    small_text_encoder,
    tiny_flux,
    to_diffusers,
    write,
)

LAYER = "transformer_blocks.0.attn.to_q"


def dora(weight: Tensor, update: Tensor, magnitude: Tensor, dim: int) -> Tensor:
    moved = weight + update
    trained: Tensor = magnitude * moved / torch.linalg.vector_norm(moved, dim=dim, keepdim=True)
    return trained


@pytest.mark.parametrize(
    ("suffix", "shape", "dim"),
    [
        # modules/module/LoRAModule.py of Nerogar/OneTrainer: DoRAModule with and without decompose_output_axis
        ("dora_scale", (9216, 1), 1),
        ("dora_scale", (1, INPUTS), 0),
        ("dora_scale", (1, INPUTS, 1, 1), 0),
        # toolkit/models/DoRA.py of ostris/ai-toolkit
        ("magnitude", (9216,), 1),
        ("lora_magnitude_vector.weight", (9216,), 1),
        ("lora_magnitude_vector.default", (9216,), 1),
    ],
)
def test_dora_over_a_fused_layer(suffix: str, shape: tuple[int, ...], dim: int, tmp_path: Path) -> None:
    base = dict(bfl_flux().state_dict())
    name = "double_blocks.0.img_attn.qkv"
    down, up, magnitude = file_tensor(2, INPUTS), file_tensor(9216, 2), file_tensor(*shape)
    key = f"diffusion_model.{name}"
    path = write(
        tmp_path / "x.safetensors",
        {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": 3, f"{key}.{suffix}": magnitude},
    )
    column = magnitude.reshape((-1, 1) if dim else (1, -1))
    trained = base | {f"{name}.weight": dora(base[f"{name}.weight"], 1.5 * up @ down, column, dim)}
    adapter = check(path, to_diffusers(base), to_diffusers(trained))
    assert "LoRA with DoRA, rank 2, alpha 3" in adapter.summary


def test_dora_over_the_swapped_halves(tmp_path: Path) -> None:
    base = dict(bfl_flux().state_dict())
    name = "final_layer.adaLN_modulation.1"
    down, up, magnitude = file_tensor(2, INPUTS), file_tensor(6144, 2), file_tensor(6144, 1)
    key = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": magnitude}
    trained = base | {f"{name}.weight": dora(base[f"{name}.weight"], up @ down, magnitude, 1)}
    check(write(tmp_path / "x.safetensors", tensors), to_diffusers(base), to_diffusers(trained))


@pytest.mark.parametrize(
    ("key", "parameter"),
    [
        # toolkit/lora_special.py of ostris/ai-toolkit: FullModule
        (f"transformer.{LAYER}.diff", f"{LAYER}.weight"),
        (f"transformer.{LAYER}.diff_b", f"{LAYER}.bias"),
        ("transformer.transformer_blocks.0.attn.norm_q.diff", "transformer_blocks.0.attn.norm_q.weight"),
        # lycoris/modules/norms.py of KohakuBlueleaf/LyCORIS
        (
            "lora_unet_single_blocks_0_norm_key_norm.w_norm",
            "single_transformer_blocks.0.attn.norm_k.weight",
        ),
        # comfy/lora.py of comfyanonymous/ComfyUI: parameters that are not called weight keep their name
        (
            "diffusion_model.double_blocks.0.txt_attn.norm.query_norm.scale.diff",
            "transformer_blocks.0.attn.norm_added_q.weight",
        ),
    ],
)
def test_differences(key: str, parameter: str, tmp_path: Path) -> None:
    base = dict(tiny_flux().state_dict())
    difference = file_tensor(*base[parameter].shape)
    trained = base | {parameter: base[parameter] + difference}
    check(write(tmp_path / "x.safetensors", {key: difference}), base, trained)


@pytest.mark.parametrize("prefix", ["lora_te1_text_model_", "text_encoder.text_model."])
def test_norms_of_clip(prefix: str, tmp_path: Path) -> None:
    base = dict(small_text_encoder("text_encoder").state_dict())
    name = "encoder.layers.1.layer_norm2"
    key = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
    weight, bias = file_tensor(16), file_tensor(16)
    trained = base | {f"{name}.weight": base[f"{name}.weight"] + weight, f"{name}.bias": base[f"{name}.bias"] + bias}
    path = write(tmp_path / "x.safetensors", {f"{key}.w_norm": weight, f"{key}.b_norm": bias})
    check(path, base, trained, "text_encoder")


def test_convolutions_alpha_zero_and_a_difference_of_the_bias(tmp_path: Path) -> None:
    """Alpha 0 means the rank: LoRAModule.__init__ of sd-scripts' networks/lora_flux.py."""
    base = dict(tiny_flux().state_dict())
    down, up, bias = file_tensor(2, 32, 1, 1), file_tensor(32, 2, 1, 1), file_tensor(32)
    tensors: dict[str, Tensor | float] = {
        "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight": down,
        "lora_transformer_transformer_blocks_0_attn_to_q.lora_up.weight": up,
        "lora_transformer_transformer_blocks_0_attn_to_q.alpha": 0,
        "lora_transformer_transformer_blocks_0_attn_to_q.diff_b": bias,
    }
    product = up.flatten(1) @ down.flatten(1)
    trained = base | {
        f"{LAYER}.weight": base[f"{LAYER}.weight"] + product,
        f"{LAYER}.bias": base[f"{LAYER}.bias"] + bias,
    }
    check(write(tmp_path / "x.safetensors", tensors), base, trained)


def test_lokr_with_a_core(tmp_path: Path) -> None:
    """lycoris/functional/general.py of KohakuBlueleaf/LyCORIS: rebuild_tucker, its Einstein sum taken literally."""
    base = dict(tiny_flux().state_dict())
    w1, a, b, core = file_tensor(4, 4), file_tensor(2, 8), file_tensor(2, 8), file_tensor(2, 2, 1, 1)
    w2 = torch.einsum("ijkl,ip,jr->prkl", core, a, b)[..., 0, 0]
    key = f"lycoris_{LAYER.replace('.', '_')}.lokr"
    tensors = {f"{key}_w1": w1, f"{key}_w2_a": a, f"{key}_w2_b": b, f"{key}_t2": core}
    tensors[f"lycoris_{LAYER.replace('.', '_')}.alpha"] = torch.tensor(3.0)
    trained = base | {f"{LAYER}.weight": base[f"{LAYER}.weight"] + 1.5 * torch.kron(w1, w2)}
    check(write(tmp_path / "x.safetensors", tensors), base, trained)


def test_two_full_kronecker_factors_ignore_alpha(tmp_path: Path) -> None:
    """ai-toolkit once wrote 9999999999 there (lokr_full_rank in toolkit/config_modules.py)."""
    base = dict(tiny_flux().state_dict())
    w1, w2 = file_tensor(4, 4), file_tensor(8, 8)
    tensors: dict[str, Tensor | float] = {
        f"transformer.{LAYER}.lokr_w1": w1,
        f"transformer.{LAYER}.lokr_w2": w2,
        f"transformer.{LAYER}.alpha": 9999999999,
    }
    trained = base | {f"{LAYER}.weight": base[f"{LAYER}.weight"] + torch.kron(w1, w2)}
    adapter = check(write(tmp_path / "x.safetensors", tensors), base, trained)
    assert list(adapter.ignored) == [f"transformer.{LAYER}.alpha"]


def test_guidance_is_irrelevant_where_there_is_none(tmp_path: Path) -> None:
    """FLUX.1-schnell alone has no guidance embedder."""
    model = tiny_flux()
    served = {name: shape for name, shape in shapes(model.state_dict()).items() if "guidance" not in name}
    tensors = {
        f"transformer.{LAYER}.lora_A.weight": file_tensor(2, 32),
        f"transformer.{LAYER}.lora_B.weight": file_tensor(32, 2),
    }
    guidance = "transformer.time_text_embed.guidance_embedder.linear_2"
    tensors |= {f"{guidance}.lora_A.weight": file_tensor(2, 32), f"{guidance}.lora_B.weight": file_tensor(32, 2)}
    adapter = read(write(tmp_path / "x.safetensors", tensors), {"transformer": served})
    assert len(adapter.updates["transformer"]) == 1
    assert set(adapter.ignored) == {f"{guidance}.lora_A.weight", f"{guidance}.lora_B.weight"}
    assert "2 keys without effect" in adapter.summary
