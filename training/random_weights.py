"""Write a weights directory of the real layout with random weights: FLUX.1 dev, schnell and a LoRA, at any size.

    python -m training.random_weights weights/random

makes one that draws noise. Tests and benchmarks make others.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from training.networks import scheduler

MINI: dict[str, dict[str, Any]] = {
    "transformer": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "axes_dims_rope": (8, 12, 12),
    },
    "clip": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    "vae": {"block_out_channels": (4, 4, 8, 8, 16, 16), "latent_channels": 4, "norm_num_groups": 4},
}
"""A VAE compression of 32 (256 transformer tokens at one megapixel) and two small encoders."""

LORA_RANK = 4

INDEX: dict[str, Any] = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""The ``model_index.json`` of a FLUX.1 pipeline."""


def write(directory: Path, sizes: Mapping[str, Mapping[str, Any]] = MINI, *, seed: int = 0) -> None:
    """Write ``dev/`` (complete), ``schnell/`` (transformer and scheduler) and ``lora.safetensors``, in bfloat16."""
    torch.manual_seed(seed)
    dev, schnell = directory / "dev", directory / "schnell"
    clip_tokenizer, t5_tokenizer = tokenizers()
    clip = CLIPTextModel(
        CLIPTextConfig(
            **sizes["clip"],
            vocab_size=len(clip_tokenizer),
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(T5Config(**sizes["t5"], vocab_size=len(t5_tokenizer), feed_forward_proj="gated-gelu"))
    parts = {
        "text_encoder": clip,
        "text_encoder_2": t5,
        "vae": _vae(**sizes["vae"]),
        "tokenizer": clip_tokenizer,
        "tokenizer_2": t5_tokenizer,
    }
    for name, part in parts.items():
        _save(part, dev / name)
    widths = {"joint_attention_dim": t5.config.d_model, "pooled_projection_dim": clip.config.hidden_size}
    for folder in (dev, schnell):
        is_dev = folder == dev
        transformer = FluxTransformer2DModel(**sizes["transformer"], **widths, guidance_embeds=is_dev)
        _save(transformer, folder / "transformer")
        scheduler(folder.name).save_pretrained(folder / "scheduler")
    _write_index(dev)
    save_file(
        random_lora(transformer, clip, rank=LORA_RANK),
        directory / "lora.safetensors",
        metadata={"format": "pt"},
    )


def random_lora(
    transformer: torch.nn.Module, clip: torch.nn.Module | None = None, *, rank: int
) -> dict[str, torch.Tensor]:
    """A LoRA on the blocks' linear layers (and CLIP's attention), named as diffusers' scripts do; its effect shows."""
    prefixed = [(f"transformer.{name}", module) for name, module in transformer.named_modules() if "blocks." in name]
    if clip is not None:
        attention = ((n, m) for n, m in clip.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj", "out_proj")))
        prefixed += [
            (f"text_encoder.text_model.{name.removeprefix('text_model.')}", module) for name, module in attention
        ]
    tensors: dict[str, torch.Tensor] = {}
    for name, module in prefixed:
        if isinstance(module, torch.nn.Linear):
            down = torch.randn(rank, module.in_features) / module.in_features**0.5
            up = torch.randn(module.out_features, rank) * 0.3 / rank**0.5
            tensors[f"{name}.lora_A.weight"] = down.bfloat16()
            tensors[f"{name}.lora_B.weight"] = up.bfloat16()
    return tensors


def _vae(block_out_channels: tuple[int, ...], **sizes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        **sizes,
    )


def tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Tokenizers of the real classes that know single characters only."""
    characters = sorted(ByteLevel.alphabet())
    words = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((chr(c), -3.0) for c in range(33, 127))]
    return clip, T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def _save(part: Any, folder: Path) -> None:
    if isinstance(part, torch.nn.Module):
        part.to(torch.bfloat16)
    part.save_pretrained(folder)


def _write_index(pipeline: Path) -> None:
    (pipeline / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a weights directory with random weights: it draws noise.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.directory, seed=arguments.seed)
