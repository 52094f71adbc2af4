"""What a file's metadata says: how PEFT scales, the trigger word, the model it was trained on."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flux_lora.errors import FormatError

Metadata = Mapping[str, str]

_UNCHANGED_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""PEFT's initialisations after which the base weights are still those of the base model."""

_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|\.\*)*\$?")
_MAX_WILDCARDS = 2
"""PEFT's patterns are regular expressions; beyond names and a few ``.*`` a hostile one could take for ever to match."""


@dataclass(frozen=True)
class Scaling:
    """How a trainer scales one component's updates: α/r, or α/√r with rsLoRA (https://arxiv.org/abs/2312.03732).

    ``alpha`` and ``alphas`` (by a pattern of the layer's name) stand in where a file has no alpha beside its factors.
    """

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False

    def alpha_of(self, layer: str) -> float | None:
        """The alpha for a layer, as ``peft.utils.other.get_pattern_key`` finds it."""
        for pattern, alpha in self.alphas.items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return alpha
        return self.alpha

    def factor(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def scaling(metadata: Metadata, component: str) -> Scaling:
    """What diffusers' ``save_lora_weights`` or PEFT's adapter configuration in the metadata say about a component.

    Raises:
        FormatError: they cannot be read, or name a method that changes what the factors mean.
    """
    settings = _peft_settings(metadata, component)
    if (method := settings.get("peft_type", "LORA")) != "LORA":
        raise FormatError(f"its metadata describes a PEFT adapter of type {method!r}, which is not supported")
    if (init := settings.get("init_lora_weights")) not in _UNCHANGED_BASE:
        raise FormatError(f"it was trained on base weights changed by init_lora_weights={init!r}; convert it to LoRA")
    alphas = settings.get("alpha_pattern") or {}
    try:
        alpha = settings.get("lora_alpha")
        numbers = {pattern: float(number) for pattern, number in alphas.items()}
        parsed = Scaling(None if alpha is None else float(alpha), numbers, bool(settings.get("use_rslora")))
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise FormatError("the alpha or alpha pattern in its metadata is not a number") from None
    for pattern in numbers:
        if not _PATTERN.fullmatch(pattern) or pattern.count(".*") > _MAX_WILDCARDS:
            raise FormatError(f"its alpha pattern {pattern[:80]!r} is not a layer's name")
    if not all(map(math.isfinite, [*numbers.values(), parsed.alpha or 0.0])):
        raise FormatError("the alpha or alpha pattern in its metadata is not finite")
    return parsed


def trigger_word(metadata: Metadata) -> str | None:
    """The word that the trainer says calls the subject."""
    word = metadata.get("modelspec.trigger_phrase") or ""
    if not word:  # ai-toolkit writes its one trigger word as the only tag of the only folder
        tags = [tag for folder in _json(metadata.get("ss_tag_frequency")).values() for tag in folder]
        word = str(tags[0]) if len(tags) == 1 else ""
    return " ".join(word.split())[:80] or None


def architecture(metadata: Metadata) -> str:
    """What the metadata says about the base model; empty when it says nothing."""
    return f"{metadata.get('modelspec.architecture', '')} {metadata.get('ss_base_model_version', '')}".strip()


def _peft_settings(metadata: Metadata, component: str) -> Mapping[str, Any]:
    if "lora_adapter_metadata" not in metadata:
        return {}
    settings = _json(metadata["lora_adapter_metadata"])
    if not settings:
        raise FormatError("the lora_adapter_metadata in its header cannot be read")
    own = {
        key.removeprefix(f"{component}."): value for key, value in settings.items() if key.startswith(f"{component}.")
    }
    bare = {key: value for key, value in settings.items() if "." not in key}  # as save_lora_adapter of one model writes
    return own or (bare if component == "transformer" else {})


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
