import diffusers
import pytest
import torch

from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from training.networks import (
    AUTOENCODER,
    TextEncoders,
    attention_bias,
    new_transformer,
    positions,
    scheduler,
    velocity,
)

PROMPTS = ["a tomato on a blue background", "cat, red background"]


@pytest.mark.parametrize("limit", [256, 512])
@torch.no_grad()
def test_one_weighted_padding_stands_for_all_of_them(limit: int) -> None:
    """What is computed while training is what diffusers' pipeline computes of the whole padded prompt."""
    torch.manual_seed(0)
    encoders, transformer = TextEncoders().eval(), new_transformer(guidance=False).eval()
    for parameter in [*encoders.parameters(), *transformer.parameters()]:
        if parameter.requires_grad:
            parameter += 0.03 * torch.randn_like(parameter)
    pipeline = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=scheduler("dev"),
        vae=PatchAutoencoder(**AUTOENCODER),
        text_encoder=encoders.clip,
        tokenizer=encoders.clip_tokenizer,
        text_encoder_2=encoders.t5,
        tokenizer_2=encoders.t5_tokenizer,
    )
    tokens, pooled, text_ids = pipeline.encode_prompt(prompt=PROMPTS, prompt_2=None, max_sequence_length=limit)
    image, t = torch.randn(2, 64, transformer.config.in_channels), torch.tensor([0.3, 0.7])
    expected = transformer(
        hidden_states=image,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        timestep=t,
        img_ids=positions(8, 8, 64),
        txt_ids=text_ids,
        return_dict=False,
    )[0]
    text = encoders(PROMPTS, limit)
    filled = torch.nn.functional.pad(image, (0, 0, 0, 36))
    actual = velocity(transformer, filled, t, text, positions(8, 8, 100), attention_bias(text, 64, 100))[:, :64]
    assert (text.pooled - pooled).abs().max() < 1e-5
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    others = encoders(PROMPTS[::-1], limit)
    assert (others.tokens - text.tokens).abs().max() > 0.1  # the words do count
