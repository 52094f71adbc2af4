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
        "oft_unet",  # sd-scripts
        "lora_transformer",  # OneTrainer's own layout
        "lycoris",  # LyCORIS, SimpleTuner, ai-toolkit's old LoKr
        "diffusion_model",  # ComfyUI, fal, ai-toolkit
        "",
    ),
    "text_encoder": ("text_encoder", "lora_te1", "lora_te", "text_encoders_clip_l_transformer"),
    "text_encoder_2": ("text_encoder_2", "lora_te2", "lora_te3", "text_encoders_t5xxl_transformer"),
}

_WRAPPER = re.compile(
    r"^model_|(?:^|(?<=_))(?:base_model_model|_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)_"
)
"""What PEFT, torch.compile, DataParallel and FSDP put around a module, anywhere in its name."""

_ADAPTER = r"(\.[^.]+)?"
"""PEFT keeps several adapters apart by names; a file may still have the name of the one that it holds."""

_PARTS = {
    "down": rf"(lora_A|lora_down){_ADAPTER}\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight|down\.weight",
    "up": rf"(lora_B|lora_up){_ADAPTER}\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight|up\.weight",
    "up_bias": rf"(lora_B|lora_up){_ADAPTER}\.bias",
    "alpha": "alpha|lora_alpha",
    "magnitude": rf"lora_magnitude_vector{_ADAPTER}(\.weight)?|magnitude",  # PEFT, and ai-toolkit's DoRA
    "dora_scale": "dora_scale",
    "diff": "diff|w_norm",
    "diff_b": "diff_b|b_norm",
    "table_down": f"lora_embedding_A{_ADAPTER}",
    "table_up": f"lora_embedding_B{_ADAPTER}",
    "whole": rf"modules_to_save{_ADAPTER}\.weight|set_weight",  # PEFT, ComfyUI
    "whole_bias": rf"modules_to_save{_ADAPTER}\.bias",
    "plain": "weight|scale",  # modules_to_save as PEFT saves them, but also what any checkpoint has; scale is BFL's
    "plain_bias": r"bias|base_layer\.bias",
    **{
        name: name
        for name in (
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
            "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
            "oft_blocks", "rescale",
        )
    },
    **{f"oft_blocks.{index}": rf"oft_blocks\.{index}" for index in range(4)},  # sd-scripts, for the parts of a layer
    "oft_R": rf"oft_R{_ADAPTER}\.weight",  # PEFT, OneTrainer
    "oft_scaled": rf"oft_R{_ADAPTER}\.scaled_oft",
    "boft_R": f"boft_R{_ADAPTER}",
    "boft_s": f"boft_s{_ADAPTER}",
    "boft_P": "boft_P",
}  # fmt: skip
_NAMES = dict(enumerate(_PARTS))
_KEY = re.compile(
    rf"(?P<stem>.+?)\.(?:{'|'.join(f'(?P<part_{index}>{_PARTS[part]})' for index, part in _NAMES.items())})"
)


@dataclass(frozen=True)
class Name:
    """What a key says.

    Args:
        component: transformer, text_encoder or text_encoder_2.
        prefix: of the layer's name, in a file of its kind.
        layer: the layer.
        stem: how the key spells the layer, with all that stands before it.
        part: which part of an update it holds.
    """

    component: str
    prefix: str
    layer: Layer
    stem: str
    part: str


class Names:
    """Reads keys for modules of the given shapes."""

    def __init__(self, shapes: Shapes) -> None:
        """Take the shapes of the served parameters, by component."""
        self._layers: Mapping[str, Mapping[str, Layer]] = {
            component: {layer.name.replace(".", "_"): layer for layer in layers(component, parameters)}
            for component, parameters in shapes.items()
        }

    def read(self, key: str) -> Name | None:
        """What the key says; None when it names no layer of the served modules or no part of an update."""
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        part = next(part for index, part in _NAMES.items() if match[f"part_{index}"] is not None)
        wanted = _WRAPPER.sub("", match["stem"].replace(".", "_"))
        wanted = wanted.rstrip("_").removesuffix("_scale")  # an early sd-scripts; BFL's name for a norm's weight
        for component, known in self._layers.items():
            for prefix in _PREFIXES[component]:
                start = f"{prefix}_" if prefix else ""
                if wanted.startswith(start) and wanted[len(start) :] in known:
                    return Name(component, prefix, known[wanted[len(start) :]], match["stem"], part)
        return None
