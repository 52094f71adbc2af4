"""The attention kernel: never one that computes something else."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from flux_lora.speed import attention
from flux_lora.speed.attention import Shape, set_fastest, time_kernel
from tests.conftest import MINI

CPU = torch.device("cpu")
BACKENDS = Registry._backends  # noqa: SLF001 - diffusers lets nobody exchange one
SHAPE = Shape(tokens=64, heads=2, width=32, dtype="float32")


def test_kernels_are_timed_where_they_run() -> None:
    timed = {name: time_kernel(name, SHAPE, CPU, rounds=2) for name in ("native", "_native_math", "flash", "_flash_3")}
    for name in ("native", "_native_math"):
        seconds = timed[name]
        assert seconds is not None
        assert seconds > 0
    assert timed["flash"] is timed["_flash_3"] is None  # not installed here


def test_a_kernel_that_computes_something_else_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "_native_math", lambda **inputs: inputs["value"])
    assert time_kernel("_native_math", SHAPE, CPU, rounds=1) is None


def test_a_kernel_that_cannot_be_compiled_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = BACKENDS["_native_math"]
    monkeypatch.setitem(BACKENDS, "_native_math", torch.compiler.disable(plain))
    assert time_kernel("_native_math", SHAPE, CPU, rounds=1) is None


@pytest.mark.parametrize("version", ["out", "out and more"])
def test_flash_attention_4_is_its_packages_where_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """With a package that computes the same on a CPU: its own needs a GPU."""
    assert time_kernel(attention.FLASH_4, SHAPE, CPU, rounds=1) is None  # not installed here
    calls: list[int] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Any:
        calls.append(1)
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return out if version == "out" else (out, None)

    packages = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.cute")}
    packages["flash_attn.cute"].flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    for known in (Registry._backends, Registry._supported_arg_names):  # noqa: SLF001 - as BACKENDS
        monkeypatch.setitem(known, attention.FLASH_4, known[attention.FLASH_4])
    assert time_kernel(attention.FLASH_4, SHAPE, CPU, rounds=1) is not None
    monkeypatch.setitem(attention.EXACT, "cpu", (attention.FLASH_4,))
    transformer = FluxTransformer2DModel.from_pretrained(MINI / "dev/transformer")
    named: dict[str, Any] = {
        "hidden_states": torch.randn(1, 4, transformer.config.in_channels),
        "encoder_hidden_states": torch.randn(1, 2, transformer.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, transformer.config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(2, 3),
    }
    with torch.no_grad():
        expected = transformer(**named).sample
        assert set_fastest([transformer], 64, CPU, exact=True, folder=tmp_path) == (attention.FLASH_4, False)
        del calls[:]
        torch.testing.assert_close(transformer(**named).sample, expected)
    assert len(calls) == len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)


def test_every_candidate_is_a_name_of_diffusers() -> None:
    for names in (*attention.EXACT.values(), *attention.QUANTIZED.values()):
        assert {str(backend.value) for backend in Registry.list_backends()} >= set(names)


def test_transformers_use_it_and_other_models_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.EXACT, "cpu", ("_native_math",))
    transformer = FluxTransformer2DModel.from_pretrained(MINI / "dev/transformer")
    assert set_fastest([transformer], 64, torch.device("cpu"), exact=True, folder=tmp_path) == ("_native_math", False)
    processors = transformer.attn_processors.values()
    used = {processor._attention_backend.value for processor in processors}  # noqa: SLF001 - diffusers shows it nowhere
    assert used == {"_native_math"}
    assert Registry.get_active_backend()[0].value == "native"
