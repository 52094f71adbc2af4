"""FLUX.1 in two layouts, and the comparison with what a trainer's forward pass does.

The reference is the weight that the trainer's own layer acts with, in float64 on the trainer's own layout. Layers in
Black Forest Labs' layout are brought to diffusers' by diffusers' checkpoint converter, which knows none of our tables.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_lora.lora.formats import Adapter, read
from flux_lora.lora.merge import MergedModule

SCALES = (-1, 0, 0.3, 1, 2)
INPUTS = 4
"""Every layer of the BFL layout has its true number of rows, which the converter relies on, and this many columns."""

WIDTHS = {"time": 256, "vector": 768, "guidance": 256}
"""Inputs of FLUX.1's embedders."""

State = dict[str, Tensor]
Shape = tuple[int, ...]


def tiny_flux() -> FluxTransformer2DModel:
    """A small FLUX.1 in diffusers' layout, in float64."""
    return representable(
        FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    )


def small_text_encoder(component: str) -> nn.Module:
    if component == "text_encoder":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return representable(CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=99)))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return representable(T5EncoderModel(T5Config(**sizes, vocab_size=99, feed_forward_proj="gated-gelu")))


def tree(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Modules under dotted names."""
    root = nn.Module()
    for name, module in modules.items():
        *path, last = name.split(".")
        parent = root
        for step in path:
            if step not in dict(parent.named_children()):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(last, module)
    return root


def bfl_sizes(double: int, single: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of black-forest-labs/flux: src/flux/model.py and modules/layers.py."""
    sizes = {"img_in": (3072, 64), "txt_in": (3072, 4096)}
    sizes |= {f"{name}_in.in_layer": (3072, width) for name, width in WIDTHS.items()}
    sizes |= {f"{name}_in.out_layer": (3072, 3072) for name in WIDTHS}
    for block in (f"double_blocks.{i}.{stream}" for i in range(double) for stream in ("img", "txt")):
        sizes |= {f"{block}_mod.lin": (18432, 3072), f"{block}_attn.qkv": (9216, 3072)}
        sizes |= {f"{block}_attn.proj": (3072, 3072), f"{block}_mlp.0": (12288, 3072), f"{block}_mlp.2": (3072, 12288)}
    for block in (f"single_blocks.{i}" for i in range(single)):
        sizes |= {f"{block}.linear1": (21504, 3072), f"{block}.linear2": (3072, 15360)}
        sizes |= {f"{block}.modulation.lin": (9216, 3072)}
    return sizes | {"final_layer.linear": (64, 3072), "final_layer.adaLN_modulation.1": (6144, 3072)}


def bfl_flux(double: int = 1, single: int = 2) -> nn.Module:
    """The linear layers and norms of FLUX.1 in Black Forest Labs' layout, ``INPUTS`` wide."""
    attention = [f"double_blocks.{i}.{stream}_attn" for i in range(double) for stream in ("img", "txt")]
    attention += [f"single_blocks.{i}" for i in range(single)]
    norms: dict[str, nn.Module] = {
        f"{block}.norm.{which}_norm": Norm(128) for block in attention for which in ("query", "key")
    }
    linear: dict[str, nn.Module] = {
        name: nn.Linear(INPUTS, rows) for name, (rows, _) in bfl_sizes(double, single).items()
    }
    return representable(tree(linear | norms))


class Norm(nn.Module):
    """Black Forest Labs call a norm's weight ``scale``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))


def representable(module: nn.Module) -> nn.Module:
    """Random float64 weights that bfloat16 can hold, so that a bfloat16 model starts from the same numbers."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape).bfloat16().double()
    return module


def randomize(tensors: Iterable[Tensor]) -> None:
    """Numbers that every file type holds exactly enough not to matter: the file is what both sides read."""
    for tensor in tensors:
        tensor.data = torch.randn(tensor.shape).bfloat16().to(tensor.dtype)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def file_tensor(*shape: int) -> Tensor:
    """Random numbers that every file type from bfloat16 on holds, in float64 for the reference."""
    return torch.randn(shape).bfloat16().double()


def write(path: Path, tensors: Mapping[str, Tensor | float], metadata: Mapping[str, str] | None = None) -> Path:
    """A file in bfloat16, as trainers write them."""
    contents = {key: torch.as_tensor(value).bfloat16().contiguous() for key, value in tensors.items()}
    save_file(contents, path, dict(metadata or {}))
    return path


def to_diffusers(state: State) -> State:
    converted: State = convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    return converted


@torch.no_grad()
def acting(layer: nn.Module, columns: int) -> tuple[Tensor, Tensor]:
    """The weight and bias with which a linear layer acts, from its forward pass alone."""
    bias = layer(torch.zeros(1, columns, dtype=torch.float64))[0]
    return (layer(torch.eye(columns, dtype=torch.float64)) - bias).T, bias


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def merged(state: State, adapter: Adapter, scale: float, dtype: torch.dtype, component: str) -> State:
    """The state after the product's own merge."""
    names: dict[str, nn.Module] = {}
    for name, tensor in state.items():
        place, _, attribute = name.rpartition(".")
        names.setdefault(place, nn.Module()).register_parameter(attribute, nn.Parameter(tensor.to(dtype, copy=True)))
    module = tree(names)
    MergedModule(component, module, {}).bring([(adapter, scale)])
    return {name: parameter.detach().double() for name, parameter in module.named_parameters()}


def check(
    path: Path, base: State, trained: State, component: str = "transformer", float32_error: float = 0.0
) -> Adapter:
    """Merged weights are base + s · (trained - base), within one unit in the last place of the largest term.

    Where ΔW is a sum over many weights, float32 may add an error that is small against them, not against each result.
    """
    adapter = read(path, {component: shapes(base)})
    check_component(adapter, base, trained, component, float32_error)
    return adapter


def check_component(adapter: Adapter, base: State, trained: State, component: str, float32_error: float = 0.0) -> None:
    for scale in SCALES:
        actual = merged(base, adapter, scale, torch.bfloat16, component)
        for name, weight in base.items():
            change = scale * (trained[name] - weight)
            largest = torch.maximum(weight.abs(), change.abs())
            unit = torch.finfo(torch.bfloat16).eps * torch.exp2(largest.frexp().exponent - 1)
            allowed = 1.001 * unit + float32_error  # a tie, in float32
            assert ((actual[name] - weight - change).abs() <= allowed).all(), (name, scale)
            assert scale or torch.equal(actual[name], weight)
    exact = merged(base, adapter, 1, torch.float32, component)
    for name, weight in trained.items():
        largest = max(weight.abs().max(), base[name].abs().max())
        assert (exact[name] - weight).abs().max() <= 1e-5 * largest, name
