"""What cannot be applied is refused: with the file, the reason, the keys, and what the file looks like."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_lora.errors import FormatError
from flux_lora.lora import formats
from flux_lora.lora.formats import read
from flux_lora.lora.formats.contents import LayerParts, load
from tests.lora.formats.helpers import Shape, shapes, small_text_encoder, tiny_flux

FLUX = shapes(tiny_flux().state_dict())
SERVED = {
    "transformer": FLUX,
    "text_encoder": shapes(small_text_encoder("text_encoder").state_dict()),
    "text_encoder_2": shapes(small_text_encoder("text_encoder_2").state_dict()),
}
LAYER = "transformer.transformer_blocks.0.attn.to_q"
GOOD = {f"{LAYER}.lora_A.weight": torch.ones(2, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 2)}


def refusal(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    file = path / "adapter.safetensors"
    save_file(tensors, file, metadata)
    with pytest.raises(FormatError) as caught:
        read(file, SERVED)
    assert str(caught.value).startswith(f"{file} cannot be applied to FLUX.1: ")
    return str(caught.value)


# One key of each, with the shape of its tensor where that tells.
FOREIGN = {
    # networks/lora.py of kohya-ss/sd-scripts
    "Stable Diffusion 1": {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768)
    },
    "Stable Diffusion 2": {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 1024)},
    "SDXL": {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 2048)},
    "SDXL ": {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280)},
    # networks/lora_sd3.py there; SD3LoraLoaderMixin of huggingface/diffusers
    "Stable Diffusion 3": {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (4, 1536)},
    "Stable Diffusion 3 ": {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 1536)},
    # loaders/lora_conversion_utils.py of huggingface/diffusers, the converter of each model
    "FLUX.2": {"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight": (4, 6144)},
    "FLUX.2 ": {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (4, 6144)},
    "Qwen-Image": {"transformer_blocks.0.img_mlp.net.0.proj.lora_A.default.weight": (4, 3072)},
    "Qwen-Image ": {"diffusion_model.transformer_blocks.59.attn.to_q.lora_A.weight": (4, 3072)},
    "Wan": {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (4, 5120)},
    "Wan ": {"lora_unet_blocks_0_cross_attn_k.lora_down.weight": (4, 5120)},
    "HunyuanVideo": {"diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": (4, 3072)},
    "HunyuanVideo ": {"lora_unet_double_blocks_0_img_mod_linear.lora_down.weight": (4, 3072)},
    "HiDream": {"diffusion_model.double_stream_blocks.0.block.attn1.to_q.lora_A.weight": (4, 2560)},
    "Z-Image or Lumina": {"diffusion_model.layers.0.attention.to_q.lora_A.weight": (4, 3840)},
    "Chroma": {"diffusion_model.distilled_guidance_layer.layers.0.in_layer.lora_A.weight": (4, 5120)},
    "another transformer": {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 2048)},
}


@pytest.mark.parametrize("model", FOREIGN)
def test_a_lora_for_another_model_is_named(model: str, tmp_path: Path) -> None:
    [(key, shape)] = FOREIGN[model].items()
    message = refusal(tmp_path, {key: torch.zeros(shape)})
    assert f"it looks like a LoRA for {model.strip()}" in message
    assert key in message


@pytest.mark.parametrize(
    ("what", "key", "shape"),
    [
        # the keys that loaders/lora_pipeline.py of huggingface/diffusers and src/flux of black-forest-labs/flux expect
        ("a control LoRA for FLUX.1", "img_in.lora_A.weight", (4, 32)),
        ("a control LoRA for FLUX.1", "transformer.x_embedder.lora_A.weight", (4, 32)),
        ("FLUX.1 Fill that changes the input layer", "lora_transformer_x_embedder.lora_down.weight", (4, 96)),
        ("an IP-Adapter", "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", (4, 4)),
        ("a ControlNet", "controlnet_blocks.0.weight", (4, 4)),
        ("FLUX.1 Redux", "redux_up.weight", (4, 4)),
        ("a whole checkpoint", "transformer_blocks.0.attn.to_q.weight", (32, 32)),
        ("a whole checkpoint", "double_blocks.0.img_attn.qkv.weight", (96, 32)),
        ("a textual inversion", "clip_l", (1, 768)),
        ("an IP-Adapter", "image_proj.proj.weight", (4, 4)),
        ("an IP-Adapter", "ip_adapter.0.to_k_ip.weight", (4, 4)),
        ("PuLID", "pulid_ca.0.to_kv.weight", (4, 4)),
        ("PuLID", "pulid_encoder.latents", (4, 4)),
        ("EasyControl", "transformer_blocks.0.attn.processor.q_loras.0.down.weight", (4, 32)),
        ("EasyControl", "single_transformer_blocks.3.attn.processor.v_loras.0.up.weight", (32, 4)),
        ("a control LoRA", "lora_controlnet", (1,)),
        ("a control LoRA", "diffusion_model.img_in.reshape_weight", (2,)),
        ("Flex.2", "transformer.x_embedder.lora_A.weight", (4, 49)),
        ("a LoRA in DiffSynth's own names", "blocks.0.attn.a_to_qkv.lora_A.default.weight", (4, 32)),
        ("a LoRA in DiffSynth's own names", "blocks.18.norm1_b.linear.lora_B.default.weight", (4, 32)),
        ("a LoRA in DiffSynth's own names", "single_blocks.0.to_qkv_mlp.lora_A.default.weight", (4, 32)),
        ("a LoRA in nunchaku's own format", "transformer_blocks.0.mlp_fc1.lora_down", (32, 4)),
        ("a LoRA in nunchaku's own format", "single_transformer_blocks.0.qkv_proj.lora_up", (32, 4)),
        ("a LoRA of mflux 0.x", "transformer.transformer_blocks.0.attn.to_k.lora_A", (4, 32)),
        ("an OFT adapter of PEFT before 0.16", "transformer.transformer_blocks.0.attn.to_k.oft_r", (4, 8, 8)),
        ("a VeRA adapter", "transformer.transformer_blocks.0.attn.to_k.vera_lambda_b", (32,)),
        ("a GLoRA adapter", "lycoris_transformer_blocks_0_attn_to_q.a1.weight", (4, 4)),
        ("an (IA)³ adapter", "lycoris_transformer_blocks_0_attn_to_q.on_input", ()),
    ],
)
def test_what_is_no_lora_is_named(what: str, key: str, shape: Shape, tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD | {key: torch.zeros(shape)})
    assert what in message
    assert key in message


ADVICE = {
    "pulid_ca.0.to_kv.weight": "Only text is taken here, so use a LoRA that needs no more.",
    "transformer.x_embedder.lora_A.weight": "Only text is taken here, so use a LoRA that needs no more.",
    "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": "Only text is taken here",
    "blocks.0.attn.a_to_qkv.lora_A.default.weight": "Train or save it with --align_to_opensource_format",
    "transformer_blocks.0.mlp_fc1.lora_down": "Use the LoRA that it was made from",
    "transformer.transformer_blocks.0.attn.to_k.lora_A": "end in .lora_A.weight and .lora_B.weight",
    "clip_l": "Use the LoRA that was trained beside it, or one without new words.",
    "lycoris_transformer_blocks_0_attn_to_k.a1.weight": "Merge it with its trainer and extract a LoRA",
    "transformer_blocks.0.attn.to_q.weight": "Extract a LoRA from it",
    "diffusion_model.distilled_guidance_layer.layers.0.in_layer.lora_A.weight": "use its version for FLUX.1, if",
    "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight": "use its version for FLUX.1, if",
}


@pytest.mark.parametrize("key", ADVICE)
def test_who_is_refused_is_told_what_to_do(key: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, {key: torch.ones(4, 32)})
    assert f". {ADVICE[key]}" in message or ADVICE[key] in message.rpartition(". ")[2]
    assert len(message) < 600


def test_what_only_kontext_has_is_named(tmp_path: Path) -> None:
    metadata = {"ss_base_model_version": "flux_kontext"}
    message = refusal(tmp_path, GOOD | {"transformer.reference_embedder.lora_A.weight": torch.ones(2, 32)}, metadata)
    assert "it looks like an adapter for FLUX.1 Kontext; 1 of its 3 keys are not known" in message
    assert message.endswith(
        "LoRAs for Kontext are taken as far as FLUX.1-dev has the same layers; this one needs Kontext."
    )


@pytest.mark.parametrize("word", ["<subject>", "my.word", "a" * 200])
def test_bundled_words_are_named_with_the_way_out(word: str, tmp_path: Path) -> None:
    """As modules/modelSaver/flux/FluxLoRASaver.py of Nerogar/OneTrainer writes them."""
    words = {f"bundle_emb.{word}.{end}": torch.ones(2, 16) for end in ("clip_l", "t5", "t5_out")}
    message = refusal(tmp_path, GOOD | words)
    assert "it teaches the text encoders new words ('" in message
    assert word[:20] in message
    assert (
        "switch off OneTrainer's 'Bundle Embeddings' and save it again, or remove its keys that begin with" in message
    )
    assert "inversion" not in message
    assert len(message) < 600


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.unknown."])
def test_what_a_trainer_did_not_gather_is_named(prefix: str, tmp_path: Path) -> None:
    empty = {f"{prefix}transformer_blocks.0.attn.to_q.lora_{end}.weight": torch.ones(0) for end in "AB"}
    message = refusal(tmp_path, empty)
    assert "2 of its 2 tensors have shape [0]" in message
    assert "its trainer saved nothing there, which happens with DeepSpeed's ZeRO-3" in message


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        ({"modelspec.architecture": "Chroma1/lora"}, "Chroma"),
        ({"ss_base_model_version": "chroma"}, "Chroma"),
        ({"ss_base_model_version": "flux2_klein_4b"}, "FLUX.2"),
        ({"ss_base_model_version": "hunyuan_video"}, "HunyuanVideo"),
        ({"modelspec.architecture": "Qwen-Image/lora"}, "Qwen-Image"),
        ({"ss_base_model_version": "qwen_image"}, "Qwen-Image"),
        ({"modelspec.architecture": "stable-diffusion-v3/lora"}, "Stable Diffusion 3"),
        ({"modelspec.architecture": "stable-diffusion-3-medium/lora"}, "Stable Diffusion 3"),
        ({"modelspec.architecture": "lumina-2/lora"}, "Lumina"),
        ({"modelspec.architecture": "Krea-2/lora"}, "Krea 2"),
        ({"ss_base_model_version": "zimage"}, "Z-Image"),
        ({"ss_base_model_version": "wan_2.1"}, "Wan"),
    ],
)
def test_models_that_share_names_and_sizes_are_told_by_metadata(
    metadata: dict[str, str], what: str, tmp_path: Path
) -> None:
    assert f"its metadata says that it is a LoRA for {what}." in refusal(tmp_path, GOOD, metadata)


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "Stable Diffusion 1"),
        ({"ss_base_model_version": "sd_v1"}, "Stable Diffusion 1"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"ss_base_model_version": "sd3"}, "Stable Diffusion 3"),
    ],
)
def test_models_that_share_clip_are_told_by_metadata(metadata: dict[str, str], what: str, tmp_path: Path) -> None:
    layer = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    clip = {f"{layer}.lora_down.weight": torch.ones(2, 16), f"{layer}.lora_up.weight": torch.ones(16, 2)}
    assert f"its metadata says that it is a LoRA for {what}." in refusal(tmp_path, clip, metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        # library/sai_model_spec.py and library/flux_utils.py of kohya-ss/sd-scripts
        *({"modelspec.architecture": f"{name}/lora"} for name in ("flux-1-dev", "flux-1-schnell", "flux-1")),
        {"ss_base_model_version": "flux1", "ss_sd_model_name": "flux1-dev.safetensors"},
        # modules/util/enum/ModelType.py and modules/modelSaver of Nerogar/OneTrainer
        {"modelspec.architecture": "Flux.1-dev/lora"},
        {"modelspec.architecture": "Flux.1-fill-dev/lora"},
        # toolkit of ostris/ai-toolkit, before it knew FLUX.1 by name, and after
        {"ss_base_model_version": "sd_1.5"},
        {"ss_base_model_version": "flux.1"},
        {"ss_base_model_version": "flux_kontext"},
        # others' variations
        {"modelspec.architecture": "flux-1-dev-krea/lora"},
        {"modelspec.architecture": "FLUX.1-dev"},
        {"ss_base_model_version": "flux"},
    ],
)
def test_metadata_of_flux_1_is_accepted(metadata: dict[str, str], tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "x.safetensors", metadata)
    assert read(tmp_path / "x.safetensors", SERVED).updates["transformer"]


DAMAGED: dict[str, tuple[dict[str, Tensor], str]] = {
    "NaN": (
        GOOD | {f"{LAYER}.lora_A.weight": torch.full((2, 32), torch.nan)},
        "lora_A.weight' holds NaN or numbers that are inf",
    ),
    "infinity": (
        GOOD | {f"{LAYER}.lora_B.weight": torch.full((32, 2), torch.inf)},
        "lora_B.weight' holds NaN or numbers that",
    ),
    "NaN in float8": (
        GOOD | {f"{LAYER}.lora_A.weight": torch.full((2, 32), torch.nan).to(torch.float8_e4m3fn)},
        "lora_A.weight' holds NaN",
    ),
    "infinity in float32": (
        GOOD | {f"{LAYER}.lora_A.weight": torch.full((2, 32), -1e300, dtype=torch.float64)},
        "lora_A.weight' holds NaN or numbers that are infinite in float32",
    ),
    "an alpha that is infinite in float32": (
        GOOD | {f"{LAYER}.alpha": torch.tensor(1e308, dtype=torch.float64)},
        "alpha' holds NaN or numbers that are infinite in float32",
    ),
    "NaN alpha": (GOOD | {f"{LAYER}.alpha": torch.tensor(torch.nan)}, "alpha' holds NaN"),
    "alpha of two numbers": (
        GOOD | {f"{LAYER}.alpha": torch.ones(2)},
        r"alpha' has shape \[2\] and must be one number",
    ),
    "integers": (GOOD | {f"{LAYER}.lora_A.weight": torch.ones(2, 32, dtype=torch.int8)}, "has the type I8"),
    "A alone": ({f"{LAYER}.lora_A.weight": torch.ones(2, 32)}, "lora_A.weight' is there without its lora_B"),
    "B alone": ({f"{LAYER}.lora_B.weight": torch.ones(32, 2)}, "lora_B.weight' is there without its lora_A"),
    "alpha alone": ({f"{LAYER}.alpha": torch.ones(())}, "alpha' is there without"),
    "wrong inputs": (
        GOOD | {f"{LAYER}.lora_A.weight": torch.ones(2, 33)},
        r"shape \[2, 33\] where FLUX.1 needs \[2, 32\]",
    ),
    "wrong outputs": (GOOD | {f"{LAYER}.lora_B.weight": torch.ones(31, 2)}, r"shape \[31, 2\] where .* \[32, 2\]"),
    "two ranks": (GOOD | {f"{LAYER}.lora_B.weight": torch.ones(32, 3)}, r"shape \[32, 3\] where .* \[32, 2\]"),
    "no rank": (
        {f"{LAYER}.lora_A.weight": torch.ones(0, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 0)},
        r"shape \[0, 32\] and must be a matrix",
    ),
    "a scalar factor": (GOOD | {f"{LAYER}.lora_A.weight": torch.ones(())}, r"shape \[\] and must be a matrix"),
    "a convolution": (
        GOOD | {f"{LAYER}.lora_A.weight": torch.ones(2, 32, 3, 3)},
        r"\[2, 32, 3, 3\] where .* \[2, 32\]",
    ),
    "a LoRA of a norm": (
        {
            "transformer.transformer_blocks.0.attn.norm_q.lora_A.weight": torch.ones(2, 16),
            "transformer.transformer_blocks.0.attn.norm_q.lora_B.weight": torch.ones(16, 2),
        },
        r"part of a matrix, where transformer_blocks.0.attn.norm_q of FLUX.1 has shape \[16\]",
    ),
    "a difference of another size": (
        {f"{LAYER}.diff": torch.ones(32, 31)},
        r"\[32, 31\] where FLUX.1 needs \[32, 32\]",
    ),
    "a bias where there is none": (
        {"transformer.transformer_blocks.0.attn.norm_q.diff_b": torch.ones(16)},
        "is for a bias, and transformer_blocks.0.attn.norm_q of FLUX.1 has none",
    ),
    "a magnitude alone": ({f"{LAYER}.dora_scale": torch.ones(32, 1)}, "dora_scale' needs exactly one update"),
    "a magnitude of another size": (
        GOOD | {f"{LAYER}.dora_scale": torch.ones(31, 1)},
        r"shape \[31, 1\] where FLUX.1 needs \[32, 1\] or \[1, 32\]",
    ),
    "two magnitudes": (
        GOOD | {f"{LAYER}.dora_scale": torch.ones(32, 1), f"{LAYER}.magnitude": torch.ones(32)},
        "needs exactly one update",
    ),
    "half a LoHa": ({f"{LAYER}.hada_w1_a": torch.ones(32, 2)}, "is there without its hada_w1_b, hada_w2_a, hada_w2_b"),
    "half a LoKr": ({f"{LAYER}.lokr_w1": torch.ones(4, 4)}, "lokr_w1 cannot be used without further tensors"),
    "half a Kronecker factor": (
        {f"{LAYER}.lokr_w1": torch.ones(4, 4), f"{LAYER}.lokr_w2_a": torch.ones(8, 2)},
        "lokr_w2_a' is there without its lokr_w2_b",
    ),
    "a Kronecker product of another size": (
        {f"{LAYER}.lokr_w1": torch.ones(4, 4), f"{LAYER}.lokr_w2": torch.ones(8, 9)},
        r"give an update of shape \[32, 36\]",
    ),
    "one layer under two names": (
        GOOD | {"lycoris_transformer_blocks_0_attn_to_q.lora_down.weight": torch.ones(2, 32)},
        "are two names of one tensor",
    ),
    "DoRA with another update of its rows": (
        {f"{LAYER}.dora_scale": torch.ones(32, 1)}
        | GOOD
        | {
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 32),
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(96, 2),
        },
        "has a DoRA update and another one",
    ),
    "nothing": ({}, "it holds nothing to apply"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    tensors, reason = DAMAGED[damage]
    message = refusal(tmp_path, tensors)
    assert "looks like" not in message
    assert re.search(reason, message), message


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"transformer.peft_type": "LOHA"}, "a PEFT adapter of type 'LOHA'"),
        ({"transformer.init_lora_weights": "pissa"}, "changed by init_lora_weights='pissa'"),
        ({"transformer.lora_alpha": "many"}, "is not a number"),
        ({"transformer.lora_alpha": 10**400}, "is not a number"),
        ({"transformer.alpha_pattern": ["to_q"]}, "is not a number"),
        ({"transformer.alpha_pattern": {"(a|a)*b": 1}}, "is not a layer's name"),
        ({"transformer.alpha_pattern": {".*.*.*to_q": 1}}, "is not a layer's name"),
        ({"transformer.alpha_pattern": dict.fromkeys(map(str, range(4097)), 1)}, "more than 4,096 alpha patterns"),
        ({"transformer.alpha_pattern": {f"{i}.*": 1 for i in range(65)}}, "or 64 with '.*'"),
        ({"transformer.lora_alpha": float("inf")}, "is not finite"),
        ({"transformer.lora_alpha": 1e308}, "is not finite in float32"),
        ({"transformer.alpha_pattern": {"to_q": -1e39}}, "is not finite in float32"),
        ({"transformer.peft_type": "A" * 1_000_000}, "a PEFT adapter of type 'AAA"),
        ({"unet.r": 2, "unet.lora_alpha": 8}, "has the setting 'unet.r', of no component"),
        ({"transformer.r": 2, "lora_alpha": 8}, "has the setting 'lora_alpha', of no component"),
        ({"transformer.r": 2, "base.transformer.lora_alpha": 8}, "has the setting 'base.transformer.lora_alpha'"),
        ([], "cannot be read"),
    ],
)
def test_settings_that_mean_something_else(settings: object, reason: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD, {"lora_adapter_metadata": json.dumps(settings)})
    assert reason in message
    assert len(message) < 500


def test_thousands_of_alpha_patterns_take_no_time(tmp_path: Path) -> None:
    """Written with 4,000 names, 64 of them with wildcards; each layer asks for its alpha, and matches none."""
    patterns = {f"layer_{i}": 1 for i in range(4000)} | {f".*x.*layer_{i}": 1 for i in range(64)}
    layers = [name.removesuffix(".weight") for name, shape in FLUX.items() if len(shape) == 2]
    tensors = {f"transformer.{name}.lora_A.weight": torch.ones(1, FLUX[f"{name}.weight"][1]) for name in layers}
    tensors |= {f"transformer.{name}.lora_B.weight": torch.ones(FLUX[f"{name}.weight"][0], 1) for name in layers}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": patterns})}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    started = time.process_time()
    read(tmp_path / "x.safetensors", SERVED)
    assert time.process_time() - started < 2


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_file(GOOD, path)

    def load_slowly(*arguments: Any) -> tuple[list[LayerParts], dict[str, str]]:
        contents = load(*arguments)
        os.utime(path, ns=(0, 0))
        return contents

    monkeypatch.setattr(formats, "load", load_slowly)
    with pytest.raises(FormatError, match="it changed while it was read"):
        read(path, SERVED)


def test_messages_call_the_file_by_its_given_name(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FormatError) as caught:
            read(path, SERVED, "owner/name")
        assert str(caught.value).startswith("owner/name cannot be applied to FLUX.1: ")
        assert str(tmp_path) not in str(caught.value)


def test_unknown_keys_are_listed_and_counted(tmp_path: Path) -> None:
    unknown = {f"transformer.transformer_blocks.{i}.attn.to_q.lora_A.weight": torch.ones(2, 32) for i in range(1, 12)}
    message = refusal(tmp_path, GOOD | unknown)
    assert "11 of its 13 keys are not known: 'transformer.transformer_blocks.1.attn.to_q.lora_A.weight', " in message
    assert message.endswith(" and 3 more.")


def test_unknown_layers_of_a_guidance_embedder_that_is_served_are_refused(tmp_path: Path) -> None:
    key = "transformer.time_text_embed.guidance_embedder.linear_3.lora_A.weight"
    assert f"not known: '{key}'" in refusal(tmp_path, GOOD | {key: torch.ones(2, 32)})


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"PK\x03\x04\x14\x00\x08\x08" + bytes(20), "it is a zip or PyTorch pickle, not safetensors"),
        (b"", "it has only 0 bytes"),
        (None, "No such file"),
    ],
)
def test_files_that_are_no_safetensors(contents: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(FormatError, match=reason) as caught:
        read(path, SERVED)
    assert str(path) in str(caught.value)
