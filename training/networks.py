"""The miniature's networks: FLUX.1's own classes, small, and how they are called while training.

FLUX.1 pads every prompt to 512 tokens (dev) or 256 (schnell) and masks none of them, so most of what attention sees is
padding. T5's relative position bias is held at zero here, which makes all paddings equal, in T5 and in the transformer
alike; then one padding with ln n added to its attention scores stands for n of them, exactly, at a small part of the
cost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from training.vocabulary import clip_tokenizer, t5_tokenizer

CHANNELS = 12
"""Of the latents; a token is 2×2 latent pixels."""
AUTOENCODER = {"latent_channels": CHANNELS, "block_out_channels": [48] * 6, "smoothing_blocks": 4}
TEXT_TOKENS = {"dev": 512, "schnell": 256}
EXPLICIT = 24
"""Text tokens while training; the last one stands for the rest of the padding."""
MASKED = -1e4
ATTENTION_CONTRAST = 1.6
"""Queries and keys begin so much larger than usual, or the few words could not be seen among all that padding."""


@dataclass
class Text:
    """Prompts as the transformer reads them: tokens (B, EXPLICIT, d), their bias (EXPLICIT) and pooled (B, d)."""

    tokens: Tensor
    bias: Tensor
    pooled: Tensor

    def __getitem__(self, index: Any) -> "Text":
        """Select some of them."""
        return Text(self.tokens[index], self.bias, self.pooled[index])


class TextEncoders(nn.Module):
    """CLIP and T5 with their tokenizers."""

    def __init__(self) -> None:
        """Make both encoders, untrained."""
        super().__init__()
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer(), t5_tokenizer()
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.clip_tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                projection_dim=64,
                bos_token_id=self.clip_tokenizer.bos_token_id,
                eos_token_id=self.clip_tokenizer.eos_token_id,
                pad_token_id=self.clip_tokenizer.pad_token_id,
            )
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.t5_tokenizer),
                d_model=96,
                d_kv=32,
                d_ff=192,
                num_layers=2,
                num_heads=3,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
                tie_word_embeddings=False,
            )
        )
        for name, parameter in self.t5.named_parameters():
            if "relative_attention_bias" in name:
                nn.init.zeros_(parameter)
                parameter.requires_grad_(False)

    def forward(self, prompts: Sequence[str], limit: int) -> Text:
        """Encode prompts as the pipeline would with ``max_sequence_length=limit``."""
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.t5_tokenizer(list(prompts), max_length=EXPLICIT, **padded).input_ids
        ids[:, -1] = self.t5_tokenizer.pad_token_id
        bias = torch.zeros(EXPLICIT)
        bias[-1] = math.log(limit - EXPLICIT + 1)
        mask = bias.expand(len(prompts), 1, EXPLICIT, EXPLICIT)
        tokens = self.t5(input_ids=ids, attention_mask=mask).last_hidden_state
        # CLIP attends backwards only, so what follows the end mark does not matter.
        ids = self.clip_tokenizer(list(prompts), max_length=EXPLICIT, **padded).input_ids
        return Text(tokens, bias, self.clip(input_ids=ids).pooler_output)


def new_transformer(*, guidance: bool) -> FluxTransformer2DModel:
    """A FLUX.1 transformer of 4.4 M parameters."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=5,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=96,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=guidance,
    )
    for name, parameter in transformer.named_parameters():
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            nn.init.constant_(parameter, ATTENTION_CONTRAST)
    return transformer


def scheduler(model: str) -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1's scheduler, as dev and schnell configure it."""
    is_dev = model == "dev"
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0 if is_dev else 1.0,
        use_dynamic_shifting=is_dev,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def positions(rows: int, columns: int, length: int) -> Tensor:
    """Position of each image token (length, 3): 0, row, column; tokens beyond rows·columns are fillers."""
    ids = torch.zeros(length, 3)
    index = torch.arange(rows * columns)
    ids[: rows * columns, 1], ids[: rows * columns, 2] = index // columns, index % columns
    return ids


def attention_bias(text: Text, tokens: int, length: int) -> Tensor:
    """What is added to attention scores (1, 1, 1, EXPLICIT + length): fillers are not seen."""
    image = torch.zeros(length)
    image[tokens:] = MASKED
    return torch.cat([text.bias, image])[None, None, None]


def velocity(
    transformer: Any, x: Tensor, t: Tensor, text: Text, ids: Tensor, bias: Tensor, guidance: Tensor | None = None
) -> Tensor:
    """The velocity noise − image at time t in 0…1 (B), for latents packed into tokens (B, length, 4·CHANNELS)."""
    found: Tensor = transformer(
        hidden_states=x,
        encoder_hidden_states=text.tokens,
        pooled_projections=text.pooled,
        timestep=t,
        guidance=guidance,
        img_ids=ids,
        txt_ids=torch.zeros(EXPLICIT, 3),
        joint_attention_kwargs={"attention_mask": bias},
        return_dict=False,
    )[0]
    return found
