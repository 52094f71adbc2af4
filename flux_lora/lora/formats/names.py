"""Reading a key: which layer it belongs to, and which part of an update it is.

A key is a prefix (whose file, which component), the name of a layer, and a suffix (which part). Prefixes, layouts and
suffixes combine freely in files of the wild, so each is recognised on its own. Dots and underscores are the same here:
some trainers write the layer's dots as underscores, and no two layers differ only in them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from flux_lora.lora.formats.layouts import Layer, Shapes, layers

_PREFIXES = {
    "transformer": (
        "transformer",  # diffusers, SimpleTuner, ai-toolkit
        "lora_unet",  # sd-scripts, LyCORIS in sd-scripts, OneTrainer's kohya export
        "lora_transformer",  # OneTrainer's own layout
        "lycoris",  # LyCORIS, SimpleTuner, ai-toolkit's old LoKr
        "diffusion_model",  # ComfyUI, fal, ai-toolkit
        "model_diffusion_model",  # ComfyUI's whole checkpoints
        "",
    ),
    "text_encoder": ("text_encoder", "lora_te1", "lora_te", "text_encoders_clip_l_transformer"),
    "text_encoder_2": ("text_encoder_2", "lora_te2", "lora_te3", "text_encoders_t5xxl_transformer"),
}

_PARTS = {
    "down": ("lora_A.weight", "lora_A.default.weight", "lora_down.weight", "lora_down.default.weight",
             "lora.down.weight", "lora_linear_layer.down.weight", "down.weight"),
    "up": ("lora_B.weight", "lora_B.default.weight", "lora_up.weight", "lora_up.default.weight",
           "lora.up.weight", "lora_linear_layer.up.weight", "up.weight"),
    "up_bias": ("lora_B.bias", "lora_B.default.bias", "lora_up.bias"),
    "alpha": ("alpha", "lora_alpha"),
    "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default",
                  "lora_magnitude_vector.default.weight", "magnitude"),  # PEFT, and ai-toolkit's DoRA
    "dora_scale": ("dora_scale",),
    "diff": ("diff", "w_norm"),
    "diff_b": ("diff_b", "b_norm"),
}  # fmt: skip
_LYCORIS_PARTS = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip
_SUFFIXES = {suffix: part for part, suffixes in _PARTS.items() for suffix in suffixes}
_SUFFIXES |= {part: part for part in _LYCORIS_PARTS}
_KEY = re.compile(rf"(?P<layer>.+?)\.(?P<suffix>{'|'.join(map(re.escape, _SUFFIXES))})")


@dataclass(frozen=True)
class Name:
    """What a key says."""

    component: str
    prefix: str
    layer: Layer
    suffix: str

    @property
    def part(self) -> str:
        return _SUFFIXES[self.suffix]


class Names:
    """Reads keys for modules of the given shapes."""

    def __init__(self, shapes: Shapes) -> None:
        self._layers: Mapping[str, Mapping[str, Layer]] = {
            component: {layer.name.replace(".", "_"): layer for layer in layers(component, parameters)}
            for component, parameters in shapes.items()
        }

    def read(self, key: str) -> Name | None:
        """What the key says; None when it names no layer of the served modules or no part of an update."""
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        wanted = match["layer"].replace("base_model.model.", "", 1).replace(".", "_")
        wanted = wanted.removesuffix("_scale")  # BFL's name for a norm's weight
        for component, known in self._layers.items():
            for prefix in _PREFIXES[component]:
                start = f"{prefix}_" if prefix else ""
                if wanted.startswith(start) and wanted[len(start) :] in known:
                    return Name(component, prefix, known[wanted[len(start) :]], match["suffix"])
        return None
