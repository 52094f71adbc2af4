"""What is measured: free memory, and the sizes of FLUX.1 as its libraries build it, without its weights."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import no_init_weights

from flux_lora.checkpoint import assembling
from flux_lora.checkpoint.assembling import Network
from flux_lora.device import devices
from flux_lora.drawing import strips
from flux_lora.memory import measure
from flux_lora.memory.measure import working_bytes
from flux_lora.memory.plans import Room
from tests.conftest import MINI
from tests.memory.helpers import DEV, FLUX, GB, SCHNELL, T5, tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def network(module: nn.Module) -> Network:
    module.to(torch.bfloat16)
    return Network(module, dict(module.named_parameters()), {}, {})


def test_the_weights_of_flux_are_as_counted_by_hand() -> None:
    t5 = transformers.T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    with init_empty_weights(), no_init_weights():
        dev, schnell = (FluxTransformer2DModel(guidance_embeds=guidance) for guidance in (True, False))
        encoder = transformers.T5EncoderModel(t5)
    encoder.tie_weights()
    assert measure.weights("transformer", network(dev)) == DEV
    assert measure.weights("transformer", network(schnell)) == SCHNELL
    assert measure.weights("text_encoder_2", network(encoder)) == T5


def test_blocks_are_in_the_order_in_which_they_compute() -> None:
    part = assembling.open_directory(MINI, torch.float32).networks["dev"]["transformer"]
    names = measure.block_names("transformer", part)
    assert list(names) == ["transformer_blocks.0", *(f"single_transformer_blocks.{index}" for index in range(5))]
    parameters = dict(part.module.named_parameters())
    assert {name for of_block in names.values() for name in of_block} == {n for n in parameters if "_blocks." in n}


def test_a_model_is_measured_without_reading_it() -> None:
    assembled = assembling.open_directory(tiny(), torch.float32)
    measured = measure.needed_sizes(assembled.networks, torch.float32)
    total = sum(p.numel() for p in assembled.pipelines["schnell"].transformer.parameters()) * 4
    assert measured.transformers["schnell"].total == total
    assert set(measured.transformers) == {"dev", "schnell"}
    assert all(p.isnan().all() for p in assembled.pipelines["dev"].transformer.parameters())
    assert measured.decode_strips < measured.decode


def identity(storage: torch.UntypedStorage) -> int:
    """What storages of the same memory have in common, on ``meta`` too, where addresses are 0."""
    return int(storage._cdata)  # noqa: SLF001 - PyTorch has no public name for it


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that live at once, beside a module's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's
        self.now = self.peak = 0
        self._known = {identity(parameter.untyped_storage()) for parameter in module.parameters()}

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and identity(storage) not in self._known:
                self._known.add(identity(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, identity(storage), storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_working_memory_is_what_a_dry_run_at_the_largest_size_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On ``meta`` nothing is computed, but every tensor has its size; attention is taken to be a fused kernel."""

    def fused(*tensors: torch.Tensor, **named: Any) -> torch.Tensor:
        return torch.empty_like(tensors[0] if tensors else named["query"])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    bf16, side = torch.bfloat16, 1440
    tokens = (side // 16) ** 2
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True, num_layers=1, num_single_layers=2).to(bf16)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
        ).to(bf16)
        inputs = {
            "hidden_states": torch.empty(1, tokens, 64, dtype=bf16),
            "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=bf16),
            "pooled_projections": torch.empty(1, 768, dtype=bf16),
            "timestep": torch.empty(1, dtype=bf16),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(tokens, 3),
            "txt_ids": torch.empty(512, 3),
        }
        latents = torch.empty(1, 16, side // 8, side // 8, dtype=bf16)
        with torch.no_grad(), Live(transformer) as denoise:
            transformer(**inputs)
        with torch.no_grad(), Live(vae) as whole:
            vae.decode(latents)
        with torch.no_grad(), Live(vae) as in_strips:
            strips.decode(vae, latents)
    measured = working_bytes(transformer.config, vae.config)
    for counted, assumed in zip((denoise, whole, in_strips), measured, strict=True):
        assert 0.9 * assumed <= counted.peak <= assumed
    assert measured == pytest.approx((FLUX.denoise, FLUX.decode, FLUX.decode_strips), rel=0.01)


def test_on_a_cpu_device_and_host_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_memory", lambda _: 20 * GB)
    free = 20 * GB - measure.HOST_RESERVE
    assert measure.available_room(CPU, None) == Room(free, free, shared=True, limited_by="measured")
    assert measure.available_room(CPU, 8 * GB) == Room(8 * GB, free, shared=True, limited_by="FLUX_MEMORY_BUDGET")
    assert measure.available_room(CPU, 80 * GB).device == free


class Card:
    """A GPU that is not there: what torch.cuda says of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: float, free: float) -> None:
        self.fraction = 1.0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * GB), int(total * GB)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 * GB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: GB)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: self.fraction)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self._cap)

    def _cap(self, fraction: float, _: torch.device) -> None:
        self.fraction = fraction


def test_on_a_gpu_the_least_of_free_memory_cap_and_budget_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, total=80, free=50)
    assert measure.available_room(CUDA, None).device == 51 * GB  # what is free, and what the allocator holds unused
    assert measure.available_room(CUDA, None).limited_by == "measured"
    card.fraction = 0.25
    assert measure.available_room(CUDA, None).device == 19 * GB  # a cap of 20, of which 1 is in use
    card.fraction = 1.0
    asked = measure.available_room(CUDA, 24 * GB)
    assert asked.device == pytest.approx(24 * GB - measure.CONTEXT_BYTES - GB, abs=100)
    assert asked.limited_by == "FLUX_MEMORY_BUDGET"
    assert card.fraction * 80 * GB == pytest.approx(24 * GB - measure.CONTEXT_BYTES)  # and the allocator keeps to it
    measure.available_room(CUDA, 60 * GB)
    assert card.fraction * 80 * GB < 24 * GB  # a cap in force is not raised


def test_a_container_limit_bounds_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, total=80, free=80)
    (tmp_path / "memory.max").write_text(str(6 * GB))
    (tmp_path / "memory.current").write_text(str(GB))
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    assert measure.available_room(CUDA, None).host == 5 * GB - measure.HOST_RESERVE
