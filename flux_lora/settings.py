"""What the operator chose: the only place that reads environment variables."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BeforeValidator, ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from flux_lora.errors import SettingsError
from flux_lora.inputs import Model
from flux_lora.request import MODELS

GIB = 1024**3

ProfileName = Literal["eager", "exact", "balanced", "fast"]
PlanName = Literal["resident", "alternating", "offload-text", "quantized", "streamed"]


GUARDED = ("safety_threshold", "allow_disable_safety_checker", "embed_parameters", "api_keys")
"""Settings that a mistyped name must not leave at their defaults: safety and privacy hang on them."""

GUARDED_WORDS = ("SAFETY", "EMBED", "TOKEN", "KEY")
"""What else stops the start when it stands in a name that no setting has."""


def _cache(name: str) -> Path:
    try:
        return Path.home() / ".cache" / "flux-lora" / name
    except RuntimeError:  # neither HOME nor an entry in passwd
        raise SettingsError(
            "There is no home directory, where caches would be kept: name folders in FLUX_CACHE and FLUX_ADAPTER_CACHE."
        ) from None


def _with_unit(value: object) -> object:
    if isinstance(value, str) and value.strip().isdigit():
        raise ValueError("a size needs its unit, as in 24GB or 22.5GiB")
    return value


class Settings(BaseSettings):
    """Operator's settings, each from the environment variable of its name with the prefix ``FLUX_``.

    The tokens keep the names that their services' own tools use (``HF_TOKEN`` …).
    """

    model_config = SettingsConfigDict(env_prefix="FLUX_", frozen=True, extra="ignore", env_ignore_empty=True)

    weights: Path = Path("weights")
    """The weights directory: ``dev/``, ``schnell/``, ``lora.safetensors``, ``safety_checker/``."""

    download: Annotated[tuple[Model, ...], NoDecode] = ()
    """Base weights to fetch at set-up when they are missing: ``1`` for both models, or ``dev``, or ``schnell``."""

    device: str = "auto"
    """``auto`` (the first CUDA device, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``."""

    cpu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights on a CPU; a GPU always runs bfloat16."""

    profile: ProfileName | None = None
    """What is done for speed (``profiles.py``); unset: ``exact`` on a CUDA device, ``eager`` elsewhere."""

    cache: Path = Field(default_factory=lambda: _cache("speed"))
    """Where compiled code and measured choices are kept for the next process."""

    memory_budget: Annotated[ByteSize, BeforeValidator(_with_unit)] | None = None
    """Device memory that the service may take, as ``24GB`` or ``22.5GiB``; unset: all that is free."""

    memory_plan: PlanName | None = None
    """One of the memory plans (``flux_lora/memory/plans.py``), whatever the numbers say; unset: the first that fits."""

    prompt_cache: int = Field(default=16, ge=0, le=4096)
    """How many encoded prompts are kept."""

    max_prompt: int = Field(default=100_000, ge=1)
    """Most characters of a prompt."""

    allow_disable_safety_checker: bool = True
    """Whether a request may switch the safety checker off."""

    embed_parameters: bool = True
    """Write prompt and parameters into the files; the mark that they are AI-generated is always written."""

    webp_method: int | None = Field(default=None, ge=0, le=6)
    """libwebp's effort, from 0 (quick) to 6 (small files); unset: 2, and 4 at quality 100."""

    c2pa_certificate: Path | None = None
    """Certificate chain to sign each picture with (C2PA content credentials), a PEM file; unset: none is signed."""

    c2pa_key: Path | None = None
    """The private key of that certificate, a PEM file."""

    c2pa_timestamp: str | None = Field(default=None, pattern=r"^https?://")
    """Address of a time-stamp authority (RFC 3161) that is asked for each signature; unset: none is."""

    safety_threshold: float | None = Field(default=None, ge=0, le=1)
    """Score from which an image is withheld; unset: the calibrated threshold of the checker in use."""

    adapter_cache: Path = Field(default_factory=lambda: _cache("adapters"))
    """Where downloaded LoRAs are kept."""

    adapter_cache_bytes: int = Field(default=20 * GIB, ge=0)
    """Disk budget of that cache; the least recently used files leave first."""

    adapter_memory_bytes: int | None = Field(default=None, ge=0)
    """Host memory budget of parsed LoRAs; unset: a quarter of what is free. They go when memory becomes short."""

    adapter_max_bytes: int = Field(default=5 * GIB, gt=0)
    """Largest LoRA file or archive that is downloaded."""

    source_deadline: float = Field(default=300.0, gt=0)
    """Seconds for fetching a LoRA or picture of a request; set-up and the operator's own sources have an hour."""

    source_rate: int = Field(default=64 * 1024, ge=0)
    """Bytes per second below which a server is given up that a request's LoRA or picture comes from."""

    request_tokens: bool = False
    """Send the operator's tokens for requests, too: whoever may ask then draws with all that the tokens can read."""

    api_keys: SecretStr | None = None
    """Keys that callers of the service may use, separated by commas; unset: it serves loopback alone, without keys."""

    replicas: int | None = Field(default=None, ge=1)
    """How many generators the service holds; unset: one for each GPU, or one on the CPU."""

    max_replicas: int | None = Field(default=None, ge=1)
    """How many it may start while the queue is long (autoscaling from ``replicas`` on); unset: no more than those."""

    queue_limit: int = Field(default=64, ge=1)
    """Requests that may wait in the service; the next one is told when to try again."""

    queue_limit_per_key: int = Field(default=16, ge=1)
    """Of one key."""

    queue_overtaking: int = Field(default=8, ge=0)
    """How often a waiting request may be overtaken by one whose LoRA a replica has merged already."""

    request_deadline: float = Field(default=900.0, gt=0)
    """Seconds that a request to the service may take, waiting included."""

    start_deadline: float = Field(default=900.0, gt=0)
    """Seconds that starting the service may take: loading and compiling included."""

    result_seconds: float = Field(default=3600.0, gt=0)
    """How long the service keeps predictions and their pictures."""

    result_bytes: Annotated[ByteSize, BeforeValidator(_with_unit)] = ByteSize(GIB)
    """Host memory that those pictures may take; the oldest go first."""

    extended: bool = False
    """Whether the service takes the extended inputs, an image and a mask among them; ``--extended`` is the same."""

    json_log: bool = False
    """Whether the service logs one JSON object a line, with the request's id."""

    ray_address: str | None = Field(default=None, validation_alias="RAY_ADDRESS")
    """A Ray cluster that the service runs on; unset: one of its own, on this machine."""

    cog_weights: str | None = Field(default=None, validation_alias="COG_WEIGHTS")
    """The fine-tune, a path or a URL; Cog's server hands it to ``setup`` itself."""

    hf_token: SecretStr | None = Field(default=None, validation_alias="HF_TOKEN")
    civitai_token: SecretStr | None = Field(default=None, validation_alias="CIVITAI_TOKEN")
    replicate_api_token: SecretStr | None = Field(default=None, validation_alias="REPLICATE_API_TOKEN")

    display: str | None = Field(default=None, validation_alias=AliasChoices("WAYLAND_DISPLAY", "DISPLAY"))
    """The desktop that commands may show pictures on."""

    @field_validator("download", mode="before")
    @classmethod
    def _models(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.lower() in ("0", "false", "no", "off"):
            return ()
        if value.lower() in ("1", "true", "yes", "on"):
            return MODELS
        return tuple(part.strip() for part in value.split(","))

    @classmethod
    def from_environment(cls) -> Self:
        """Read the environment.

        Raises:
            SettingsError: a variable has a value that cannot be used, or a name that is nearly that of a setting on
                which safety or privacy hangs; the message names it.
        """
        for sentence, hint in map(_not_a_setting, filter(_is_guarded, _unknown())):
            raise SettingsError(f"{sentence}, and safety or privacy may hang on it: take it out or correct it.{hint}")
        try:
            return cls()
        except ValidationError as error:
            problems = "; ".join(f"{_variable(p['loc'])}={p['input']!s:.60}: {p['msg']}" for p in error.errors())
            raise SettingsError(f"The environment holds settings that cannot be used: {problems}.") from None

    @classmethod
    def notes(cls) -> list[str]:
        """A sentence for each ``FLUX_`` variable in the environment that is no setting."""
        return [f"{sentence}, and so ignored.{hint}" for sentence, hint in map(_not_a_setting, _unknown())]


def _known() -> dict[str, str]:
    """The settings' variables without their prefix, and the names of the settings."""
    return {name.upper(): name for name, field in Settings.model_fields.items() if not field.validation_alias}


def _unknown() -> list[str]:
    """The ``FLUX_`` variables that are set and no settings, whose case does not count."""
    given = (name for name, value in os.environ.items() if value and name.upper().startswith("FLUX_"))
    return sorted(name for name in given if name.upper().removeprefix("FLUX_") not in _known())


def _nearest(variable: str) -> str | None:
    close = difflib.get_close_matches(variable.upper().removeprefix("FLUX_"), _known(), n=1)
    return _known()[close[0]] if close else None


def _is_guarded(variable: str) -> bool:
    return _nearest(variable) in GUARDED or any(word in variable.upper() for word in GUARDED_WORDS)


def _not_a_setting(variable: str) -> tuple[str, str]:
    nearest = _nearest(variable)
    return (
        f"The environment variable {variable!r} is no setting",
        f" Did you mean {_variable((nearest,))}?" if nearest else "",
    )


def _variable(location: tuple[int | str, ...]) -> str:
    name = str(location[0])
    return name if name.isupper() else f"FLUX_{name.upper()}"
