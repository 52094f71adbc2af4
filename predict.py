"""The Cog front door: the documented inputs, and a call into the package.

Cog's own tool writes its schema by reading this file, never by importing it, and silently drops what it cannot read:
so every bound, choice, default and description is one plain literal. ``tests/test_contract.py`` holds them to
``flux_lora/inputs.py``, by which values are checked, to ``openapi.json`` and to the documented interface.
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
        aspect_ratio: str = Input(
            description="Aspect ratio for the generated image. The size will always be 1 megapixel, i.e. 1024x1024 if aspect ratio is 1:1. To use arbitrary width and height, set aspect ratio to 'custom'.",
            choices=["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21", "custom"],
            default="1:1",
        ),
        width: Optional[int] = Input(
            description="Width of the generated image. Optional, only used when aspect_ratio=custom. Must be a multiple of 16 (if it's not, it will be rounded to nearest multiple of 16)",
            ge=256,
            le=1440,
            default=None,
        ),
        height: Optional[int] = Input(
            description="Height of the generated image. Optional, only used when aspect_ratio=custom. Must be a multiple of 16 (if it's not, it will be rounded to nearest multiple of 16)",
            ge=256,
            le=1440,
            default=None,
        ),
        num_outputs: int = Input(description="Number of images to output.", ge=1, le=4, default=1),
        lora_scale: float = Input(
            description="Determines how strongly the LoRA should be applied. Sane results between 0 and 1.",
            ge=-1,
            le=2,
            default=1,
        ),
        num_inference_steps: int = Input(description="Number of inference steps", ge=1, le=50, default=28),
        model: str = Input(
            description="Which model to run inferences with. The dev model needs around 28 steps but the schnell model only needs around 4 steps.",
            choices=["dev", "schnell"],
            default="dev",
        ),
        guidance_scale: float = Input(description="Guidance scale for the diffusion process", ge=0, le=10, default=3.5),
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
        replicate_weights: Optional[str] = Input(
            description="LoRA weights to use instead of the bundled fine-tune: a URL, a hub or registry id, or a path under the weights directory. Leave out to use the bundled fine-tune.",
            default=None,
        ),
        disable_safety_checker: bool = Input(description="Disable safety checker for generated images.", default=False),
    ) -> list[Path]:
        """Draw ``num_outputs`` pictures; the files are in the order of their seeds.

        Raises:
            FluxLoraError: the request cannot be drawn; the message says why and what to do.
        """
        inputs = {**locals()}
        from flux_lora import door
        from flux_lora.inputs import DOCUMENTED

        return door.draw(self.generator, DOCUMENTED, inputs, self.record_metric)
