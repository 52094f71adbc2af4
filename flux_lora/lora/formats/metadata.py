"""What a file's metadata says: how PEFT scales, its name, the model it was trained on."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flux_lora.checkpoint.header import MAX_NAME_LENGTH, shown
from flux_lora.errors import FormatError
from flux_lora.lora.rotations import BY_DEFAULT, PeftOft

Metadata = Mapping[str, str]

_UNCHANGED_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""PEFT's initialisations after which the base weights are still those of the base model."""

_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|\.\*)*\$?")
_MAX_WILDCARDS = 2
_MAX_PATTERNS, _MAX_PATTERNS_WITH_WILDCARDS = 4096, 64
"""PEFT's patterns are regular expressions; beyond names and a few ``.*`` hostile ones could take for ever to match."""

_MAX_TERMS = 100
"""Of a series whose fifth is too small to matter."""

_LARGEST = (2 - 2**-23) * 2.0**127
"""Of float32."""

_COMPONENTS = ("transformer.", "text_encoder.", "text_encoder_2.")


@dataclass(frozen=True)
class Scaling:
    """How a trainer scales one component's updates: α/r, or α/√r with rsLoRA (https://arxiv.org/abs/2312.03732).

    ``alpha`` and ``alphas`` (whether a layer's name matches, with its alpha; the first match counts) stand in where a
    file has no alpha beside its factors. ``oft`` is how PEFT's OFT makes its rotations.
    """

    alpha: float | None = None
    alphas: tuple[tuple[Callable[[str], object], float], ...] = ()
    rank_stabilized: bool = False
    oft: PeftOft = BY_DEFAULT

    def alpha_of(self, layer: str) -> float | None:
        """The alpha of a layer, if there is one.

        Raises:
            FormatError: it is not finite in float32.
        """
        alpha = next((alpha for matches, alpha in self.alphas if matches(layer)), self.alpha)
        if alpha is not None and not abs(alpha) <= _LARGEST:
            raise FormatError("the alpha or alpha pattern in its metadata is not finite in float32")
        return alpha

    def factor(self, alpha: float, rank: int) -> float:
        """What up @ down is multiplied by, of an alpha and a rank."""
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def scaling(metadata: Metadata, component: str) -> Scaling:
    """What diffusers' ``save_lora_weights`` or PEFT's adapter configuration in the metadata say about a component.

    Raises:
        FormatError: they cannot be read, or name a method that changes what the factors mean.
    """
    settings = _peft_settings(metadata, component)
    if (method := settings.get("peft_type", "LORA")) not in ("LORA", "OFT", "BOFT"):
        raise FormatError(f"its metadata describes a PEFT adapter of type {shown(method)}, which is not supported")
    if (init := settings.get("init_lora_weights")) not in _UNCHANGED_BASE:
        raise FormatError(
            f"it was trained on base weights changed by init_lora_weights={shown(init)}; convert it to LoRA"
        )
    try:
        alpha = None if settings.get("lora_alpha") is None else float(settings["lora_alpha"])
        alphas = {pattern: float(number) for pattern, number in (settings.get("alpha_pattern") or {}).items()}
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise FormatError("the alpha or alpha pattern in its metadata is not a number") from None
    oft = _oft(settings) if method == "OFT" else BY_DEFAULT
    return Scaling(alpha, _matchers(alphas), bool(settings.get("use_rslora")), oft)


def _oft(settings: Mapping[str, Any]) -> PeftOft:
    """PEFT's OFTConfig. Its first versions know the formula alone, and those before 0.18 do not say which they are."""
    terms, bound = settings.get("num_cayley_neumann_terms", 5), settings.get("eps", 6e-5)
    if type(terms) is not int or not 1 <= terms <= _MAX_TERMS:
        raise FormatError(f"its num_cayley_neumann_terms is {shown(terms)} and must be a number from 1 to {_MAX_TERMS}")
    if type(bound) not in (int, float) or not 0 <= bound < math.inf:
        raise FormatError(f"its eps is {shown(bound)} and must be a number from 0")
    return PeftOft(
        terms if settings.get("use_cayley_neumann") else None,
        last_twice="peft_version" not in settings,
        bound=float(bound) if settings.get("coft") else None,
    )


def _matchers(alphas: Mapping[str, float]) -> tuple[tuple[Callable[[str], object], float], ...]:
    for pattern in alphas:
        too_long = len(pattern) > MAX_NAME_LENGTH  # compiling an expression of 100 kB takes a second
        if too_long or not _PATTERN.fullmatch(pattern) or pattern.count(".*") > _MAX_WILDCARDS:
            raise FormatError(f"its alpha pattern {shown(pattern)} is not a layer's name")
    if len(alphas) > _MAX_PATTERNS or sum(".*" in pattern for pattern in alphas) > _MAX_PATTERNS_WITH_WILDCARDS:
        raise FormatError(
            f"its metadata has more than {_MAX_PATTERNS:,} alpha patterns, or {_MAX_PATTERNS_WITH_WILDCARDS} with '.*'"
        )
    return tuple((_matcher(pattern), alpha) for pattern, alpha in alphas.items())


def _matcher(pattern: str) -> Callable[[str], object]:
    """Whether a layer's name is the pattern or ends in it, as in ``peft.utils.other.get_pattern_key``, dots as dots."""
    if ".*" in pattern:
        return re.compile(rf"(.*\.)?({pattern})$").match
    name = pattern.removesuffix("$").replace("\\.", ".")
    if name.startswith("^"):
        return name[1:].__eq__
    return lambda layer: f".{layer}".endswith(f".{name}")


def own_name(metadata: Metadata) -> str:
    """What the trainer called the file: its title, or the name it was written under."""
    name = metadata.get("modelspec.title") or metadata.get("ss_output_name") or ""
    return " ".join(name.split())[:80]


def architecture(metadata: Metadata) -> str:
    """What the metadata says about the base model; empty when it says nothing."""
    return f"{metadata.get('modelspec.architecture', '')} {metadata.get('ss_base_model_version', '')}".strip()


def _peft_settings(metadata: Metadata, component: str) -> Mapping[str, Any]:
    if "lora_adapter_metadata" not in metadata:
        return {}
    settings = _json(metadata["lora_adapter_metadata"])
    if not settings:
        raise FormatError("the lora_adapter_metadata in its header cannot be read")
    if not any("." in key for key in settings):  # as save_lora_adapter of one model writes them
        return settings if component == "transformer" else {}
    if strangers := [key for key in settings if not key.startswith(_COMPONENTS)]:
        raise FormatError(f"its lora_adapter_metadata has the setting {shown(strangers[0])}, of no component of FLUX.1")
    own = f"{component}."
    return {key.removeprefix(own): value for key, value in settings.items() if key.startswith(own)}


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
