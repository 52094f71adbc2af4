"""The Cog front door with the extended inputs; ``predict.py`` is the one with the documented inputs.

Cog reads this file as it reads that one, and would take ``image`` and ``mask`` for ``Path`` inputs if they were marked
as such: fetched before ``run``, from anywhere, without a limit. So they are text here, which arrives untouched, and only
``openapi.extended.json`` says that they are files.
"""
# ruff: noqa: E501, UP045 - a description must be one literal, and Cog documents Optional[T] for optional inputs

from typing import Optional

from cog import BaseRunner, Input, Path


class Predictor(BaseRunner):
    """Draws pictures with FLUX.1 and a fine-tune of it."""

    def setup(self, weights: Path | str | None = None) -> None:
        """Load the models; ``weights`` is the fine-tune that ``COG_WEIGHTS`` names, a path or a URL."""
        from flux_lora import door

        self.generator = door.set_up(weights)

    def healthcheck(self) -> bool:
        """Say whether the models can still serve."""
        return self.generator.healthy()

    def run(
        self,
        prompt: str = Input(description="Prompt for generated image"),
        image: Optional[str] = Input(
            description="Image to start from (image to image), whose size decides the size of the generated image",
            default=None,
        ),
        mask: Optional[str] = Input(
            description="Mask for inpainting, used with image: what is white is drawn anew, what is black is kept",
            default=None,
        ),
        aspect_ratio: str = Input(
            description="Aspect ratio for the generated image, ignored with image; to use arbitrary width and height, set it to 'custom'",
            choices=["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21", "custom"],
            default="1:1",
        ),
        height: Optional[int] = Input(
            description="Height of the generated image. Optional, only used when aspect_ratio=custom. Must be a multiple of 16 (if it's not, it will be rounded to nearest multiple of 16)",
            ge=256,
            le=1440,
            default=None,
        ),
        width: Optional[int] = Input(
            description="Width of the generated image. Optional, only used when aspect_ratio=custom. Must be a multiple of 16 (if it's not, it will be rounded to nearest multiple of 16)",
            ge=256,
            le=1440,
            default=None,
        ),
        prompt_strength: float = Input(
            description="Share of the noise schedule that is run on image: 1 forgets it, 0 hardly changes it",
            ge=0,
            le=1,
            default=0.8,
        ),
        model: str = Input(
            description="Which model to run inferences with. The dev model needs around 28 steps but the schnell model only needs around 4 steps.",
            choices=["dev", "schnell"],
            default="dev",
        ),
        num_outputs: int = Input(description="Number of images to output.", ge=1, le=4, default=1),
        num_inference_steps: int = Input(description="Number of inference steps", ge=1, le=50, default=28),
        guidance_scale: float = Input(description="Guidance scale for the diffusion process", ge=0, le=10, default=3),
        seed: Optional[int] = Input(description="Random seed. Set for reproducible generation", default=None),
        output_format: str = Input(
            description="Format of the output images", choices=["webp", "jpg", "png"], default="webp"
        ),
        output_quality: int = Input(
            description="Quality when saving the output images, from 0 to 100. 100 is best quality, 0 is lowest quality. Not relevant for .png outputs",
            ge=0,
            le=100,
            default=80,
        ),
        disable_safety_checker: bool = Input(description="Disable safety checker for generated images.", default=False),
        go_fast: bool = Input(
            description="Draw faster by extrapolating some of the steps from those before, which changes the image a little",
            default=False,
        ),
        megapixels: str = Input(
            description="Approximate number of megapixels of the generated image: 1, or 0.25 in the same aspect ratio",
            choices=["1", "0.25"],
            default="1",
        ),
        lora_scale: float = Input(
            description="Determines how strongly the LoRA should be applied. Sane results between 0 and 1.",
            ge=-1,
            le=3,
            default=1,
        ),
        extra_lora: Optional[str] = Input(
            description="Second LoRA to use together with the first: a URL, a hub or registry id, or a path under the weights directory",
            default=None,
        ),
        extra_lora_scale: float = Input(
            description="Determines how strongly the extra LoRA should be applied, with sane results between 0 and 1",
            ge=-1,
            le=3,
            default=1,
        ),
        replicate_weights: Optional[str] = Input(
            description="LoRA weights to use instead of the bundled fine-tune: a URL, a hub or registry id, or a path under the weights directory. Leave out to use the bundled fine-tune.",
            default=None,
        ),
    ) -> list[Path]:
        """Draw ``num_outputs`` pictures; the files are in the order of their seeds.

        Raises:
            FluxLoraError: the request cannot be drawn; the message says why and what to do.
        """
        inputs = {**locals()}
        from flux_lora import door
        from flux_lora.inputs import EXTENDED

        return door.draw(self.generator, EXTENDED, inputs, self.record_metric)
