"""The choice of the attention kernel: measured once, kept, and never a kernel that computes something else."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

from flux_lora import attention
from flux_lora.attention import Shape, choose, seconds, set_fastest
from tests.conftest import MINI

CPU = torch.device("cpu")
SHAPE = Shape(tokens=64, heads=2, width=32, dtype="float32")
TIMES = {"native": 3.0, "_native_cudnn": None, "_native_flash": 2.0, "flash": 2.5}


def test_the_fastest_usable_one_is_measured_once_and_kept(tmp_path: Path) -> None:
    folder, measured = tmp_path / "cache", []

    def measure(name: str, *_: object) -> float | None:
        measured.append(name)
        return TIMES[name]

    assert choose(tuple(TIMES), SHAPE, CPU, folder, measure) == ("_native_flash", True)
    assert measured == list(TIMES)
    assert choose(tuple(TIMES), SHAPE, CPU, folder, measure) == ("_native_flash", False)
    assert choose(tuple(TIMES), Shape(65, 2, 32, "float32"), CPU, folder, measure)[1]
    assert choose(("native", "flash"), SHAPE, CPU, folder, measure) == ("flash", True)


@pytest.mark.parametrize("content", ["", "{", '{"kernel": "not a candidate"}', "[]"])
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: str) -> None:
    choose(tuple(TIMES), SHAPE, CPU, tmp_path, lambda name, *_: TIMES[name])
    (file,) = tmp_path.glob("attention-*.json")
    file.write_text(content)
    assert choose(tuple(TIMES), SHAPE, CPU, tmp_path, lambda name, *_: TIMES[name]) == ("_native_flash", True)
    assert json.loads(file.read_text())["kernel"] == "_native_flash"


def test_another_version_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(tuple(TIMES), SHAPE, CPU, tmp_path, lambda name, *_: TIMES[name])
    monkeypatch.setattr(attention, "version", lambda _: "0.0")
    assert choose(tuple(TIMES), SHAPE, CPU, tmp_path, lambda name, *_: TIMES[name])[1]


def test_without_a_place_to_keep_it_the_choice_is_still_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    assert choose(tuple(TIMES), SHAPE, CPU, folder, lambda name, *_: TIMES[name]) == ("_native_flash", True)


def test_when_nothing_can_be_used_pytorch_chooses(tmp_path: Path) -> None:
    assert choose(("flash", "_flash_3"), SHAPE, CPU, tmp_path, lambda *_: None) == ("native", True)


def test_kernels_are_timed_where_they_run() -> None:
    timed = {name: seconds(name, SHAPE, CPU, rounds=2) for name in ("native", "_native_math", "flash", "_flash_3")}
    assert timed["native"] > 0
    assert timed["_native_math"] > 0
    assert timed["flash"] is timed["_flash_3"] is None  # not installed here


def test_a_kernel_that_computes_something_else_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Registry._backends, "_native_math", lambda **inputs: inputs["value"])
    assert seconds("_native_math", SHAPE, CPU, rounds=1) is None


def test_a_kernel_that_cannot_be_compiled_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Registry._backends["_native_math"]
    monkeypatch.setitem(Registry._backends, "_native_math", torch.compiler.disable(plain))
    assert seconds("_native_math", SHAPE, CPU, rounds=1) is None


def test_every_candidate_is_a_name_of_diffusers() -> None:
    for names in (*attention.EXACT.values(), *attention.QUANTIZED.values()):
        assert {str(backend.value) for backend in Registry.list_backends()} >= set(names)


def test_transformers_use_it_and_other_models_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.EXACT, "cpu", ("_native_math",))
    transformer = FluxTransformer2DModel.from_pretrained(MINI / "dev/transformer")
    assert set_fastest([transformer], 64, torch.device("cpu"), exact=True, folder=tmp_path) == ("_native_math", False)
    used = {processor._attention_backend.value for processor in transformer.attn_processors.values()}
    assert used == {"_native_math"}
    assert Registry.get_active_backend()[0].value == "native"
