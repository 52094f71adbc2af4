"""Query, key and value by one product: the same numbers, in the same memory, under every plan and after every merge."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flux_lora.assembly import assemble
from flux_lora.device.libraries import diffusers
from flux_lora.generator import Step
from flux_lora.lora.formats import Adapter
from flux_lora.lora.library import AdapterLibrary
from flux_lora.lora.merge import MergedModule
from flux_lora.request import Request
from flux_lora.settings import Settings
from flux_lora.speed import projections
from flux_lora.speed.compilation import graphs
from flux_lora.speed.projections import TRIPLES, Fused, fuse, in_order, joined, separate
from flux_lora.speed.quantization import QuantizedLinear, Scheme, prepare
from tests.memory.helpers import tiny

PLANS = ("resident", "alternating", "streamed")


def transformer(**changes: int) -> Any:
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 32}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    return diffusers.FluxTransformer2DModel(**sizes | changes, axes_dims_rope=(8, 12, 12)).eval().requires_grad_(False)


@torch.no_grad()
def output(network: Any) -> Tensor:
    given = torch.Generator("cpu").manual_seed(1)
    out: Tensor = network(
        hidden_states=torch.randn(1, 12, 16, generator=given),
        encoder_hidden_states=torch.randn(1, 6, 32, generator=given),
        pooled_projections=torch.randn(1, 32, generator=given),
        timestep=torch.tensor([0.5]),
        img_ids=torch.arange(36.0).view(12, 3) % 5,
        txt_ids=torch.zeros(6, 3),
    ).sample
    return out


def lora(network: Any, tmp_path: Path) -> tuple[Adapter, MergedModule]:
    from safetensors.torch import save_file

    from training.random_weights import random_lora

    save_file(random_lora(network, rank=4), tmp_path / "lora.safetensors")
    merged = MergedModule("transformer", network, {})
    library = AdapterLibrary({"transformer": merged.shapes}, 10**9)
    return library.read(tmp_path / "lora.safetensors"), merged


def quantize(network: Any, scheme: Scheme) -> dict[str, Tensor]:
    """Quantize a network's blocks; returns the weights that they had, by name."""
    base = dict(network.state_dict())
    layers = prepare(network, scheme)
    for name, layer in layers.items():
        layer.move(torch.device("cpu"))
        layer.write_rows(0, len(base[name]), base[name])
    return {name: base[name] for name in layers}


def test_it_computes_what_the_three_compute_and_takes_no_memory_of_its_own() -> None:
    network = transformer()
    expected = output(network)
    fuse(network)
    assert torch.allclose(output(network), expected, atol=1e-6)
    attentions = [module for module in network.modules() if hasattr(module, "to_qkv")]
    assert len(attentions) == 3
    for attention in attentions:
        for whole, parts in TRIPLES.items():
            if hasattr(attention, whole):
                for kind in ("weight", "bias"):
                    for rows, part in zip(getattr(getattr(attention, whole), kind).chunk(3), parts, strict=True):
                        assert rows.data_ptr() == getattr(getattr(attention, part), kind).data_ptr()
    separate(network)
    assert torch.equal(output(network), expected)
    assert not any(isinstance(module, Fused) for module in network.modules())


def test_what_is_merged_into_the_parts_is_in_the_whole(tmp_path: Path) -> None:
    network = transformer()
    adapter, merged = lora(network, tmp_path)
    other = copy.deepcopy(network)
    before = output(network)
    fuse(network)
    assert merged.bring([(adapter, 0.7)])
    unfused = MergedModule("transformer", other, {})
    unfused.bring([(adapter, 0.7)])
    assert not torch.allclose(before, output(network), atol=1e-3)
    assert torch.allclose(output(network), output(other), atol=1e-5)
    merged.bring([])
    assert torch.allclose(output(network), before, atol=1e-6)


def test_quantized_parts_are_the_rows_of_a_quantized_whole(tmp_path: Path) -> None:
    network = transformer()
    adapter, _ = lora(network, tmp_path)
    base = quantize(network, "fp8")
    merged = MergedModule("transformer", network, {name: base[name].clone for name in base})
    fuse(network)
    wholes = [m for name, m in network.named_modules() if name.endswith("qkv")]
    assert len(wholes) == 4
    assert all(isinstance(whole, QuantizedLinear) for whole in wholes)
    before, fused = output(network), [whole.dequantized().clone() for whole in wholes]
    merged.bring([(adapter, 1.0)])
    after = output(network)
    assert all(not torch.equal(whole.dequantized(), old) for whole, old in zip(wholes, fused, strict=True))
    separate(network)
    assert torch.equal(output(network), after)  # each row has its own scale, fused or not
    assert not torch.equal(after, before)


@pytest.mark.parametrize("scheme", [None, "fp8"])
def test_leaving_and_coming_back_compiles_nothing_again(scheme: Any) -> None:
    network = transformer()
    if scheme:
        quantize(network, scheme)
    fuse(network)
    network.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    expected, before = output(network), graphs()
    for _ in range(2):
        separate(network)
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
        fuse(network)
        assert torch.equal(output(network), expected)
    assert graphs() == before


def test_neighbours_stay_where_they_are_and_others_move() -> None:
    arena = torch.arange(24.0)
    parts = [arena[index : index + 8].view(4, 2) for index in (0, 8, 16)]
    whole = joined(parts)
    assert whole.data_ptr() == arena.data_ptr()
    assert torch.equal(whole, arena.view(12, 2))
    scattered = [arena[index : index + 8].view(4, 2) for index in (16, 0, 8)]
    values = [part.clone() for part in scattered]
    whole = joined(scattered)
    assert torch.equal(whole, torch.cat(values))
    whole.zero_()
    assert not any(part.any() for part in scattered)
    assert arena.sum() == sum(range(24))


def test_parameters_that_may_be_fused_are_laid_out_behind_one_another() -> None:
    names = [name for name, _ in transformer().named_parameters()]
    ordered = in_order(names)
    assert sorted(ordered) == sorted(names)
    for parts in TRIPLES.values():
        for kind in ("weight", "bias"):
            places = [ordered.index(f"transformer_blocks.0.attn.{part}.{kind}") for part in parts]
            assert places == list(range(places[0], places[0] + 3))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("profile", ["exact", "balanced"])
def test_a_server_draws_the_same_with_it(
    plan: str, profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when dev and schnell take turns; and a plan that streams the blocks does without."""
    monkeypatch.setattr("flux_lora.speed.compilation.compile_pipelines", lambda *_, **__: None)
    monkeypatch.setitem(projections.CANDIDATES, "cpu", ("fused",))
    settings = Settings(weights=tiny(), profile=profile, memory_plan=plan, cache=tmp_path)
    generator = assemble(settings, log=lambda _: None)
    streamed = plan == "streamed"
    assert generator.parts.environments["dev"].attention == ("native" if streamed else "native, fused qkv")
    monkeypatch.setitem(projections.CANDIDATES, "cpu", ("separate",))
    plain = assemble(settings, log=lambda _: None)
    for model, scale in (("dev", 1.0), ("schnell", 0.5), ("dev", 0.0)):
        asked = {"prompt": "a cat", "seed": 3, "model": model, "lora_scale": scale, "num_inference_steps": 2}
        request = Request.parse(**asked, aspect_ratio="custom", width=256, height=256, disable_safety_checker=True)
        steps: list[Step] = []
        for server in (generator, plain):
            server.draw(request, lambda *_: None, steps.append)
        assert torch.allclose(steps[1].latents, steps[3].latents, atol=1e-4)
        network = generator.parts.pipelines[model].transformer
        fused = [module for module in network.modules() if getattr(module, "fused_projections", False)]
        blocks = len(network.transformer_blocks) + len(network.single_transformer_blocks)
        assert len(fused) == (0 if streamed else blocks)
