"""FLUX.1 dev or schnell of the real size with random weights, made on the device that will run it; no download.

With ``small`` everything has the same shape and a fraction of the size, so that a CPU can try what a GPU will measure.
"""

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from flux_lora.device.libraries import diffusers, transformers

TOKENIZERS = Path(__file__).resolve().parents[1] / "weights" / "mini" / "dev"
"""The miniature's; which tokens they make costs nothing and changes nothing."""

FULL: dict[str, dict[str, Any]] = {
    "transformer": {},  # what diffusers makes unasked is FLUX.1
    "t5": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
    "clip": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16},
}
SMALL: dict[str, dict[str, Any]] = {
    "transformer": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "axes_dims_rope": (8, 12, 12),
    },
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 512},
    "clip": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vae": {
        "block_out_channels": (8, 8, 8, 8, 8, 8),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
}
STD = 0.02
"""Of every weight; norms' are one and biases zero, so that activations stay finite."""


def build(model: str, device: torch.device, dtype: torch.dtype, *, small: bool) -> Any:
    """A FluxPipeline on ``device`` whose weights depend on nothing but these arguments."""
    sizes = SMALL if small else FULL
    clip_tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZERS / "tokenizer")
    t5_tokenizer = transformers.T5TokenizerFast.from_pretrained(TOKENIZERS / "tokenizer_2")
    special = {name: getattr(clip_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    clip = transformers.CLIPTextConfig(**sizes["clip"], vocab_size=max(49408, len(clip_tokenizer)), **special)
    t5 = transformers.T5Config(**sizes["t5"], feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        networks = {
            "transformer": transformer(model, small=small),
            "text_encoder": transformers.CLIPTextModel(clip),
            "text_encoder_2": transformers.T5EncoderModel(t5),
            "vae": _vae(**sizes["vae"]),
        }
    for network in networks.values():
        _fill(network, device, dtype)
    return diffusers.FluxPipeline(
        **networks,
        tokenizer=clip_tokenizer,
        tokenizer_2=t5_tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if model == "dev" else 1.0,
            use_dynamic_shifting=model == "dev",
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    )


def transformer(model: str, *, small: bool) -> Any:
    """A transformer on the default device."""
    sizes = SMALL if small else FULL
    return diffusers.FluxTransformer2DModel(
        **sizes["transformer"],
        joint_attention_dim=sizes["t5"]["d_model"],
        pooled_projection_dim=sizes["clip"]["hidden_size"],
        guidance_embeds=model == "dev",
    )


def operations(model: str, image_tokens: int, text_tokens: int, *, small: bool) -> int:
    """Floating-point operations of one step, counted by PyTorch on the transformer without weights."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = transformer(model, small=small)
        config = network.config
        network(
            hidden_states=torch.empty(1, image_tokens, config.in_channels),
            encoder_hidden_states=torch.empty(1, text_tokens, config.joint_attention_dim),
            pooled_projections=torch.empty(1, config.pooled_projection_dim),
            timestep=torch.empty(1),
            guidance=torch.empty(1) if model == "dev" else None,
            img_ids=torch.empty(image_tokens, 3),
            txt_ids=torch.empty(text_tokens, 3),
        )
    return counter.get_total_flops()


def _vae(**sizes: Any) -> Any:
    blocks = len(sizes["block_out_channels"])
    return diffusers.AutoencoderKL(
        **sizes,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


@torch.no_grad()
def _fill(network: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    network.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, STD, generator=generator)
        else:
            parameter.fill_(name.endswith("weight"))
    for buffer in network.buffers():  # CLIP's positions are the only one
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
