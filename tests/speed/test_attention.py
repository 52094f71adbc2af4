"""The attention kernel: never one that computes something else."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

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
