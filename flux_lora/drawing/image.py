"""One image by a pipeline: embeddings and seed -> latents -> pixels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flux_lora.drawing import progress, strips
from flux_lora.drawing.latents import crop_centre, drawable, initial_noise, pack, unpack
from flux_lora.drawing.pipeline import Pipeline
from flux_lora.drawing.prompts import Embeddings
from flux_lora.errors import DrawingError


def denoise(
    pipeline: Pipeline,
    embeddings: Embeddings,
    seed: int,
    size: tuple[int, int],
    *,
    steps: int,
    guidance: float,
    title: str,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw the latents (1, C, h, w) of one image at batch one, from its own noise.

    Where the model's grid is coarser than the size asks for, they are those of the next larger size it can draw.

    Args:
        pipeline: holds the transformer, and the scheduler.
        embeddings: of the prompt.
        seed: of the initial noise.
        size: width and height in pixels.
        steps: of the scheduler, exactly.
        guidance: ignored by a transformer without guidance input.
        title: of what is drawn, for the log.
        after_step: called after each step with its number from 1 and the latents of then, packed as tokens
            (1, h/2·w/2, 4C); what it raises ends the drawing and comes out of here.

    Raises:
        DrawingError: the model's output is not finite.
    """
    show = progress.printer()

    def call_after_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        show(step + 1, steps, title)
        if after_step:
            after_step(step + 1, tensors["latents"])
        return {}

    compression = pipeline.vae_scale_factor
    width, height = (drawable(length, grid=2 * compression) for length in size)  # 2: the packing
    rows, columns = height // compression, width // compression
    noise = initial_noise(seed, pipeline.transformer.config.in_channels // 4, rows, columns)
    pipeline.progress_bar = _no_bar
    tokens = pipeline(
        prompt_embeds=embeddings.tokens,
        pooled_prompt_embeds=embeddings.pooled,
        latents=pack(noise),
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        callback_on_step_end=call_after_step,
    ).images
    if not torch.isfinite(tokens).all():
        raise DrawingError(
            f"The image of seed {seed} cannot be drawn: the model's output is not finite. Try lora_scale=0: if that is "
            "drawn, the LoRA is at fault, and if not, the base weights are damaged."
        )
    return unpack(tokens, rows, columns)


def image_tokens(pipeline: Pipeline, size: tuple[int, int]) -> int:
    """How many tokens the transformer sees of an image of a size, width and height in pixels."""
    patch = 2 * pipeline.vae_scale_factor  # 2: the packing
    return (drawable(size[0], patch) // patch) * (drawable(size[1], patch) // patch)


class _NoBar:
    def update(self) -> None:
        pass


@contextmanager
def _no_bar(*_: Any, **__: Any) -> Iterator[_NoBar]:
    """In place of tqdm's bar, which a cancelled prediction interrupts anywhere, and which then prints a traceback."""
    yield _NoBar()


@torch.no_grad()
def decode(pipeline: Pipeline, latents: Tensor, size: tuple[int, int], in_strips: bool = False) -> Image.Image:
    """Turn latents into an RGB image of exactly ``size``, the centre of what was drawn; in strips with less memory."""
    vae = pipeline.vae
    scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    pixels = strips.decode(vae, scaled) if in_strips else vae.decode(scaled, return_dict=False)[0]
    return crop_centre(pipeline.image_processor.postprocess(pixels)[0], *size)
