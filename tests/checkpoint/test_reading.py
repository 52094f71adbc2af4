"""Reading weights into their places, against safetensors' own reader."""

import math
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_lora.checkpoint import reading
from flux_lora.checkpoint.reading import fill, stored_tensors
from flux_lora.errors import WeightsError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of tensors of all kinds: larger than a chunk, empty, without dimensions, and of several types."""
    torch.manual_seed(0)
    paths = []
    for index, dtype in enumerate((torch.bfloat16, torch.float32)):
        tensors = {
            "large": torch.randn(700, 301).to(dtype),
            "vector": torch.randn(13).to(dtype),
            "number": torch.randn(()).to(dtype),
            "empty": torch.empty(0, 4, dtype=dtype),
            "half": torch.randn(5, 5).half(),
        }
        paths.append(tmp_path / f"{index}.safetensors")
        save_file(tensors, paths[-1])
    return paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [64, 4096, reading.CHUNK_BYTES])
def test_what_is_read_is_what_safetensors_reads(
    files: list[Path], dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", chunk)
    stored = {(file, name): tensor for file in files for name, tensor in stored_tensors(file)}
    targets = {key: torch.full(tensor.shape, torch.nan, dtype=dtype) for key, tensor in stored.items()}
    fill((stored[key], targets[key]) for key in stored)
    for (file, name), target in targets.items():
        assert torch.equal(target, load_file(file)[name].to(dtype)), name


def test_each_file_has_its_turn(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Noted(FileIO):
        def readinto(self, buffer: Any) -> int:
            order.append(str(self.name))
            return super().readinto(buffer)

    monkeypatch.setattr(reading, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(reading, "READERS", 1)
    monkeypatch.setattr(reading, "FileIO", Noted)
    tensors = [(t, torch.empty(t.shape)) for file in files for _, t in stored_tensors(file)]
    fill(tensors)
    assert len(set(order[:2])) == 2
    assert len(order) == sum(math.ceil(math.prod(t.shape) * t.dtype.itemsize / 4096) for t, _ in tensors)


def test_a_file_that_became_shorter_is_named(files: list[Path]) -> None:
    tensors = [(t, torch.empty(t.shape)) for _, t in stored_tensors(files[0])]
    files[0].write_bytes(files[0].read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"0\.safetensors cannot be read: it has become shorter"):
        fill(tensors)


def test_a_file_that_is_gone_is_named(files: list[Path]) -> None:
    tensors = [(t, torch.empty(t.shape)) for _, t in stored_tensors(files[0])]
    files[0].unlink()
    with pytest.raises(WeightsError, match=r"0\.safetensors cannot be read: No such file"):
        fill(tensors)


def test_the_bar_counts_bytes(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    tensors = [(t, torch.empty(t.shape)) for file in files for _, t in stored_tensors(file)]
    fill(tensors, title="loading these")
    assert "loading these" in capsys.readouterr().err
