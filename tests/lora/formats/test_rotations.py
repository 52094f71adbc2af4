"""OFT and BOFT: by hand in float64 with whole matrices, and by the forward pass of the trainers that are libraries."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from peft import BOFTConfig, OFTConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.boft.layer import Linear as BoftLinear
from peft.tuners.oft.layer import Linear as OftLinear
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_lora.errors import FormatError
from flux_lora.lora.formats import read
from tests.lora.formats import helpers
from tests.lora.formats.helpers import (
    INPUTS,
    acting,
    bfl_flux,
    file_tensor,
    linears,
    randomize,
    shapes,
    small_text_encoder,
    tiny_flux,
    to_diffusers,
    write,
)

pytestmark = pytest.mark.filterwarnings(  # of PEFT, which would like to compile an extension for GPUs
    "ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor"
)

check = partial(helpers.check, float32_error=1e-5)

TO_Q, PROJ_OUT = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"


def skew(blocks: Tensor) -> Tensor:
    return blocks - blocks.transpose(-1, -2)


def cayley(q: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹, block by block."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype)
    return torch.stack([(identity + block) @ torch.linalg.inv(identity - block) for block in q])


def small(*shape: int) -> Tensor:
    return (file_tensor(*shape) / 8).bfloat16().double()


# kohya-ss/sd-scripts, networks/oft_flux.py: OFTModule.get_weight and forward


def kohya(weight: Tensor, blocks: Tensor, alpha: float) -> Tensor:
    q = skew(blocks)
    norm, bound = q.flatten().norm(), alpha * len(weight)
    q = q * ((min(norm, bound) + 1e-8) / (norm + 1e-8))
    turned: Tensor = torch.block_diag(*cayley(q)).T @ weight
    return turned


@pytest.mark.parametrize("alpha", [0.0009765625, 0.5])  # which bounds the rotation, and which does not
def test_kohya_turns_the_outputs_of_each_part_of_a_layer(alpha: float, tmp_path: Path) -> None:
    model = bfl_flux()
    base = dict(model.state_dict())
    trained, tensors = dict(base), {}
    layers = {
        "double_blocks.0.img_attn.qkv": (3072, 3072, 3072),
        "double_blocks.0.img_attn.proj": (3072,),
        "single_blocks.1.linear1": (3072, 3072, 3072, 12288),
    }
    for name, sizes in layers.items():
        key, parts = f"oft_unet_{name.replace('.', '_')}", []
        for index, (size, weight) in enumerate(zip(sizes, base[f"{name}.weight"].split(sizes), strict=True)):
            tensors[f"{key}.oft_blocks.{index}"] = blocks = small(96, size // 96, size // 96)
            parts.append(kohya(weight, blocks, alpha))
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        trained[f"{name}.weight"] = torch.cat(parts)
    path = write(tmp_path / "x.safetensors", tensors)
    adapter = check(path, to_diffusers(base), to_diffusers(trained))
    assert adapter.family == "kohya sd-scripts"
    assert "OFT" in adapter.summary
    assert not adapter.ignored


def test_kohya_without_freedom_turns_nothing(tmp_path: Path) -> None:
    base = dict(tiny_flux().state_dict())
    tensors: dict[str, Tensor | float] = {
        "oft_unet_x_embedder.oft_blocks.0": file_tensor(4, 8, 8),
        "oft_unet_x_embedder.alpha": 0.0,
    }
    check(write(tmp_path / "x.safetensors", tensors), base, base)


# KohakuBlueleaf/LyCORIS, lycoris/functional/diag_oft.py and boft.py

LYCORIS: dict[str, dict[str, Any]] = {
    "free": {"constraint": 0, "rescaled": False},
    "bound": {"constraint": 2**-6, "rescaled": False},
    "rescaled": {"constraint": 0, "rescaled": True},
}


def lycoris_skew(blocks: Tensor, bound: float) -> Tensor:
    q = skew(blocks)
    norm = q.norm() + 1e-8
    return q * bound / norm if 0 < bound < norm else q


def butterfly(weight: Tensor, q: Tensor) -> Tensor:
    """Each stage as one matrix: rows that are 2^i·b/2 apart are brought together, turned, and brought back."""
    size, block = len(weight), q.shape[-1]
    for stage, blocks in enumerate(q):
        reach = 2**stage * block // 2
        order = [
            group * 2 * reach + half * reach + place
            for group in range(size // (2 * reach))
            for place in range(reach)
            for half in (0, 1)
        ]
        together = torch.eye(size, dtype=torch.float64)[order]
        weight = together.T @ torch.block_diag(*cayley(blocks)) @ together @ weight
    return weight


@pytest.mark.parametrize("options", LYCORIS.values(), ids=LYCORIS)
@pytest.mark.parametrize("shape", [(8, 4, 4), (1, 4, 8, 8), (2, 4, 8, 8), (3, 4, 8, 8)], ids=str)
def test_lycoris(shape: tuple[int, ...], options: dict[str, Any], tmp_path: Path) -> None:
    base = dict(tiny_flux().state_dict())
    blocks, scale, weight = small(*shape), file_tensor(32, 1), base[f"{TO_Q}.weight"]
    key = f"lycoris_{TO_Q.replace('.', '_')}"
    tensors = {f"{key}.oft_blocks": blocks, f"{key}.alpha": torch.tensor(options["constraint"])}
    q = lycoris_skew(blocks, options["constraint"] * 32)
    turned = torch.block_diag(*cayley(q)).T @ weight if len(shape) == 3 else butterfly(weight, q)
    if options["rescaled"]:
        tensors[f"{key}.rescale"] = scale
        turned = scale * turned
    path = write(tmp_path / "x.safetensors", tensors)
    adapter = check(path, base, base | {f"{TO_Q}.weight": turned})
    assert ("BOFT" if len(shape) == 4 else "OFT") in adapter.summary


@pytest.mark.parametrize("kind", [DiagOFTModule, ButterflyOFTModule])
@pytest.mark.parametrize("options", LYCORIS.values(), ids=LYCORIS)
def test_lycoris_itself(kind: type, options: dict[str, Any], tmp_path: Path) -> None:
    """It computes in float32 and in no other type."""
    base = dict(tiny_flux().state_dict())
    layer = nn.Linear(32, 32)
    layer.weight.data = base[f"{TO_Q}.weight"].float()
    module = kind("x", layer, lora_dim=8, **options)
    randomize(module.parameters())
    key = f"lycoris_{TO_Q.replace('.', '_')}"
    save_file({f"{key}.{name}": tensor for name, tensor in module.state_dict().items()}, tmp_path / "x.safetensors")
    adapter = read(tmp_path / "x.safetensors", {"transformer": shapes(base)})
    with torch.no_grad():
        expected = module.get_merged_weight()[0].double()
    [update] = adapter.updates["transformer"]
    out = torch.zeros(32, 32)
    update.delta(torch.device("cpu"), lambda: layer.weight.detach()).add_rows(out, 0, 32, 1.0)
    actual = base[f"{TO_Q}.weight"] + out
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# huggingface/peft, tuners/oft/layer.py and tuners/boft/layer.py

PEFT: dict[str, Any] = {
    "series": OFTConfig(oft_block_size=4),
    "longer series": OFTConfig(oft_block_size=4, num_cayley_neumann_terms=7),
    "shorter series": OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3),
    "two terms": OFTConfig(oft_block_size=4, num_cayley_neumann_terms=2),
    "formula": OFTConfig(oft_block_size=4, use_cayley_neumann=False),
    "shared blocks": OFTConfig(oft_block_size=8, block_share=True),
    "bounded": OFTConfig(oft_block_size=4, coft=True, eps=0.1, use_cayley_neumann=False),
    "butterfly": BOFTConfig(boft_block_size=4),
}


@pytest.mark.parametrize("config", PEFT.values(), ids=PEFT)
def test_peft_itself(config: OFTConfig | BOFTConfig, tmp_path: Path) -> None:
    model = tiny_flux()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config.target_modules = {name for name in linears(model) if "time_text_embed" not in name}
    model.add_adapter(config)
    model.double()
    randomize(parameter for name, parameter in model.named_parameters() if "oft_" in name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_R" in name:
                parameter.mul_(0.125)
    tensors = {f"transformer.{key}": tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    trained = dict(base)
    for name, layer in model.named_modules():
        if isinstance(layer, OftLinear | BoftLinear):
            weight, bias = acting(layer, layer.in_features)
            trained |= {f"{name}.weight": weight} | ({f"{name}.bias": bias} if f"{name}.bias" in base else {})
    save_file(tensors, tmp_path / "x.safetensors", metadata_of(model))
    adapter = check(tmp_path / "x.safetensors", base, trained)
    assert not adapter.ignored


def metadata_of(model: nn.Module) -> dict[str, str]:
    """As diffusers' pipelines write it beside LoRAs."""
    [settings] = _collate_lora_metadata({"transformer": model}).values()
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}


def test_peft_alone_writes_no_settings_and_means_its_default(tmp_path: Path) -> None:
    wrapped = get_peft_model(tiny_flux(), OFTConfig(oft_block_size=8, target_modules=["to_q"]), adapter_name="mine")
    wrapped.double()
    model = wrapped.base_model.model
    base = {name.replace(".base_layer", ""): tensor.clone() for name, tensor in model.state_dict().items()}
    base = {name: tensor for name, tensor in base.items() if "oft_" not in name}
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(small(*parameter.shape))
    wrapped.save_pretrained(tmp_path)
    trained = dict(base)
    for name, layer in model.named_modules():
        if isinstance(layer, OftLinear):
            trained[f"{name}.weight"] = acting(layer, layer.in_features)[0]
    check(tmp_path / "mine" / "adapter_model.safetensors", base, trained)


def neumann(q: Tensor, factors: tuple[float, ...]) -> Tensor:
    terms = (factor * torch.linalg.matrix_power(q, power) for power, factor in enumerate(factors))
    return sum(terms, start=torch.zeros_like(q))


def skew_of(vectors: Tensor, block: int) -> Tensor:
    q = torch.zeros(len(vectors), block, block, dtype=torch.float64)
    for row in range(block):
        for column in range(row + 1, block):
            index = sum(block - 1 - above for above in range(row)) + column - row - 1
            q[:, row, column], q[:, column, row] = vectors[:, index], -vectors[:, index]
    return q


def test_before_peft_0_18_the_last_term_counted_twice(tmp_path: Path) -> None:
    base = dict(tiny_flux().state_dict())
    vectors = small(4, 28)
    settings = '{"transformer.peft_type": "OFT", "transformer.use_cayley_neumann": true}'
    tensors = {f"transformer.{TO_Q}.oft_R.weight": vectors}
    rotation = torch.block_diag(*neumann(skew_of(vectors, 8), (1, 2, 2, 2, 2)))
    path = write(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": settings})
    check(path, base, base | {f"{TO_Q}.weight": base[f"{TO_Q}.weight"] @ rotation.T})


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_peft_butterfly_of_several_stages(stages: int, tmp_path: Path) -> None:
    """PEFT itself computes more than one on a GPU only; its permutations are its own here."""
    base = dict(tiny_flux().state_dict())
    block, columns = 4, 32
    blocks, scale = small(stages, columns // block, block, block), file_tensor(32, 1)
    layer = BoftLinear(nn.Linear(columns, 32), "default", BOFTConfig(boft_block_size=block))
    rotation = torch.eye(columns, dtype=torch.float64)
    for stage in range(stages):
        order = layer.block_butterfly_perm(columns, columns // block // 2**stage, block // 2, stages - 1)
        permutation = layer.perm2mat(order).double()
        turned = torch.block_diag(*cayley(-skew(blocks[stage]) / 2))
        rotation = permutation @ turned @ permutation.T @ rotation
    tensors = {f"base_model.model.{TO_Q}.boft_R": blocks, f"base_model.model.{TO_Q}.boft_s": scale}
    tensors[f"base_model.model.{TO_Q}.boft_P"] = torch.eye(columns)
    path = write(tmp_path / "x.safetensors", tensors)
    check(path, base, base | {f"{TO_Q}.weight": scale * (base[f"{TO_Q}.weight"] @ rotation.T)})


# Nerogar/OneTrainer, modules/module/oft_utils.py: OFTRotationModule.forward


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layer", [TO_Q, PROJ_OUT])
def test_onetrainer_turns_the_inputs(layer: str, shared: bool, scaled: bool, tmp_path: Path) -> None:
    base = dict(tiny_flux().state_dict())
    weight, block = base[f"{layer}.weight"], 16
    count = weight.shape[1] // block
    vectors = small(1 if shared else count, block * (block - 1) // 2)
    key = f"lora_transformer_{layer.replace('.', '_')}.oft_R"
    tensors: dict[str, Any] = {f"{key}.weight": vectors}
    if scaled:
        tensors[f"{key}.scaled_oft"] = True
    q = skew_of(vectors / (2 * math.sqrt(block - 1)) if scaled else vectors, block)
    rotation = torch.block_diag(*neumann(q, (1, 2, 2, 2, 1)).repeat(count if shared else 1, 1, 1))
    path = write(tmp_path / "x.safetensors", tensors)
    adapter = check(path, base, base | {f"{layer}.weight": weight @ rotation.T})
    assert adapter.family == "OneTrainer"


def test_onetrainer_saves_whether_it_scaled_as_a_boolean(tmp_path: Path) -> None:
    tensors = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.oft_R.weight": torch.randn(2, 28)}
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.oft_R.scaled_oft"] = torch.tensor(True)
    save_file(tensors, tmp_path / "x.safetensors")
    served = shapes(small_text_encoder("text_encoder").state_dict())
    assert len(read(tmp_path / "x.safetensors", {"text_encoder": served}).updates["text_encoder"]) == 1


def test_inputs_of_a_fused_layer_and_of_the_swapped_halves(tmp_path: Path) -> None:
    base = dict(bfl_flux().state_dict())
    trained, tensors = dict(base), {}
    for name in ("double_blocks.0.txt_attn.qkv", "final_layer.adaLN_modulation.1"):
        tensors[f"diffusion_model.{name}.oft_R.weight"] = vectors = small(2, 1)
        rotation = torch.block_diag(*neumann(skew_of(vectors, INPUTS // 2), (1, 2, 2, 2, 1)))
        trained[f"{name}.weight"] = base[f"{name}.weight"] @ rotation.T
    check(write(tmp_path / "x.safetensors", tensors), to_diffusers(base), to_diffusers(trained))


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("oft_R.weight", (4, 4)),
        ("oft_R.weight", (3, 28)),
        ("oft_R.weight", (32,)),
        ("oft_blocks.0", (4, 8, 7)),
        ("oft_blocks.0", (3, 8, 8)),
        ("oft_blocks", (8, 8)),
        ("oft_blocks", (2, 3, 8, 8)),
        ("oft_blocks", (4, 4, 8, 8)),
        ("boft_R", (4, 8, 8)),
        ("boft_R", (1, 4, 7, 8)),
    ],
)
def test_blocks_that_do_not_fit_are_refused(part: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {f"transformer.{TO_Q}.{part}": torch.randn(shape)})
    with pytest.raises(FormatError, match=part):
        read(path, {"transformer": shapes(tiny_flux().state_dict())})
