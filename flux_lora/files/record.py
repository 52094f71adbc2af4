"""Everything that draws an image: the record that goes into its file."""

import json
import zlib
from base64 import b64decode, b64encode
from functools import cache
from importlib.metadata import version
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

import flux_lora
from flux_lora.errors import OutputError
from flux_lora.files import own_code
from flux_lora.inputs import Model, OutputFormat

OWN = ("flux_lora", "code")
"""What names flux-lora's own code in the software of a record; all else there are libraries."""

LONG_PROMPT = 4000
"""Characters up to which a prompt is written as it is, and is shown outside the record too."""

LONGEST_PROMPT = 2**24
"""Bytes that a deflated prompt may have: a stranger's picture must not fill the memory."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Software(_Record):
    """The versions of the software that decides a pixel or a byte."""

    flux_lora: str
    code: str | None = None
    """Digest of flux_lora's sources; None in files of 0.1.0."""
    torch: str
    diffusers: str
    transformers: str
    pillow: str

    @classmethod
    @cache
    def installed(cls) -> Self:
        """Read the installed versions; nothing is imported for that."""
        libraries = {name: version(name) for name in cls.model_fields if name not in OWN}
        return cls(flux_lora=flux_lora.__version__, code=own_code.DIGEST, **libraries)


class Environment(_Record):
    """Where an image was drawn: what may change its pixels although the request is the same."""

    base: str
    """Fingerprint of the base weights."""
    device: str
    dtype: str
    profile: str = "eager"
    """Of speed; files from before there were any were drawn by this one."""
    attention: str = "native"
    """The attention kernel, by diffusers' name; and what is fused: ``native, fused qkv, fused blocks``."""
    memory: str = "resident"
    """The memory plan; files from before there were plans lack it."""
    software: Software

    def differences(self, other: Self) -> list[str]:
        """Name what differs, one phrase each: ``torch 2.13.0, not 2.12.1``, where 2.12.1 is the other's."""
        here, there = self._known(), other._known()
        both = (name for name in here if name in there)
        return [f"{name} {here[name]}, not {there[name]}" for name in both if here[name] != there[name]]

    def _known(self) -> dict[str, str]:
        return {**self.model_dump(exclude={"software"}), **self.software.model_dump(exclude_none=True)}


class Lora(_Record):
    """A fine-tune and its strength."""

    digest: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of the file."""
    scale: float
    name: str = ""
    """What the file calls itself in its metadata: never a path or an address, which would tell of the server."""
    data_digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the tensors' bytes, all that follows the safetensors header; None in records of version 1."""

    @property
    def autov2(self) -> str:
        """The hash by which Civitai and its extension know a file: ten digits of its SHA-256."""
        return self.digest[:10]

    @property
    def autov3(self) -> str | None:
        """The hash by which kohya's trainer and AUTOMATIC1111's web UI know a LoRA: twelve digits, of its tensors."""
        return self.data_digest and self.data_digest[:12]


class Source(_Record):
    """The image that a picture was drawn from."""

    image: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of its file."""
    mask: str | None = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of the mask's; None: all of the image was drawn anew."""
    prompt_strength: float
    """Share of the noise schedule that was run, 0…1."""
    megapixels: str
    """As it was asked for: it decides to what size the image was scaled."""


class Parameters(_Record):
    """What drew one image; on one machine the file, before it is signed, is a function of this value.

    No time, index or count of the batch belongs here, and no aspect ratio: the size says it.
    """

    record: Literal[3] = 3
    """Version of this layout, as which older ones are read.

    Version 1 had at most one LoRA, as ``lora``; version 2 had neither ``source`` nor ``go_fast`` and ``reused_steps``.
    """
    prompt: str
    seed: int
    """Of this image; in a batch that is the request's seed + k."""
    width: int
    """Of the file, in pixels."""
    height: int
    model: Model
    num_inference_steps: int
    guidance_scale: float | None
    """None for schnell, which has no guidance input."""
    loras: tuple[Lora, ...] = ()
    """All that were applied, by digest and scale: the order in which they were asked for changes no bit."""
    source: Source | None = None
    """What it was drawn from; None: noise, which nothing else has touched."""
    go_fast: bool = False
    """Whether steps were to be reused, whatever the speed profile does."""
    reused_steps: int | None = None
    """How many steps were extrapolated from those before; files of version 2 do not say."""
    output_format: OutputFormat
    output_quality: int | None
    """None for png, which is lossless."""
    webp_method: int | None = Field(default=None, ge=0, le=6)
    """libwebp's effort; None for other formats. Files from before it was recorded were encoded by 4."""
    environment: Environment

    @model_validator(mode="before")
    @classmethod
    def _layout(cls, data: Any) -> Any:
        """Read versions 1 and 2, a WebP that does not name its effort, and a prompt that was deflated."""
        if not isinstance(data, dict):
            return data
        if data.get("record") == 1 and "lora" in data and "loras" not in data:
            lora = data["lora"]
            data = {name: value for name, value in data.items() if name != "lora"}
            data |= {"record": 2, "loras": [] if lora is None else [lora]}
        if data.get("record") == 2:
            data = data | {"record": 3}
        if data.get("output_format") == "webp" and "webp_method" not in data:
            data = data | {"webp_method": 4}
        if isinstance(prompt := data.get("prompt"), dict):
            data = data | {"prompt": _inflated(prompt)}
        return data

    @field_validator("loras")
    @classmethod
    def _in_canonical_order(cls, loras: tuple[Lora, ...]) -> tuple[Lora, ...]:
        return tuple(sorted(loras, key=lambda lora: (lora.digest, lora.scale)))

    def to_json(self) -> str:
        """Write the record as one line of ASCII.

        A long prompt is deflated, so that no escape can make it several times as long: ``{"deflated": base64}``.
        """
        fields = self.model_dump(mode="json")
        if len(self.prompt) > LONG_PROMPT:
            fields["prompt"] = {"deflated": b64encode(zlib.compress(self.prompt.encode(), 9)).decode()}
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a record.

        Raises:
            OutputError: the record is damaged, or another version of flux-lora wrote it.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise OutputError(
                "The parameters are damaged, or a newer version of flux-lora wrote them "
                f"({': '.join(filter(None, (field, first['msg'])))})."
            ) from None


def _inflated(prompt: dict[Any, Any]) -> str:
    if list(prompt) != ["deflated"] or not isinstance(prompt["deflated"], str):
        raise ValueError("the prompt is not text")
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(b64decode(prompt["deflated"], validate=True), LONGEST_PROMPT)
        if inflater.unconsumed_tail or not inflater.eof:
            raise ValueError("the prompt is too long or not whole")
        return text.decode()
    except zlib.error:
        raise ValueError("the prompt cannot be inflated") from None
