"""What trainers call the layers of FLUX.1, and where the rows of each lie in the served modules.

Served names are those of diffusers' FluxTransformer2DModel and of transformers' CLIPTextModel and T5EncoderModel. Black
Forest Labs' names (github.com/black-forest-labs/flux, src/flux/model.py) fuse some of those layers; x-flux names the
adapters rather than the layers. All sizes and block counts come from the served modules' shapes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from flux_lora.lora.deltas import Rows

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Component → parameter → shape. Components: transformer, text_encoder (CLIP), text_encoder_2 (T5)."""

HF, BFL, XLABS = "diffusers", "BFL", "XLabs"


@dataclass(frozen=True)
class Layer:
    """One layer as a layout knows it.

    Args:
        name: the layer's name in that layout.
        layout: HF, BFL or XLABS.
        shape: of its weight: (out, in), (rows, columns) of a table, or (size,) for a norm.
        weight: where the rows of its weight lie, in the layout's order.
        bias: where those of its bias lie; empty for a layer without one.
    """

    name: str
    layout: str
    shape: tuple[int, ...]
    weight: tuple[Rows, ...]
    bias: tuple[Rows, ...]


_STEM = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
# src/flux/modules/layers.py of github.com/XLabs-AI/x-flux: 1 is the image stream, 2 the text stream; in single blocks
# the first adapter reaches the queries, keys and values in linear1 and leaves its MLP rows alone.
_XLABS_DOUBLE = {
    "processor.qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor.qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "processor.proj_lora1": ("attn.to_out.0",),
    "processor.proj_lora2": ("attn.to_add_out",),
}
_XLABS_SINGLE = {
    "processor.qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor.proj_lora": ("proj_out",),
}

# diffusers' fuse_qkv_projections (models/transformers/transformer_flux.py), where SimpleTuner can train.
_FUSED_DOUBLE = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_FUSED_SINGLE = {"attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v")}


def layers(component: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Layer]:
    """Every linear layer, norm and table of one component, in every layout that has it."""
    names = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    yield from (_layer(name, HF, (name,), shapes) for name in names)
    if component == "text_encoder_2" and "shared" in names:  # T5's own second name for its table
        yield _layer("encoder.embed_tokens", HF, ("shared",), shapes)
    if component == "text_encoder":  # transformers before 5 had one level more, and trainers' files still have it
        yield from (_layer(f"text_model.{name}", HF, (name,), shapes) for name in names if "text_model" not in name)
    if component == "transformer":
        yield from _fused_layers(shapes)


def _fused_layers(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Layer]:
    groups = (
        (BFL, "", "", _STEM),
        (BFL, "double_blocks.{}.", "transformer_blocks.{}.", _DOUBLE),
        (BFL, "single_blocks.{}.", "single_transformer_blocks.{}.", _SINGLE),
        (HF, "transformer_blocks.{}.", "transformer_blocks.{}.", _FUSED_DOUBLE),
        (HF, "single_transformer_blocks.{}.", "single_transformer_blocks.{}.", _FUSED_SINGLE),
        (XLABS, "double_blocks.{}.", "transformer_blocks.{}.", _XLABS_DOUBLE),
        (XLABS, "single_blocks.{}.", "single_transformer_blocks.{}.", _XLABS_SINGLE),
    )
    for layout, theirs, ours, table in groups:
        for index in count() if theirs else (0,):
            if theirs and f"{ours.format(index)}attn.to_q.weight" not in shapes:
                break
            for name, parts in table.items():
                served = [f"{ours.format(index)}{part}" for part in parts]
                if all(f"{part}.weight" in shapes for part in served):
                    yield _layer(f"{theirs.format(index)}{name}", layout, served, shapes)
    if "norm_out.linear.weight" in shapes:
        yield _swapped_halves(_layer("final_layer.adaLN_modulation.1", BFL, ["norm_out.linear"], shapes))


def _layer(name: str, layout: str, parts: tuple[str, ...] | list[str], shapes: Mapping[str, tuple[int, ...]]) -> Layer:
    weights = [f"{part}.weight" for part in parts]
    biases = [f"{part}.bias" for part in parts if f"{part}.bias" in shapes]
    rows = sum(shapes[weight][0] for weight in weights)
    return Layer(
        name,
        layout,
        (rows, *shapes[weights[0]][1:]),
        tuple(Rows(weight, 0, shapes[weight][0]) for weight in weights),
        tuple(Rows(bias, 0, shapes[bias][0]) for bias in biases),
    )


def _swapped_halves(layer: Layer) -> Layer:
    """BFL's last modulation gives shift before scale, diffusers' scale before shift."""
    half = layer.shape[0] // 2

    def swapped(rows: tuple[Rows, ...]) -> tuple[Rows, ...]:
        return tuple(Rows(r.parameter, start, start + half) for r in rows for start in (half, 0))

    return Layer(layer.name, layer.layout, layer.shape, swapped(layer.weight), swapped(layer.bias))
