"""One line that says what was read."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flux_lora.lora.deltas import Update
from flux_lora.lora.formats.layouts import BFL, XLABS, Shapes
from flux_lora.lora.formats.names import Name

_BY_PREFIX = {
    "lora_unet": "kohya sd-scripts",
    "oft_unet": "kohya sd-scripts",
    "lora_te": "kohya sd-scripts",
    "lora_te1": "kohya sd-scripts",
    "lora_te2": "kohya sd-scripts",
    "lora_te3": "kohya sd-scripts",
    "lora_transformer": "OneTrainer",
    "lycoris": "LyCORIS",
}
_COMPONENTS = {"transformer": "transformer", "text_encoder": "CLIP", "text_encoder_2": "T5"}


@dataclass(frozen=True)
class Adapted:
    """One layer with its updates and keys, what made them, and the rank and alpha they were trained with, if any."""

    name: Name
    keys: tuple[str, ...]
    updates: tuple[Update, ...]
    algorithm: str
    rank: int | None
    alpha: float | None
    reads_alpha: bool


def family(names: Iterable[Name]) -> str:
    """Who writes such names; those of the transformer tell more than those of the text encoders."""
    names = list(names)
    chosen = [name for name in names if name.component == "transformer"] or names
    return " + ".join(sorted({_family(name) for name in chosen}))


def _family(name: Name) -> str:
    if name.layer.layout == XLABS:
        return "XLabs"
    if name.prefix in _BY_PREFIX:
        return _BY_PREFIX[name.prefix]
    return "BFL/ComfyUI" if name.layer.layout == BFL or "diffusion_model" in name.prefix else "diffusers/PEFT"


def summarize(layers: Sequence[Adapted], shapes: Shapes, notes: Iterable[str | None]) -> str:
    """Family, algorithms, ranks, alphas, and how many of the served weights are touched, then the notes."""
    algorithms = "/".join(sorted({layer.algorithm for layer in layers}))
    facts = [f"{family(layer.name for layer in layers)} {algorithms}"]
    if ranks := {layer.rank for layer in layers if layer.rank}:
        facts.append(f"rank {_range(ranks)}")
        alphas = {layer.alpha for layer in layers if layer.alpha is not None}
        facts.append(f"alpha {_range(alphas)}" if alphas else "no alpha (scale 1)")
    for component, parameters in shapes.items():
        touched = {
            rows.parameter
            for layer in layers
            if layer.name.component == component
            for update in layer.updates
            for rows in update.target
        }
        present = {name for name, shape in parameters.items() if len(shape) > 1}
        if touched:
            facts.append(f"{len(touched & present)} of {len(present)} {_COMPONENTS[component]} weights")
    if not any(layer.updates for layer in layers):
        facts.append("all of it zeros, so that it changes nothing")
    return ", ".join([*facts, *(note for note in notes if note)])


def without_effect(ignored: Mapping[str, str]) -> str | None:
    """How many keys change nothing, for each reason."""
    reasons = Counter(ignored.values())
    if len(reasons) == 1:
        return f"{len(ignored)} keys without effect ({next(iter(reasons))})"
    counts = "; ".join(f"{count} × {reason}" for reason, count in sorted(reasons.items()))
    return f"{len(ignored)} keys without effect ({counts})" if ignored else None


def _range(numbers: set[int] | set[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
