"""Layouts of public files that other loaders take: what each means, by hand in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Embedding
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file
from torch import Tensor

from flux_lora.errors import FormatError
from flux_lora.lora.formats import Adapter, read
from flux_lora.lora.merge import MergedModule
from tests.lora.formats.helpers import (
    State,
    acting,
    check,
    file_tensor,
    shapes,
    small_text_encoder,
    tiny_flux,
    write,
)

TO_Q = "transformer_blocks.0.attn.to_q"
FLUX, CLIP, T5 = (
    dict(model.state_dict())
    for model in (tiny_flux(), small_text_encoder("text_encoder"), small_text_encoder("text_encoder_2"))
)
for name in [name for name in T5 if name.endswith("embed_tokens.weight")]:
    del T5[name]  # the table's second name, which the served module has once
SERVED = {"transformer": shapes(FLUX), "text_encoder": shapes(CLIP), "text_encoder_2": shapes(T5)}
PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


def lora(layer: str, rows: int, columns: int, ends: tuple[str, str] = PEFT, rank: int = 2) -> State:
    return {f"{layer}.{ends[0]}": file_tensor(rank, columns), f"{layer}.{ends[1]}": file_tensor(rows, rank)}


def product(tensors: State) -> Tensor:
    down, up = tensors.values()
    return up @ down


def refusal(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> str:
    with pytest.raises(FormatError) as caught:
        read(write(path / "x.safetensors", tensors, metadata), SERVED, "x")
    return str(caught.value)


# A number that nothing reads


@pytest.mark.parametrize("alpha", [torch.inf, torch.nan, [1.0, 2.0]])
def test_alpha_of_full_kronecker_factors_is_not_judged(alpha: object, tmp_path: Path) -> None:
    """ai-toolkit's 9999999999 and the network_dim 100000 of LyCORIS's example, in float16."""
    w1, w2 = file_tensor(4, 4), file_tensor(8, 8)
    tensors = {f"lycoris_{TO_Q.replace('.', '_')}.{name}": part for name, part in (("lokr_w1", w1), ("lokr_w2", w2))}
    tensors[f"lycoris_{TO_Q.replace('.', '_')}.alpha"] = torch.tensor(alpha)
    trained = FLUX | {f"{TO_Q}.weight": FLUX[f"{TO_Q}.weight"] + torch.kron(w1, w2)}
    check(write(tmp_path / "x.safetensors", tensors), FLUX, trained)


@pytest.mark.parametrize("part", ["diff", "diff_b"])
def test_alpha_of_a_difference_is_not_judged(part: str, tmp_path: Path) -> None:
    parameter = f"{TO_Q}.{'bias' if part == 'diff_b' else 'weight'}"
    difference = file_tensor(*FLUX[parameter].shape)
    tensors: dict[str, Tensor | float] = {
        f"transformer.{TO_Q}.{part}": difference,
        f"transformer.{TO_Q}.alpha": torch.inf,
    }
    check(write(tmp_path / "x.safetensors", tensors), FLUX, FLUX | {parameter: FLUX[parameter] + difference})


def test_alpha_in_the_metadata_is_judged_where_it_is_used(tmp_path: Path) -> None:
    settings = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": float("inf")})}
    tensors = lora(f"transformer.{TO_Q}", 32, 32) | {f"transformer.{TO_Q}.alpha": torch.tensor(2.0)}
    assert read(write(tmp_path / "x.safetensors", tensors, settings), SERVED).updates["transformer"]
    del tensors[f"transformer.{TO_Q}.alpha"]
    assert "is not finite in float32" in refusal(tmp_path, tensors, settings)


def test_a_stray_alpha_is_harmless(tmp_path: Path) -> None:
    tensors = lora(f"transformer.{TO_Q}", 32, 32)
    trained = FLUX | {f"{TO_Q}.weight": FLUX[f"{TO_Q}.weight"] + product(tensors)}
    stray = {
        "transformer.proj_out.alpha": torch.tensor(1.0),
        "transformer.transformer_blocks.77.attn.to_q.alpha": torch.tensor(1.0),
    }
    adapter = check(write(tmp_path / "x.safetensors", tensors | stray), FLUX, trained)
    assert set(adapter.ignored) == set(stray)
    assert "2 keys without effect (alpha of nothing)" in adapter.summary


# Extractions of whole text encoders

TABLES = {
    "CLIP's words": ("text_encoder", "embeddings.token_embedding", "text_model.embeddings.token_embedding"),
    "CLIP's positions": ("text_encoder", "embeddings.position_embedding", "text_model.embeddings.position_embedding"),
    "T5's words": ("text_encoder_2", "shared", "shared"),
    "T5's words by their other name": ("text_encoder_2", "shared", "encoder.embed_tokens"),
    "T5's positions": (
        "text_encoder_2",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    ),
}
COMFY = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
}
BASE = {"text_encoder": CLIP, "text_encoder_2": T5}


@pytest.mark.parametrize("case", TABLES)
def test_tables_are_updated(case: str, tmp_path: Path) -> None:
    """ComfyUI's comfy_extras/nodes_lora_extract.py: every matrix of a text encoder, tables as well."""
    component, name, theirs = TABLES[case]
    base, parameter = BASE[component], f"{name}.weight"
    rows, columns = base[parameter].shape
    tensors = lora(COMFY[component] + theirs, rows, columns, KOHYA)
    trained = base | {parameter: base[parameter] + product(tensors)}
    check(write(tmp_path / "x.safetensors", tensors), base, trained, component)
    difference = file_tensor(*base[parameter].shape)
    path = write(tmp_path / "x.safetensors", {f"{COMFY[component]}{theirs}.diff": difference})
    check(path, base, base | {parameter: base[parameter] + difference}, component)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of PEFT, about a base model without a name
def test_peft_writes_the_factors_of_a_table_the_other_way_round(tmp_path: Path) -> None:
    wrapped = get_peft_model(
        small_text_encoder("text_encoder"),
        LoraConfig(r=3, lora_alpha=3, target_modules=["token_embedding"]),
    )
    wrapped.double()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(file_tensor(*parameter.shape))
    tensors = {
        f"text_encoder.{key.removeprefix('base_model.model.').replace('.default', '')}": tensor.clone()
        for key, tensor in wrapped.state_dict().items()
        if "lora_embedding" in key
    }
    [layer] = [module for module in wrapped.modules() if isinstance(module, Embedding)]
    with torch.no_grad():
        table = layer(torch.arange(99))
    save_file(tensors, tmp_path / "x.safetensors")
    trained = CLIP | {"embeddings.token_embedding.weight": table}
    check(tmp_path / "x.safetensors", CLIP, trained, "text_encoder")


@pytest.mark.parametrize(
    "key",
    [
        "text_encoders.clip_l.transformer.text_projection.lora_up.weight",
        "text_encoders.clip_l.transformer.text_projection.diff",
        "text_encoders.clip_l.logit_scale",
        "lora_te1_text_projection.lora_down.weight",
        "text_encoder.text_projection.lora_A.weight",
        "text_encoders.t5xxl.logit_scale",
        "text_encoders.t5xxl.transformer.lm_head.lora_up.weight",
    ],
)
def test_what_flux_1_never_uses_is_left_out(key: str, tmp_path: Path) -> None:
    tensors = lora(f"transformer.{TO_Q}", 32, 32)
    trained = FLUX | {f"{TO_Q}.weight": FLUX[f"{TO_Q}.weight"] + product(tensors)}
    path = write(tmp_path / "x.safetensors", tensors | {key: torch.full((4, 4), torch.nan)})
    check(path, FLUX, trained)
    adapter = read(path, SERVED)
    assert list(adapter.ignored) == [key]
    assert "1 keys without effect (FLUX.1 never uses what they change)" in adapter.summary


# Zeros


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


ZEROS: dict[str, dict[str, Tensor]] = {
    "both factors": {"lora_down.weight": zeros(2, 16), "lora_up.weight": zeros(16, 2)},
    "the second factor": {"lora_A.weight": torch.ones(2, 16), "lora_B.weight": zeros(16, 2)},
    "the first factor": {"lora_A.weight": zeros(2, 16), "lora_B.weight": torch.ones(16, 2), "alpha": torch.tensor(1.0)},
    "a difference": {"diff": zeros(16, 16), "diff_b": zeros(16)},
    "LoHa": {"hada_w1_a": torch.ones(16, 2), "hada_w1_b": torch.ones(2, 16), "hada_w2_a": zeros(16, 2),
             "hada_w2_b": torch.ones(2, 16)},
    "LoKr": {"lokr_w1": zeros(4, 4), "lokr_w2_a": torch.ones(4, 2), "lokr_w2_b": torch.ones(2, 4)},
    "OFT": {"oft_R.weight": zeros(4, 6)},
    "OFT of symmetric blocks": {"oft_blocks": torch.ones(4, 4, 4), "rescale": torch.ones(16, 1)},
    "BOFT": {"boft_R": zeros(1, 4, 4, 4), "boft_s": torch.ones(16, 1)},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("case", ZEROS)
def test_an_update_that_is_zero_costs_nothing(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """No pristine copy and no merge: the text encoder never learns of it."""
    layer = "text_encoder.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.{part}": tensor.to(dtype) for part, tensor in ZEROS[case].items()}
    tensors |= {key: tensor.to(dtype) for key, tensor in lora(f"transformer.{TO_Q}", 32, 32).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = read(tmp_path / "x.safetensors", SERVED)
    assert set(adapter.ignored) == {key for key in tensors if key.startswith(layer)}
    assert f"{len(adapter.ignored)} keys without effect (zeros)" in adapter.summary
    assert "CLIP" not in adapter.summary
    encoder = small_text_encoder("text_encoder")
    state = MergedModule("text_encoder", encoder, {})
    assert state.state_of([(adapter, 1.0)]) == ()
    assert not state.bring([(adapter, 1.0)])
    assert state.where() == "no pristine weights kept"


def test_the_magnitude_of_a_zero_update_counts(tmp_path: Path) -> None:
    tensors = {f"transformer.{TO_Q}.lora_A.weight": zeros(2, 32), f"transformer.{TO_Q}.lora_B.weight": zeros(32, 2)}
    tensors[f"transformer.{TO_Q}.dora_scale"] = magnitude = file_tensor(32, 1)
    weight = FLUX[f"{TO_Q}.weight"]
    trained = FLUX | {f"{TO_Q}.weight": magnitude * weight / weight.norm(dim=1, keepdim=True)}
    check(write(tmp_path / "x.safetensors", tensors), FLUX, trained)


def test_nothing_but_zeros_is_the_base_model(tmp_path: Path) -> None:
    tensors = {
        f"transformer.{TO_Q}.lora_A.weight": torch.ones(2, 32),
        f"transformer.{TO_Q}.lora_B.weight": zeros(32, 2),
    }
    adapter = check(write(tmp_path / "x.safetensors", tensors), FLUX, FLUX)
    assert adapter.updates == {"transformer": ()}
    assert "LoRA, rank 2, no alpha (scale 1), all of it zeros, so that it changes nothing" in adapter.summary


# One layer under two names


def under_two_names(scale: float = 1.0) -> State:
    """BFL's fused layer and diffusers' three, the latter with factors of another size and the same product."""
    fused = lora("lora_unet_double_blocks_0_img_attn_qkv", 96, 32, KOHYA)
    down, up = fused.values()
    parts: State = {}
    for index, name in enumerate(("to_q", "to_k", "to_v")):
        layer = f"transformer.transformer_blocks.0.attn.{name}"
        parts |= {f"{layer}.lora_A.weight": 4 * down, f"{layer}.lora_B.weight": scale / 4 * up[32 * index :][:32]}
    return fused | parts


def trained_once(tensors: State) -> State:
    down, up = (tensors[f"lora_unet_double_blocks_0_img_attn_qkv.{end}"] for end in KOHYA)
    change = up @ down
    names = [f"transformer_blocks.0.attn.{name}.weight" for name in ("to_q", "to_k", "to_v")]
    return FLUX | {name: FLUX[name] + change[32 * index :][:32] for index, name in enumerate(names)}


def test_one_update_in_two_layouts_is_one(tmp_path: Path) -> None:
    tensors = under_two_names()
    adapter = check(write(tmp_path / "x.safetensors", tensors), FLUX, trained_once(tensors))
    assert "6 keys without effect (the same update is there under another name)" in adapter.summary
    assert adapter.family == "kohya sd-scripts"


@pytest.mark.parametrize("scale", [0.5, -1.0, 1.05])
def test_two_updates_in_two_layouts_are_an_error(scale: float, tmp_path: Path) -> None:
    message = refusal(tmp_path, under_two_names(scale))
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_" in message
    assert "transformer.transformer_blocks.0.attn.to_" in message
    assert "has two updates that differ" in message


def test_a_difference_in_one_row_is_an_error(tmp_path: Path) -> None:
    tensors = under_two_names()
    tensors["transformer.transformer_blocks.0.attn.to_v.lora_B.weight"][7] *= -1
    assert "transformer.transformer_blocks.0.attn.to_v.lora_" in refusal(tmp_path, tensors)


PREFIXES = ["lycoris_", "base_model.model.", "transformer.", "lora_transformer_"]


@pytest.mark.parametrize("other", PREFIXES)
def test_one_layer_with_two_prefixes(other: str, tmp_path: Path) -> None:
    layer = TO_Q.replace(".", "_") if other.endswith("_") else TO_Q
    one = lora(TO_Q, 32, 32)
    two = {f"{other}{layer}.{key.removeprefix(f'{TO_Q}.')}": tensor.clone() for key, tensor in one.items()}
    trained = FLUX | {f"{TO_Q}.weight": FLUX[f"{TO_Q}.weight"] + product(one)}
    adapter = check(write(tmp_path / "x.safetensors", one | two), FLUX, trained)
    assert len(adapter.ignored) == 2
    two = {key: tensor * -1 if "lora_B" in key else tensor for key, tensor in two.items()}
    message = refusal(tmp_path, one | two)
    assert f"{other}{layer}.lora_" in message
    assert f"'{TO_Q}.lora_" in message


ALGORITHMS: dict[str, Callable[[], State]] = {
    "LoHa": lambda: {"hada_w1_a": file_tensor(32, 2), "hada_w1_b": file_tensor(2, 32),
                     "hada_w2_a": file_tensor(32, 2), "hada_w2_b": file_tensor(2, 32)},
    "LoKr": lambda: {"lokr_w1": file_tensor(4, 4), "lokr_w2": file_tensor(8, 8)},
    "full": lambda: {"diff": file_tensor(32, 32), "diff_b": file_tensor(32)},
    "DoRA": lambda: {"lora_down.weight": file_tensor(2, 32), "lora_up.weight": file_tensor(32, 2),
                     "dora_scale": file_tensor(1, 32)},
    "OFT": lambda: {"oft_R.weight": file_tensor(4, 28)},
}  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_any_algorithm_twice_is_one(algorithm: str, tmp_path: Path) -> None:
    parts = ALGORITHMS[algorithm]()
    path = tmp_path / "x.safetensors"

    def adapter(second: State) -> Adapter:
        tensors = {f"transformer.{TO_Q}.{part}": tensor for part, tensor in parts.items()}
        tensors |= {f"lycoris_{TO_Q.replace('.', '_')}.{part}": tensor.clone() for part, tensor in second.items()}
        return read(write(path, tensors), SERVED)

    assert len(adapter({}).updates["transformer"]) == len(adapter(parts).updates["transformer"])
    assert len(adapter(parts).ignored) == len(parts)
    with pytest.raises(FormatError, match="has (two updates that differ|a DoRA update and another one)"):
        adapter({part: tensor * 1.5 for part, tensor in parts.items()})


def test_two_adapters_of_peft_in_one_file_are_an_error(tmp_path: Path) -> None:
    tensors = lora(TO_Q, 32, 32, ("lora_A.one.weight", "lora_B.one.weight"))
    tensors |= lora(TO_Q, 32, 32, ("lora_A.two.weight", "lora_B.two.weight"))
    message = refusal(tmp_path, tensors)
    assert "lora_A.one.weight' are two names of one tensor" in message
    assert "lora_A.two.weight'" in message


# Wrappers and names of adapters

WRAPPED = [
    "transformer._orig_mod.{}",
    "_orig_mod.{}",
    "module.{}",
    "transformer.module.{}",
    "transformer.module._orig_mod.{}",
    "_orig_mod.module.{}",
    "transformer._fsdp_wrapped_module.{}",
    "base_model.model._orig_mod.{}",
    "base_model.model.base_model.model.{}",
    "model.diffusion_model.{}",
    "lora_unet__orig_mod_{}",
    "lora_transformer__orig_mod_{}",
    "lora_unet_{}_",
]


@pytest.mark.parametrize("spelling", WRAPPED)
def test_wrappers_are_seen_through(spelling: str, tmp_path: Path) -> None:
    layer = TO_Q.replace(".", "_") if spelling.startswith("lora_") else TO_Q
    tensors = lora(spelling.format(layer), 32, 32)
    trained = FLUX | {f"{TO_Q}.weight": FLUX[f"{TO_Q}.weight"] + product(tensors)}
    check(write(tmp_path / "x.safetensors", tensors), FLUX, trained)


def test_blocks_that_were_compiled_one_by_one(tmp_path: Path) -> None:
    tensors = lora("transformer.transformer_blocks.0._orig_mod.attn.to_q", 32, 32)
    trained = FLUX | {f"{TO_Q}.weight": FLUX[f"{TO_Q}.weight"] + product(tensors)}
    check(write(tmp_path / "x.safetensors", tensors), FLUX, trained)


@pytest.mark.parametrize("name", ["default", "default_0", "lora_edit", "weight", "1", "my-style"])
def test_adapters_of_any_name(name: str, tmp_path: Path) -> None:
    tensors = lora(f"transformer.{TO_Q}", 32, 32, (f"lora_A.{name}.weight", f"lora_B.{name}.weight"))
    magnitude = {f"transformer.{TO_Q}.lora_magnitude_vector.{name}.weight": file_tensor(32)}
    moved = FLUX[f"{TO_Q}.weight"] + product(tensors)
    check(write(tmp_path / "x.safetensors", tensors), FLUX, FLUX | {f"{TO_Q}.weight": moved})
    [column] = magnitude.values()
    trained = FLUX | {f"{TO_Q}.weight": column[:, None] * moved / moved.norm(dim=1, keepdim=True)}
    check(write(tmp_path / "x.safetensors", tensors | magnitude), FLUX, trained)


# diffusers' fused projections, and whole layers, by the libraries that write them


def train(model: Any, **config: Any) -> None:
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, **config))
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(file_tensor(*parameter.shape))


def test_projections_that_diffusers_fused(tmp_path: Path) -> None:
    """``FluxTransformer2DModel.fuse_qkv_projections``, as SimpleTuner can train."""
    model: FluxTransformer2DModel = tiny_flux()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.fuse_qkv_projections()
    train(model, target_modules=["to_qkv", "to_added_qkv"])
    trained: State = dict(base)
    tensors: State = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            tensors |= {
                f"transformer.{name}.{end}.weight": part.default.weight.clone()
                for end, part in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
            }
            added = name.endswith("to_added_qkv")
            parts = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
            for part, weight in zip(parts, acting(layer, layer.in_features)[0].chunk(3), strict=True):
                trained[f"{name.rpartition('.')[0]}.{part}.weight"] = weight
    assert len(tensors) == 6
    save_file(tensors, tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors", base, trained)


def modules_to_save(keep: Callable[[str], str]) -> tuple[State, State]:
    """A file's tensors and the trained weights, of a LoRA of to_q and two layers that are trained whole."""
    model = tiny_flux()
    train(model, target_modules=["to_q"], modules_to_save=["proj_out", "x_embedder"])
    trained, tensors = dict(FLUX), {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            tensors[keep(f"transformer.{name}")] = parameter.detach().clone()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            trained[f"{name}.weight"] = acting(layer, layer.in_features)[0]
        if name.endswith("modules_to_save.default"):
            whole = name.removesuffix(".modules_to_save.default")
            trained |= {f"{whole}.weight": layer.weight.detach(), f"{whole}.bias": layer.bias.detach()}
    return tensors, trained


@pytest.mark.parametrize(
    "keep",
    [
        str,
        lambda key: key.replace(".default", ""),
        lambda key: key.replace(".default", "").replace(".modules_to_save", ""),  # get_peft_model_state_dict
    ],
    ids=["with the adapter's name", "modules_to_save", "the layer's own name"],
)
def test_layers_that_were_trained_whole(keep: Callable[[str], str], tmp_path: Path) -> None:
    tensors, trained = modules_to_save(keep)
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = check(tmp_path / "x.safetensors", FLUX, trained, float32_error=1e-6)
    assert "whole layer" in adapter.summary


def test_whole_norms_in_bfl_layout(tmp_path: Path) -> None:
    tensors = lora("double_blocks.0.img_attn.proj", 32, 32)
    norm = {"double_blocks.0.img_attn.norm.query_norm.scale": file_tensor(16)}
    trained = FLUX | {
        "transformer_blocks.0.attn.to_out.0.weight": FLUX["transformer_blocks.0.attn.to_out.0.weight"]
        + product(tensors),
        "transformer_blocks.0.attn.norm_q.weight": next(iter(norm.values())),
    }
    check(write(tmp_path / "x.safetensors", tensors | norm), FLUX, trained, float32_error=1e-6)


def test_a_checkpoint_is_no_adapter(tmp_path: Path) -> None:
    message = refusal(tmp_path, {f"transformer.{name}": tensor for name, tensor in FLUX.items()})
    assert "it looks like a whole checkpoint" in message
    assert f"{len(FLUX)} of its {len(FLUX)} keys are not known" in message
    assert message.endswith(
        "Extract a LoRA from it, which ComfyUI and sd-scripts can, or serve it as a weights directory."
    )


def test_a_layer_and_an_update_of_it_do_not_go_together(tmp_path: Path) -> None:
    tensors = lora(f"transformer.{TO_Q}", 32, 32) | {f"transformer.{TO_Q}.weight": file_tensor(32, 32)}
    assert f"'transformer.{TO_Q}.weight' is all of its layer, and an update of it is there" in refusal(
        tmp_path, tensors
    )
