"""One image by a pipeline: embeddings and seed -> latents -> pixels; and a source image -> latents to start from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flux_lora.drawing import progress, strips
from flux_lora.drawing.inpainting import drawn_latents
from flux_lora.drawing.latents import crop_centre, drawable, extend, initial_noise, pack, unpack
from flux_lora.drawing.pipeline import Pipeline
from flux_lora.drawing.prompts import Embeddings
from flux_lora.drawing.schedule import first_level, keep, noised, steps_run, unshifted
from flux_lora.drawing.source import SourceImage
from flux_lora.errors import DrawingError


@dataclass(frozen=True)
class Start:
    """A source image as the transformer sees it."""

    latents: Tensor
    """(1, C, h, w), float32, on the device."""
    drawn: Tensor | None
    """Which of them are drawn anew: (1, 1, h, w), boolean, on the device; None: all."""
    strength: float
    """Share of the noise schedule that is run, 0…1."""


@torch.no_grad()
def encode(pipeline: Pipeline, source: SourceImage, in_strips: bool = False) -> Start:
    """Encode a source image by the VAE: the mean of what it may stand for, not a sample; in strips with less memory."""
    vae = pipeline.vae
    width, height = (drawable(length, _grid(pipeline)) for length in source.pixels.size)
    pixels = pipeline.image_processor.preprocess(extend(source.pixels, width, height)).to(vae.device, vae.dtype)
    encoded = strips.encode(vae, pixels) if in_strips else strips.mean(vae.encode(pixels, return_dict=False)[0])
    latents = (encoded.float() - vae.config.shift_factor) * vae.config.scaling_factor
    drawn = None
    if source.mask:
        drawn = drawn_latents(extend(source.mask, width, height), pipeline.vae_scale_factor).to(latents.device)
    return Start(latents, drawn, source.strength)


def denoise(
    pipeline: Pipeline,
    embeddings: Embeddings,
    seed: int,
    size: tuple[int, int],
    *,
    steps: int,
    guidance: float,
    title: str,
    start: Start | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw the latents (1, C, h, w) of one image at batch one, from its own noise.

    Where the model's grid is coarser than the size asks for, they are those of the next larger size it can draw.

    Args:
        pipeline: holds the transformer, and the scheduler.
        embeddings: of the prompt.
        seed: of the initial noise.
        size: width and height in pixels.
        steps: of the whole schedule.
        guidance: ignored by a transformer without guidance input.
        title: of what is drawn, for the log.
        start: what the image starts from, and how many of the steps are run; None: from noise, and all of them.
        after_step: called after each step with its number from 1 and the latents of then, packed as tokens
            (1, h/2·w/2, 4C); what it raises ends the drawing and comes out of here.

    Raises:
        DrawingError: the model's output is not finite.
    """
    show = progress.printer()
    run = steps_run(steps, start.strength) if start else steps
    levels = unshifted(steps, run)
    compression = pipeline.vae_scale_factor
    width, height = (drawable(length, _grid(pipeline)) for length in size)
    rows, columns = height // compression, width // compression
    latents = noise = initial_noise(seed, pipeline.transformer.config.in_channels // 4, rows, columns)
    if start:
        noise = noise.to(start.latents.device)
        level = first_level(pipeline, levels, tokens=image_tokens(pipeline, size))
        latents = noised(start.latents, noise, level.to(noise.device))

    def kept(step: int, latents: Tensor) -> Tensor:
        """Put the source image, with the noise of after a step, where it is kept."""
        if start is None or start.drawn is None:
            return latents
        there = noised(start.latents, noise, pipeline.scheduler.sigmas[step + 1])
        return keep(pack(there), latents, pack(start.drawn.expand_as(there)))

    def call_after_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        show(step + 1, run, title)
        latents = kept(step, tensors["latents"])
        if after_step:
            after_step(step + 1, latents)
        return {"latents": latents}

    pipeline.progress_bar = _no_bar
    tokens = pipeline(
        prompt_embeds=embeddings.tokens,
        pooled_prompt_embeds=embeddings.pooled,
        latents=pack(latents),
        height=height,
        width=width,
        sigmas=levels,
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
    patch = _grid(pipeline)
    return (drawable(size[0], patch) // patch) * (drawable(size[1], patch) // patch)


def _grid(pipeline: Pipeline) -> int:
    """Pixels a side of what the transformer sees as one token: 2×2 latent pixels."""
    return 2 * pipeline.vae_scale_factor


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
    return crop_centre(Image.fromarray(as_bytes(pixels[0]).cpu().numpy()), *size)


def as_bytes(pixels: Tensor) -> Tensor:
    """Pixels (3, H, W) in −1…1 as bytes (H, W, 3), on their device.

    They are rounded as diffusers' VaeImageProcessor does it, to the bit; but half of bfloat16's bytes leave the device,
    and the host computes nothing.
    """
    shares = (pixels * 0.5 + 0.5).clamp_(0, 1)
    return shares.float().mul_(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous()
