"""What is asked: the documented inputs, validated and frozen; sizes and seeds follow from them."""

import difflib
import re
import secrets
from functools import cache
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails

from flux_lora.errors import RequestError

Wanted = tuple[str | None, float]
"""A fine-tune and its strength: where it comes from (None: the server's own fine-tune), and its scale."""

AspectRatio = Literal["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21", "custom"]
Model = Literal["dev", "schnell"]
MODELS: tuple[Model, ...] = get_args(Model)
OutputFormat = Literal["webp", "jpg", "png"]

SIZES: dict[AspectRatio, tuple[int, int]] = {
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "21:9": (1536, 640),
    "3:2": (1216, 832),
    "2:3": (832, 1216),
    "4:5": (896, 1088),
    "5:4": (1088, 896),
    "3:4": (896, 1152),
    "4:3": (1152, 896),
    "9:16": (768, 1344),
    "9:21": (640, 1536),
}
"""Width and height in pixels of every aspect ratio but ``custom``."""

LARGEST_SIDE = 1440
"""Of a picture of ``custom`` size, in pixels; such a square has the most of them."""

MAX_TEXT_TOKENS: dict[Model, int] = {"dev": 512, "schnell": 256}
"""How many T5 tokens each model was trained to read."""

SEED_LIMIT = 2**63
"""Seeds count modulo this: the largest range that a PyTorch generator, JSON metrics and file metadata all hold."""

_UNUSABLE_CHARACTER = re.compile("[\0\ud800-\udfff]")


def nearest_multiple(value: int, step: int = 16) -> int:
    """Round to the nearest multiple of ``step``, ties upward."""
    return (value + step // 2) // step * step


def _whole(value: object) -> object:
    """Read 7.0 as 7: a JSON integer may arrive as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _seed(value: object) -> object:
    value = _whole(value)
    if value is None:
        return _random_seed()
    if isinstance(value, int) and not isinstance(value, bool):
        return value % SEED_LIMIT if value >= 0 else _random_seed()
    return value


def _random_seed() -> int:
    return secrets.randbelow(2**32)


def _text(value: object) -> object:
    if isinstance(value, str) and (found := _UNUSABLE_CHARACTER.search(value)):
        raise ValueError(f"holds {found[0]!r} at index {found.start()}, which is not valid text; take it out")
    return value


def _text_or_none(value: object) -> object:
    return None if value == "" else _text(value)


Whole = Annotated[int, BeforeValidator(_whole)]
Side = Annotated[int, Field(ge=256, le=LARGEST_SIDE), BeforeValidator(_whole)]
Seed = Annotated[int, BeforeValidator(_seed)]
Text = Annotated[str, BeforeValidator(_text)]
OptionalText = Annotated[str | None, BeforeValidator(_text_or_none)]


class Request(BaseModel):
    """One valid request, with every default filled in and its seed drawn.

    Names, bounds, defaults, titles, descriptions and order are those of the documented interface; what Cog reads in
    ``predict.py`` and ``openapi.json`` is tested against them. Strict: neither a boolean nor a string is a number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: Text = Field(description="Prompt for generated image")
    aspect_ratio: AspectRatio = Field(
        default="1:1",
        title="aspect_ratio",
        description=(
            "Aspect ratio for the generated image. The size will always be 1 megapixel, i.e. 1024x1024 if aspect ratio"
            " is 1:1. To use arbitrary width and height, set aspect ratio to 'custom'."
        ),
    )
    width: Side | None = Field(
        default=None,
        description=(
            "Width of the generated image. Optional, only used when aspect_ratio=custom. Must be a multiple of 16"
            " (if it's not, it will be rounded to nearest multiple of 16)"
        ),
    )
    height: Side | None = Field(
        default=None,
        description=(
            "Height of the generated image. Optional, only used when aspect_ratio=custom. Must be a multiple of 16"
            " (if it's not, it will be rounded to nearest multiple of 16)"
        ),
    )
    num_outputs: Whole = Field(default=1, ge=1, le=4, description="Number of images to output.")
    lora_scale: float = Field(
        default=1.0,
        ge=-1,
        le=2,
        description="Determines how strongly the LoRA should be applied. Sane results between 0 and 1.",
    )
    num_inference_steps: Whole = Field(default=28, ge=1, le=50, description="Number of inference steps")
    model: Model = Field(
        default="dev",
        title="model",
        description=(
            "Which model to run inferences with. The dev model needs around 28 steps but the schnell model only needs"
            " around 4 steps."
        ),
    )
    guidance_scale: float = Field(default=3.5, ge=0, le=10, description="Guidance scale for the diffusion process")
    seed: Seed = Field(default_factory=_random_seed, description="Random seed. Set for reproducible generation")
    output_format: OutputFormat = Field(
        default="webp", title="output_format", description="Format of the output images"
    )
    output_quality: Whole = Field(
        default=80,
        ge=0,
        le=100,
        description=(
            "Quality when saving the output images, from 0 to 100. 100 is best quality, 0 is lowest quality."
            " Not relevant for .png outputs"
        ),
    )
    replicate_weights: OptionalText = Field(
        default=None,
        description=(
            "LoRA weights to use instead of the bundled fine-tune: a URL, a hub or registry id, or a path under the"
            " weights directory. Leave out to use the bundled fine-tune."
        ),
    )
    disable_safety_checker: bool = Field(default=False, description="Disable safety checker for generated images.")

    @classmethod
    def parse(cls, /, **inputs: object) -> Self:
        """Validate inputs as they arrive from Cog, Python or the command line.

        An input that is left out gets its default. A seed that is left out, None or negative is drawn below 2^32; any
        other is taken modulo 2^63.

        Raises:
            RequestError: the message names every input that is wrong, its value, and what it must be.
        """
        if unknown := [name for name in inputs if name not in cls.model_fields]:
            raise RequestError(_not_an_input(unknown[0]))
        try:
            return cls.model_validate(inputs)
        except ValidationError as error:
            problems = [_problem(details) for details in error.errors(include_url=False)]
            raise RequestError("; ".join(problems) + ".") from None

    @model_validator(mode="after")
    def _custom_size_is_complete(self) -> Self:
        missing = [name for name in ("width", "height") if getattr(self, name) is None]
        if self.aspect_ratio == "custom" and missing:
            raise ValueError(f"aspect_ratio 'custom' needs width and height: give {' and '.join(missing)} too")
        return self

    _more: tuple[Wanted, ...] = PrivateAttr(default=())

    def with_more(self, *adapters: Wanted) -> Self:
        """The same request with further fine-tunes, for which the documented interface has no input.

        Args:
            adapters: (source, scale) of each; all are merged at once, and their order does not matter.
        """
        wider = self.model_copy()
        wider._more = (*self._more, *adapters)  # noqa: SLF001 - of this class
        return wider

    @property
    def adapters(self) -> tuple[Wanted, ...]:
        """What is to be merged: the fine-tune of ``replicate_weights`` and ``lora_scale`` first, then any others."""
        return (self.replicate_weights, self.lora_scale), *self._more

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of each file in pixels."""
        if self.aspect_ratio != "custom" or self.width is None or self.height is None:
            return SIZES[self.aspect_ratio]
        return nearest_multiple(self.width), nearest_multiple(self.height)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each image; image k is what a request for one image with seed + k draws."""
        return tuple((self.seed + k) % SEED_LIMIT for k in range(self.num_outputs))

    @property
    def max_text_tokens(self) -> int:
        """How many tokens T5 reads of the prompt."""
        return MAX_TEXT_TOKENS[self.model]

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each input that has no effect, or that costs more than it gives."""
        notes = []
        if self.aspect_ratio != "custom" and (self.width is not None or self.height is not None):
            notes.append(f"width and height are ignored: aspect_ratio is {self.aspect_ratio}, not custom")
        if self.model == "schnell" and self.guidance_scale != self._default("guidance_scale"):
            notes.append("guidance_scale is ignored: schnell has no guidance input")
        if self.model == "schnell" and self.num_inference_steps == self._default("num_inference_steps"):
            notes.append(f"schnell needs 4 steps and takes {self.num_inference_steps}: try num_inference_steps=4")
        return tuple(notes)

    @classmethod
    def _default(cls, name: str) -> object:
        return cls.model_fields[name].default


@cache
def documented_inputs() -> dict[str, dict[str, Any]]:
    """The JSON schema of each input in the documented order, an optional one simply not being required."""
    inputs = {}
    for order, (name, schema) in enumerate(Request.model_json_schema()["properties"].items()):
        # Pydantic writes X | None as a union with a null default; the interface takes no null.
        given = {key: value for key, value in schema.items() if key != "anyOf" and (key, value) != ("default", None)}
        inputs[name] = {**schema.get("anyOf", [{}])[0], **given, "x-order": order}
    return inputs


def _not_an_input(name: str) -> str:
    close = difflib.get_close_matches(name, documented_inputs(), n=1)
    hint = f"Did you mean {close[0]}?" if close else f"The inputs are {', '.join(documented_inputs())}."
    return f"{_shortened(name)} is not an input. {hint}"


def _problem(details: ErrorDetails) -> str:
    name = ".".join(map(str, details["loc"]))
    match details["type"]:
        case "missing":
            return f"{name} is required"
        case "value_error":  # ours; that of the custom size belongs to no single field
            return f"{name} {details['ctx']['error']}".lstrip()
    return f"{name} must be {_expected(name)}, not {_shortened(details['input'])}"


def _expected(name: str) -> str:
    schema = documented_inputs()[name]
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    kinds = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    bounds = f" from {schema['minimum']} to {schema['maximum']}" if "minimum" in schema else ""
    return kinds[schema["type"]] + bounds


def _shortened(value: object, limit: int = 60) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out an integer of thousands of digits
        return f"an {type(value).__name__} too long to show"
    return text if len(text) <= limit else text[:limit] + "…"
