"""The inputs of each interface, as data: types, texts, bounds, choices, defaults and their order.

``request.py`` checks values by them. What Cog reads (``predict.py``, ``openapi.json`` and their extended twins) is
tested against them, and they against the documents of the interfaces.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

AspectRatio = Literal["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21", "custom"]
Model = Literal["dev", "schnell"]
OutputFormat = Literal["webp", "jpg", "png"]
Megapixels = Literal["1", "0.25"]

LARGEST_SIDE = 1440
"""Of a picture of ``custom`` size, and of one that is drawn from an image, in pixels."""

SMALLEST_SIDE = 256
"""The same at the other end."""


@dataclass(frozen=True)
class Input:
    """An input as an interface documents it."""

    type: Literal["string", "integer", "number", "boolean"]
    description: str
    default: str | float | None = None
    """None: the document has none, and the input may be left out unless it is required."""
    bounds: tuple[float, float] | None = None
    """The least and the greatest value that is taken."""
    choices: tuple[str, ...] = ()
    required: bool = False
    is_file: bool = False
    """Its text is an address: what clients offer a choice of files for."""

    def schema(self, name: str) -> dict[str, Any]:
        """Its JSON schema, with the title that Cog makes of its name."""
        schema: dict[str, Any] = {"type": self.type, "description": self.description}
        schema["title"] = name if self.choices else name.replace("_", " ").title()
        if self.choices:
            schema["enum"] = list(self.choices)
        if self.bounds:
            schema |= dict(zip(("minimum", "maximum"), self.bounds, strict=True))
        if self.is_file:
            schema["format"] = "uri"
        if self.default is not None:
            schema["default"] = self.default
        return schema


Interface = Mapping[str, Input]
"""Inputs by their names, in the documented order."""

_SIDE = (
    "{} of the generated image. Optional, only used when aspect_ratio=custom. Must be a multiple of 16 (if it's not, it"
    " will be rounded to nearest multiple of 16)"
)
_SIDES = (SMALLEST_SIDE, LARGEST_SIDE)

DOCUMENTED: Interface = {
    "prompt": Input("string", "Prompt for generated image", required=True),
    "aspect_ratio": Input(
        "string",
        "Aspect ratio for the generated image. The size will always be 1 megapixel, i.e. 1024x1024 if aspect ratio is"
        " 1:1. To use arbitrary width and height, set aspect ratio to 'custom'.",
        "1:1",
        choices=get_args(AspectRatio),
    ),
    "width": Input("integer", _SIDE.format("Width"), bounds=_SIDES),
    "height": Input("integer", _SIDE.format("Height"), bounds=_SIDES),
    "num_outputs": Input("integer", "Number of images to output.", 1, (1, 4)),
    "lora_scale": Input(
        "number", "Determines how strongly the LoRA should be applied. Sane results between 0 and 1.", 1.0, (-1, 2)
    ),
    "num_inference_steps": Input("integer", "Number of inference steps", 28, (1, 50)),
    "model": Input(
        "string",
        "Which model to run inferences with. The dev model needs around 28 steps but the schnell model only needs"
        " around 4 steps.",
        "dev",
        choices=get_args(Model),
    ),
    "guidance_scale": Input("number", "Guidance scale for the diffusion process", 3.5, (0, 10)),
    "seed": Input("integer", "Random seed. Set for reproducible generation"),
    "output_format": Input("string", "Format of the output images", "webp", choices=get_args(OutputFormat)),
    "output_quality": Input(
        "integer",
        "Quality when saving the output images, from 0 to 100. 100 is best quality, 0 is lowest quality. Not relevant"
        " for .png outputs",
        80,
        (0, 100),
    ),
    "replicate_weights": Input(
        "string",
        "LoRA weights to use instead of the bundled fine-tune: a URL, a hub or registry id, or a path under the weights"
        " directory. Leave out to use the bundled fine-tune.",
    ),
    "disable_safety_checker": Input("boolean", "Disable safety checker for generated images.", False),
}
"""The thirteen documented inputs, and ``replicate_weights`` in its slot."""

EXTENDED: Interface = {
    "prompt": DOCUMENTED["prompt"],
    "image": Input(
        "string",
        "Image to start from (image to image), whose size decides the size of the generated image",
        is_file=True,
    ),
    "mask": Input(
        "string",
        "Mask for inpainting, used with image: what is white is drawn anew, what is black is kept",
        is_file=True,
    ),
    "aspect_ratio": replace(
        DOCUMENTED["aspect_ratio"],
        description="Aspect ratio for the generated image, ignored with image; to use arbitrary width and height, set"
        " it to 'custom'",
    ),
    "height": DOCUMENTED["height"],
    "width": DOCUMENTED["width"],
    "prompt_strength": Input(
        "number",
        "Share of the noise schedule that is run on image: 1 forgets it, 0 hardly changes it",
        0.8,
        (0, 1),
    ),
    "model": DOCUMENTED["model"],
    "num_outputs": DOCUMENTED["num_outputs"],
    "num_inference_steps": DOCUMENTED["num_inference_steps"],
    "guidance_scale": replace(DOCUMENTED["guidance_scale"], default=3.0),
    "seed": DOCUMENTED["seed"],
    "output_format": DOCUMENTED["output_format"],
    "output_quality": DOCUMENTED["output_quality"],
    "disable_safety_checker": DOCUMENTED["disable_safety_checker"],
    "go_fast": Input(
        "boolean",
        "Draw faster by extrapolating some of the steps from those before, which changes the image a little",
        False,
    ),
    "megapixels": Input(
        "string",
        "Approximate number of megapixels of the generated image: 1, or 0.25 in the same aspect ratio",
        "1",
        choices=get_args(Megapixels),
    ),
    "lora_scale": replace(DOCUMENTED["lora_scale"], bounds=(-1, 3)),
    "extra_lora": Input(
        "string",
        "Second LoRA to use together with the first: a URL, a hub or registry id, or a path under the weights"
        " directory",
    ),
    "extra_lora_scale": Input(
        "number",
        "Determines how strongly the extra LoRA should be applied, with sane results between 0 and 1",
        1.0,
        (-1, 3),
    ),
    "replicate_weights": DOCUMENTED["replicate_weights"],
}
"""The twenty-one inputs of the extended interface."""


def schemas(interface: Interface) -> dict[str, dict[str, Any]]:
    """The JSON schema of each input, in order; an optional one is simply not required, and none takes null."""
    return {name: given.schema(name) | {"x-order": order} for order, (name, given) in enumerate(interface.items())}


def defaults(interface: Interface) -> dict[str, object]:
    """What each input is that is left out, but for those that are required."""
    return {name: given.default for name, given in interface.items() if not given.required}
