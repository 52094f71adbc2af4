"""What is asked: the inputs of an interface, validated and frozen; sizes and seeds follow from them."""

import difflib
import re
import secrets
from typing import Annotated, Any, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from flux_lora.errors import RequestError
from flux_lora.inputs import (
    DOCUMENTED,
    EXTENDED,
    AspectRatio,
    Interface,
    Megapixels,
    Model,
    OutputFormat,
    defaults,
    schemas,
)

Wanted = tuple[str | None, float]
"""A fine-tune and its strength: where it comes from (None: the server's own fine-tune), and its scale."""

MODELS: tuple[Model, ...] = get_args(Model)

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
Seed = Annotated[int, BeforeValidator(_seed)]
Text = Annotated[str, BeforeValidator(_text)]
OptionalText = Annotated[str | None, BeforeValidator(_text_or_none)]


class Request(BaseModel):
    """One valid request, with every default filled in and its seed drawn.

    Bounds and defaults are those of the interface that it came through (``flux_lora/inputs.py``); what that interface
    does not have is as if it had been left out. Strict: neither a boolean nor a string is a number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: Text
    aspect_ratio: AspectRatio
    width: Whole | None
    height: Whole | None
    num_outputs: Whole
    lora_scale: float
    num_inference_steps: Whole
    model: Model
    guidance_scale: float
    seed: Seed
    output_format: OutputFormat
    output_quality: Whole
    replicate_weights: OptionalText
    disable_safety_checker: bool
    # Of the extended interface alone:
    image: OptionalText
    mask: OptionalText
    prompt_strength: float
    go_fast: bool
    megapixels: Megapixels
    extra_lora: OptionalText
    extra_lora_scale: float

    @classmethod
    def parse(cls, interface: Interface = DOCUMENTED, /, **inputs: object) -> Self:
        """Validate inputs as they arrive from Cog, Python or the command line.

        An input that is left out gets its default. A seed that is left out, None or negative is drawn below 2^32; any
        other is taken modulo 2^63.

        Args:
            interface: whose inputs they are: ``DOCUMENTED`` or ``EXTENDED`` of `flux_lora.inputs`.
            inputs: by name.

        Raises:
            RequestError: the message names every input that is wrong, its value, and what it must be.
        """
        if unknown := [name for name in inputs if name not in interface]:
            raise RequestError(_not_an_input(unknown[0], interface))
        try:
            return cls.model_validate(defaults(EXTENDED) | defaults(interface) | inputs, context=interface)
        except ValidationError as error:
            problems = [_problem(details, interface) for details in error.errors(include_url=False)]
            raise RequestError("; ".join(problems) + ".") from None

    @field_validator("*")
    @classmethod
    def _is_within_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        given = (info.context or EXTENDED).get(str(info.field_name))
        if value is not None and given and given.bounds and not given.bounds[0] <= value <= given.bounds[1]:
            raise PydanticCustomError("out_of_bounds", "is out of bounds")
        return value

    @model_validator(mode="after")
    def _inputs_fit_together(self) -> Self:
        missing = [name for name in ("width", "height") if getattr(self, name) is None]
        if self.aspect_ratio == "custom" and missing and not self.image:
            raise ValueError(f"aspect_ratio 'custom' needs width and height: give {' and '.join(missing)} too")
        if self.mask and not self.image:
            raise ValueError("mask needs image: give the image that it belongs to too")
        return self

    _more: tuple[Wanted, ...] = PrivateAttr(default=())

    def with_more(self, *adapters: Wanted) -> Self:
        """The same request with further fine-tunes, for which no interface has an input.

        Args:
            adapters: (source, scale) of each; all are merged at once, and their order does not matter.
        """
        wider = self.model_copy()
        wider._more = (*self._more, *adapters)  # noqa: SLF001 - of this class
        return wider

    @property
    def adapters(self) -> tuple[Wanted, ...]:
        """What is to be merged: the fine-tune of ``replicate_weights`` and ``lora_scale`` first, then any others."""
        extra = ((self.extra_lora, self.extra_lora_scale),) if self.extra_lora else ()
        return (self.replicate_weights, self.lora_scale), *extra, *self._more

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of each file in pixels, unless an image decides them."""
        width, height = SIZES.get(self.aspect_ratio, (self.width, self.height))
        if width is None or height is None:  # custom, with an image
            return SIZES["1:1"]
        if self.megapixels == "0.25":
            return nearest_multiple(width, 32) // 2, nearest_multiple(height, 32) // 2
        return nearest_multiple(width), nearest_multiple(height)

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
        sides = self.width is not None or self.height is not None
        if self.image and (self.aspect_ratio != "1:1" or sides):
            notes.append("aspect_ratio, width and height are ignored: the image decides the size")
        elif self.aspect_ratio != "custom" and sides:
            notes.append(f"width and height are ignored: aspect_ratio is {self.aspect_ratio}, not custom")
        if not self.image and not self._is_default("prompt_strength"):
            notes.append("prompt_strength is ignored: there is no image")
        if not self.extra_lora and not self._is_default("extra_lora_scale"):
            notes.append("extra_lora_scale is ignored: there is no extra_lora")
        if self.model == "schnell" and not self._is_default("guidance_scale"):
            notes.append("guidance_scale is ignored: schnell has no guidance input")
        if self.model == "schnell" and self._is_default("num_inference_steps"):
            notes.append(f"schnell needs 4 steps and takes {self.num_inference_steps}: try num_inference_steps=4")
        return tuple(notes)

    def _is_default(self, name: str) -> bool:
        return any(getattr(self, name) == i[name].default for i in (DOCUMENTED, EXTENDED) if name in i)


def _not_an_input(name: str, interface: Interface) -> str:
    if name in EXTENDED:
        return f"{name} is not an input of the documented interface, but of the extended one (--extended)."
    close = difflib.get_close_matches(name, interface, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"The inputs are {', '.join(interface)}."
    return f"{_shortened(name)} is not an input. {hint}"


def _problem(details: ErrorDetails, interface: Interface) -> str:
    name = ".".join(map(str, details["loc"]))
    match details["type"]:
        case "missing":
            return f"{name} is required"
        case "value_error":  # ours; that of inputs that do not fit together belongs to no single field
            return f"{name} {details['ctx']['error']}".lstrip()
    return f"{name} must be {_expected(name, interface)}, not {_shortened(details['input'])}"


def _expected(name: str, interface: Interface) -> str:
    schema = schemas(interface)[name]
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
