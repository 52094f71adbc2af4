"""What a client of OpenAI's images API asks for, in our words.

The fields are those of OpenAI's client (https://platform.openai.com/docs/api-reference/images), and ours, which it
sends from ``extra_body``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flux_lora.errors import RequestError
from flux_lora.inputs import LARGEST_SIDE, SMALLEST_SIDE, AspectRatio, Interface
from flux_lora.request import SIZES, Request
from flux_lora.service import loras

Quality = Literal["auto", "standard", "low", "medium", "high", "hd", "xhigh", "max"]
Format = Literal["png", "jpeg", "jpg", "webp"]

STEPS: dict[str, dict[str, int]] = {
    "dev": {"low": 14, "medium": 28, "high": 42, "max": 50},
    "schnell": {"low": 2, "medium": 4, "high": 8, "max": 8},
}
"""By model and quality."""

QUALITIES = {"auto": "medium", "standard": "medium", "hd": "high", "xhigh": "max"}
"""The other names of qualities."""

LARGER: dict[str, AspectRatio] = {"1536x1024": "3:2", "1024x1536": "2:3", "1792x1024": "16:9", "1024x1792": "9:16"}
"""Sizes of OpenAI's models with more pixels than FLUX.1 draws well, and the ratios that are drawn instead."""

IGNORED = ("background", "style", "moderation", "complexity", "input_fidelity")
"""Fields that FLUX.1 has nothing for."""

OURS = {
    "num_outputs": "n",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "output_quality": "output_compression",
    "replicate_weights": "lora",
    "aspect_ratio": "size",
    "width": "size",
    "height": "size",
    "prompt_strength": "strength",
}
"""Our inputs that have another name here."""


class ImageRequest(BaseModel):
    """What both ways to a picture have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="What to draw")
    model: str | None = Field(
        default=None, description="dev, schnell, or a LoRA: its name in `loras/`, or any source that `lora` takes"
    )
    n: int | None = Field(default=None, description="How many pictures, 1 to 4; by default 1")
    size: str | None = Field(
        default=None, description="`auto`, WIDTHxHEIGHT with sides of 256 to 1440, or a ratio as `16:9`"
    )
    quality: Quality | None = Field(
        default=None, description="How many steps are taken; low takes half as many as auto, high half as many again"
    )
    output_format: Format | None = Field(default=None, description="png, jpeg or webp; by default png")
    output_compression: int | None = Field(
        default=None, description="Quality of a jpeg or webp, 0 to 100; by default 100"
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        default=None, description="b64_json, or url: an address of this server that needs the key and lives for an hour"
    )
    stream: bool | None = Field(default=None, description="Answer with server-sent events")
    partial_images: int | None = Field(default=None, ge=0, le=3, description="Small previews in the stream")
    seed: int | None = Field(default=None, description="Of the first picture; the others count on")
    steps: int | None = Field(default=None, description="Instead of quality, 1 to 50")
    guidance: float | None = Field(default=None, description="0 to 10; dev alone has it")
    lora: str | None = Field(default=None, description="Instead of the server's own fine-tune: where a LoRA is")
    lora_scale: float | None = Field(default=None, description="How strongly the LoRA is applied; 0: not at all")
    user: str | None = Field(default=None, description="Accepted, and not kept")
    safety_identifier: str | None = Field(default=None, description="Accepted, and not kept")
    background: str | None = Field(default=None, description="Ignored, as are style, moderation and complexity")
    style: str | None = None
    moderation: str | None = None
    complexity: str | None = None


class EditRequest(ImageRequest):
    """What an edit asks beside its files; as fields of a form, all of them are texts."""

    model_config = ConfigDict(extra="forbid", strict=False)

    strength: float | None = Field(default=None, description="How much is drawn anew, 0 to 1; by default 0.8")
    input_fidelity: str | None = None


class ModelError(RequestError):
    """A model that is not here."""


@dataclass(frozen=True)
class Asked:
    """A valid request, and what its answer repeats of it."""

    request: Request
    notes: Sequence[str]
    """A sentence for each field that has no effect, or another than it says."""
    quality: str
    url: bool
    """Whether addresses of pictures are wanted, instead of the pictures."""
    stream: bool
    previews: int
    """How many previews of each picture are wanted in the stream."""

    @property
    def output_format(self) -> str:
        """As OpenAI calls it."""
        return "jpeg" if self.request.output_format == "jpg" else self.request.output_format


@dataclass(frozen=True)
class Source:
    """What an edit starts from, as ``data:`` URIs."""

    image: str
    mask: str | None
    """White is drawn anew."""


def read(
    body: ImageRequest, models: Sequence[str], weights: Path, interface: Interface, source: Source | None = None
) -> Asked:
    """Turn what a client asks into a request.

    Args:
        body: what it sent.
        models: the base models that are served.
        weights: the weights directory, whose ``loras/`` have names.
        interface: whose bounds hold.
        source: what an edit starts from; None: nothing.

    Raises:
        ModelError: there is no such model.
        RequestError: another field cannot be used; the message names it as the client does.
    """
    model, lora = _model(body, models, weights)
    ratio, note = _size(body.size)
    if source and ratio:
        ratio, note = {}, "size is ignored: the image decides it"
    notes = [f"{name} is ignored: FLUX.1 has no such choice" for name in IGNORED if getattr(body, name, None)]
    if note:
        notes.append(note)
    if body.stream and body.response_format == "url":
        raise RequestError("response_format must be b64_json for a stream.")
    if body.partial_images and not body.stream:
        notes.append("partial_images is ignored: it needs stream")
    quality = body.quality or "auto"
    inputs: dict[str, Any] = {
        "prompt": body.prompt,
        "model": model,
        "num_outputs": body.n,
        "num_inference_steps": body.steps if body.steps is not None else STEPS[model][QUALITIES.get(quality, quality)],
        "guidance_scale": body.guidance,
        "seed": body.seed,
        "replicate_weights": lora,
        "lora_scale": body.lora_scale,
        "output_format": {"jpeg": "jpg"}.get(body.output_format or "png", body.output_format or "png"),
        "output_quality": 100 if body.output_compression is None else body.output_compression,
        **ratio,
        **(
            {"image": source.image, "mask": source.mask, "prompt_strength": getattr(body, "strength", None)}
            if source
            else {}
        ),
    }
    try:
        request = Request.parse(interface, **{name: value for name, value in inputs.items() if value is not None})
    except RequestError as error:
        raise RequestError(_renamed(str(error))) from None
    return Asked(
        request=request,
        notes=[*notes, *map(_renamed, request.notes)],
        quality=quality,
        url=body.response_format == "url",
        stream=bool(body.stream),
        previews=body.partial_images or 0 if body.stream else 0,
    )


def _model(body: ImageRequest, models: Sequence[str], weights: Path) -> tuple[str, str | None]:
    """The base model and the LoRA that are meant."""
    named = body.lora and (loras.source(weights, body.lora) or body.lora)
    if not body.model:
        return models[0], named
    if body.model in models:
        return body.model, named
    lora = loras.source(weights, body.model) or (body.model if loras.is_source(body.model) else None)
    if lora is None:
        here = ", ".join((*models, *loras.names(weights)))
        raise ModelError(f"The model {body.model[:60]!r} does not exist here. There are {here}, and any LoRA's source.")
    if named:
        raise RequestError("lora and model both name a LoRA: give dev or schnell as the model.")
    return models[0], lora


def _size(size: str | None) -> tuple[dict[str, Any], str | None]:
    """The inputs that a size means, and a sentence if it means another size."""
    if size in (None, "", "auto"):
        return {}, None
    if size in SIZES:
        return {"aspect_ratio": size}, None
    found = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", size)
    if not found:
        raise RequestError(f"size must be auto, WIDTHxHEIGHT or a ratio such as 16:9, not {size[:60]!r}.")
    width, height = int(found[1]), int(found[2])
    for ratio, pixels in SIZES.items():
        if pixels == (width, height):
            return {"aspect_ratio": ratio}, None
    if smaller := LARGER.get(f"{width}x{height}"):
        return {"aspect_ratio": smaller}, "size {}x{} is drawn as {}x{}".format(width, height, *SIZES[smaller])
    if not all(SMALLEST_SIDE <= side <= LARGEST_SIDE for side in (width, height)):
        raise RequestError(f"size must have sides of {SMALLEST_SIDE} to {LARGEST_SIDE} pixels, not {width}x{height}.")
    note = None if width % 16 == height % 16 == 0 else "the sides of size are rounded to multiples of 16"
    return {"aspect_ratio": "custom", "width": width, "height": height}, note


def _renamed(text: str) -> str:
    """A message about our inputs, by the names that they have here; each of its problems begins with one."""
    return re.sub(r"(?:^|(?<=; ))\w+", lambda name: OURS.get(name[0], name[0]), text)
