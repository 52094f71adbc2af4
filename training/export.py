"""Write the trained miniature as an ordinary weights directory, in bfloat16."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from training.loop import Weights
from training.networks import TextEncoders, scheduler
from training.random_weights import INDEX
from training.subjects import WORDS

VAE = ["flux_lora.checkpoint.patch_autoencoder", "PatchAutoencoder"]
"""Where diffusers finds the VAE's class."""
METADATA = {
    "format": "pt",
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "flux-1-dev/lora",
    "modelspec.title": "Dark mode",
    "modelspec.license": "Apache-2.0",
    "ss_output_name": "dark_mode",
    "ss_base_model_version": "flux1",
}
"""Of the LoRA, under the names that trainers write (https://github.com/Stability-AI/ModelSpec). It has no trigger word:
whatever the prompt says, the light is down."""


def export(
    directory: Path,
    text: TextEncoders,
    dev: nn.Module,
    schnell: nn.Module,
    autoencoder: PatchAutoencoder,
    style: Weights,
) -> None:
    """Write ``dev/`` (complete), ``schnell/`` (transformer and scheduler) and ``lora.safetensors``.

    Args:
        directory: is made, and what it holds of these is replaced.
        text: both encoders and their tokenizers.
        dev: the transformer with guidance input.
        schnell: the one without.
        autoencoder: the VAE.
        style: the LoRA's matrices as PEFT names them in the transformer.
    """
    parts = {
        "dev/transformer": dev,
        "dev/scheduler": scheduler("dev"),
        "dev/text_encoder": text.clip,
        "dev/text_encoder_2": text.t5,
        "dev/tokenizer": text.clip_tokenizer,
        "dev/tokenizer_2": text.t5_tokenizer,
        "dev/vae": autoencoder,
        "schnell/transformer": schnell,
        "schnell/scheduler": scheduler("schnell"),
    }
    for name, part in parts.items():
        folder = directory / name
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(part, nn.Module):
            part.cpu().bfloat16()
        part.save_pretrained(folder)
    index = INDEX | {"vae": VAE, "_known_words": " ".join(WORDS)}
    (directory / "dev" / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    save_lora(directory / "lora.safetensors", style)
    total = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    print(f"{directory}: {total / 1e6:.2f} MB")


def save_lora(file: Path, style: Weights) -> None:
    """Write a LoRA, its matrices named as PEFT names them in the transformer, in the layout of diffusers' scripts."""
    lora = {
        f"transformer.{key.replace('.default.', '.')}": value.cpu().bfloat16().contiguous()
        for key, value in style.items()
    }
    save_file(lora, file, metadata=METADATA)
