"""Everything that draws an image: the record that goes into its file."""

from functools import cache
from importlib.metadata import version
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

import flux_lora
from flux_lora.errors import OutputError
from flux_lora.files import own_code
from flux_lora.request import Model, OutputFormat

OWN = ("flux_lora", "code")
"""What names flux-lora's own code in the software of a record; all else there are libraries."""


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
    """A fine-tune and its strength; the digest is the SHA-256 of the file."""

    digest: str
    scale: float


class Parameters(_Record):
    """What drew one image; on one machine the file is a function of this value.

    No time, index or count of the batch belongs here, and no aspect ratio: the size says it.
    """

    record: Literal[1] = 1
    """Version of this layout."""
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
    lora: Lora | None
    output_format: OutputFormat
    output_quality: int | None
    """None for png, which is lossless."""
    environment: Environment

    def to_json(self) -> str:
        """Write the record as one line of ASCII."""
        return self.model_dump_json(ensure_ascii=True)

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
