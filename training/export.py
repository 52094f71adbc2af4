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
    lora = {
        f"transformer.{key.replace('.default.', '.')}": value.cpu().bfloat16().contiguous()
        for key, value in style.items()
    }
    save_file(lora, directory / "lora.safetensors", metadata={"format": "pt"})
    total = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    print(f"{directory}: {total / 1e6:.2f} MB")
