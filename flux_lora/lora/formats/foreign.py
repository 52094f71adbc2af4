"""Naming a file that is not for FLUX.1, or not an adapter, so that a refusal says what it looks like.

The names of the layers tell most models apart; sizes and metadata tell the rest.
"""

import re
from collections.abc import Collection, Mapping

from flux_lora.checkpoint.header import Header
from flux_lora.lora.formats.layouts import Shapes
from flux_lora.lora.formats.metadata import Metadata, architecture

Sizes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor of a file."""

_BY_KEY = {
    "an IP-Adapter for FLUX.1, which needs an image": r"ip_adapter|^(image_proj|ip_proj)\b|\bto_[kv]_ip\b",
    "PuLID, which needs a picture of a face": r"^pulid_(ca|encoder)",
    "EasyControl, which needs a control image": r"processor\.([qkv]|proj)_loras\.\d",
    "a ControlNet, which needs a control image": r"controlnet_|^input_hint_block",
    "a control LoRA, which needs a control image": r"^lora_controlnet$|\.reshape_weight$",
    "FLUX.1 Redux, which needs an image": r"^redux_",
    "a LoRA for SDXL": r"lora_te2_text_model|text_encoder_2\.text_model|lora_unet_(input|output|middle)_blocks?_",
    "a LoRA for Stable Diffusion 3": r"joint_blocks",
    "a LoRA for FLUX.2": r"(double|single)_stream_modulation|to_qkv_mlp_proj|ff(_context)?[._]linear_(in|out)",
    "a LoRA for Qwen-Image": r"transformer_blocks[._]\d+[._](img_mlp[._]net|txt_mlp[._]net|(img|txt)_mod[._]1)|"
                             r"(?<!single_)transformer_blocks[._]([3-5]\d)[._]attn[._]",
    "a LoRA for HunyuanVideo": r"token_refiner[._]|double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)\b|img_mod[._]linear|"
                               r"(img|txt)_mlp[._]fc[12]\b|modulation[._]linear|"
                               r"double_blocks[._]19[._]",
    "a LoRA for HiDream": r"(double|single)_stream_blocks",
    "a LoRA for Chroma": r"distilled_guidance_layer",
    "a LoRA in DiffSynth's own names": r"\bblocks\.\d+\.(norm1_[ab]\b|attn\.[ab]_to_|ff_[ab]\b)|"
                                       r"single_blocks\.\d+\.to_qkv_mlp\b",
    "a LoRA for Wan": r"(?<!transformer_)blocks[._]\d+[._](self_attn[._][qkvo](_img)?\b|cross_attn[._][qkvo]|ffn[._]|"
                      r"attn[12][._]to_)",
    "a LoRA for Z-Image or Lumina": r"(noise|context)_refiner[._]|[._]layers[._]\d+[._](attention|feed_forward)",
    "a LoRA for another transformer (PixArt, Sana, LTX-Video …)": r"transformer_blocks[._]\d+[._]attn[12][._]",
    "a LoRA in nunchaku's own format": r"transformer_blocks\.\d+\.(mlp_(context_)?fc[12]|(qkv|out)_proj(_context)?)\b",
    "a LoRA of mflux 0.x": r"transformer_blocks\.\d+\..*\.lora_[AB]$",
    "a textual inversion": r"^(clip_[lg]|t5(xxl)?|emb_params|string_to_param)$",
    "an OFT adapter of PEFT before 0.16": r"\.oft_r(\.[^.]+)?$",
    "a GLoRA adapter": r"\.[ab][12]\.weight$",
    "an (IA)³ adapter": r"\.on_input$",
    "a VeRA adapter": r"vera_lambda",
    "a whole checkpoint": r"(to_q|qkv|linear1|SelfAttention\.q|conv_in|q_proj)\.weight$",
}  # fmt: skip

_BY_SIZE = (
    (r"(to_q|qkv|linear1)\.lora_(A|down)\.", 1, {1536: "Stable Diffusion 3", 2432: "Stable Diffusion 3.5",
                                               4096: "FLUX.2", 6144: "FLUX.2"}),
    (r"linear1\.lora_(B|up)\.", 0, {27648: "FLUX.2"}),
)  # fmt: skip
"""Models with layers of FLUX.1's names and other sizes: keys, dimension of their tensors, model by its size."""

_CROSS_ATTENTION = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
"""Inputs of the cross-attention of a U-Net, by model."""

_INPUTS = {
    2: "a control LoRA for FLUX.1, which needs a control image",
    3: "a LoRA for Flex.2, or one that needs a control image",
    6: "a LoRA for FLUX.1 Fill that changes the input layer, which needs an image and a mask",
}
"""Inputs of the first layer, in multiples of FLUX.1-dev's."""

_BY_METADATA = {
    "a LoRA for Chroma": r"chroma",
    "a LoRA for FLUX.2": r"flux[ ._-]?2(?!\d)|klein",
    "a LoRA for Krea 2": r"krea[ ._-]?2(?!\d)",
    "a LoRA for Flex": r"flex[ ._-]?[12](?!\d)",
    "a LoRA for HunyuanVideo": r"hunyuan",
    "a LoRA for Stable Diffusion 3": r"(stable[ ._-]?diffusion|sd)[ ._-]?v?3(?!\d)",
    "a LoRA for Qwen-Image": r"qwen",
    "a LoRA for Lumina": r"lumina(?![a-z])",
    "a LoRA for Z-Image": r"z[ ._-]?image",
    "a LoRA for Wan": r"wan(?![a-z])",
    "a LoRA for HiDream": r"hidream",
    "a LoRA for LongCat-Image": r"longcat",
    "a LoRA for Ovis-Image": r"ovis",
    "a LoRA for Bria": r"(bria|fibo)(?![a-z])",
    "a LoRA for AuraFlow": r"aura[ ._-]?flow",
}
"""Models whose layers can have the names and sizes of FLUX.1's, where no letter stands before the name."""

_BY_METADATA_OF_ENCODERS = _BY_METADATA | {
    "a LoRA for SDXL": r"(stable[ ._-]?diffusion[ ._-]?|sd)xl",
    "a LoRA for Stable Diffusion 1": r"(stable[ ._-]?diffusion|sd)[ ._-]?v?1(?!\d)",
}
"""The same for a file without transformer layers; for others ai-toolkit once wrote ``sd_1.5``, whatever the model."""

_RELATIVES = {"Kontext": r"kontext", "Fill": r"fill", "Krea": r"krea(?![ ._-]?2(?!\d))", "schnell": r"schnell"}
"""Models with FLUX.1-dev's layers and sizes, whose LoRAs are applied."""


_ADVICE = {
    r"needs an? (image|control image|picture)": "Only text is taken here, so use a LoRA that needs no more",
    r"DiffSynth": "Train or save it with --align_to_opensource_format, which writes names that are taken",
    r"nunchaku": "Use the LoRA that it was made from: nunchaku packs it for its own quantized model",
    r"mflux": "Rename its keys so that they end in .lora_A.weight and .lora_B.weight, and ff.linear1 and ff.linear2 in "
    "them to ff.net.0.proj and ff.net.2",
    r"textual inversion": "Use the LoRA that was trained beside it, or one without new words",
    r"OFT adapter of PEFT": "PEFT itself no longer reads it, so train it again",
    r"GLoRA|\(IA\)³|VeRA": "Merge it with its trainer and extract a LoRA from the result, or train a LoRA, LoKr or OFT",
    r"whole checkpoint": "Extract a LoRA from it, which ComfyUI and sd-scripts can, or serve it as a weights directory",
    r"LoRA for (?!FLUX\.1)": "It fits that model only; use its version for FLUX.1, if there is one",
    r"FLUX\.1 Kontext": "LoRAs for Kontext are taken as far as FLUX.1-dev has the same layers; this one needs Kontext",
}
"""What to do about a file that looks like this; the first pattern that fits counts."""


def recognise(header: Header, shapes: Shapes) -> str | None:
    """What a file looks like, if not like a LoRA for modules of these shapes."""
    sizes = {key: info.shape for key, info in header.tensors.items()}
    by_key = (what for what, pattern in _BY_KEY.items() if any(re.search(pattern, key) for key in sizes))
    return (
        _by_input(sizes, shapes.get("transformer", {}).get("x_embedder.weight"))
        or _by_unet(sizes)
        or next(by_key, None)
        or _by_size(sizes)
        or of_another_model(header.metadata)
        or _of_kontext(header.metadata)
    )


def _of_kontext(metadata: Metadata) -> str | None:
    return "an adapter for FLUX.1 Kontext" if relative(metadata) == "FLUX.1 Kontext" else None


def advice(what: str) -> str | None:
    """What to do about a file that looks like this, in one sentence without its full stop."""
    return next((sentence for pattern, sentence in _ADVICE.items() if re.search(pattern, what)), None)


def of_another_model(metadata: Metadata, components: Collection[str] = ("transformer",)) -> str | None:
    """Which other model the metadata names, if its layers in these components could be taken for FLUX.1's."""
    model = architecture(metadata)
    models = _BY_METADATA if "transformer" in components else _BY_METADATA_OF_ENCODERS
    return next((what for what, pattern in models.items() if re.search(rf"(?<![a-z])({pattern})", model, re.I)), None)


def relative(metadata: Metadata) -> str | None:
    """Which sibling of FLUX.1-dev the metadata names."""
    model = f"{architecture(metadata)} {metadata.get('ss_sd_model_name', '')}"
    found = (name for name, word in _RELATIVES.items() if re.search(rf"(?<![a-z])(flux)?{word}(?![a-z])", model, re.I))
    return next((f"FLUX.1 {name}" for name in found), None)


def _by_input(sizes: Sizes, served: tuple[int, ...] | None) -> str | None:
    for key, shape in sizes.items():
        if served and len(shape) > 1 and re.search(r"(img_in|x_embedder)\.lora_(A|down)\.", key):
            return _INPUTS.get(shape[1] // served[1])
    return None


def _by_unet(sizes: Sizes) -> str | None:
    unet = [key for key in sizes if re.search(r"(down|up|mid)_blocks?[._]|(input|output)_blocks[._]", key)]
    if not unet:
        return None
    widths = {sizes[key][1] for key in unet if "attn2" in key and "to_k" in key and len(sizes[key]) > 1}
    return f"a LoRA for {next((_CROSS_ATTENTION[width] for width in widths & _CROSS_ATTENTION.keys()), 'a U-Net')}"


def _by_size(sizes: Sizes) -> str | None:
    for pattern, dimension, models in _BY_SIZE:
        found = {shape[dimension] for key, shape in sizes.items() if len(shape) > 1 and re.search(pattern, key)}
        for size in found & models.keys():
            return f"a LoRA for {models[size]}"
    return None
