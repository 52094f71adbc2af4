"""Which adapters are kept in memory, and when a file is read again."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux_lora.device import devices
from flux_lora.errors import FormatError
from flux_lora.lora.library import AdapterLibrary

SHAPES = {"transformer": {"x_embedder.weight": (8, 8)}}
BYTES = 2 * 8 * 4
"""Of an adapter of rank 1 in float32."""


def write(path: Path, value: float = 1.0) -> Path:
    factors = {"lora_A": torch.full((1, 8), value), "lora_B": torch.ones(8, 1)}
    save_file({f"transformer.x_embedder.{name}.weight": factor for name, factor in factors.items()}, path)
    return path


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"{index}.safetensors", float(index)) for index in range(3)]


def test_within_the_budget_each_file_is_read_once(paths: list[Path]) -> None:
    library = AdapterLibrary(SHAPES, 3 * BYTES)
    first = [library.read(path) for path in paths]
    assert [adapter.nbytes for adapter in first] == [BYTES] * 3
    assert all(library.read(path) is adapter for path, adapter in zip(paths, first, strict=True))


def test_the_least_recently_used_goes_first(paths: list[Path]) -> None:
    library = AdapterLibrary(SHAPES, 2 * BYTES)
    first = [library.read(paths[index]) for index in (0, 1)]
    library.read(paths[0])
    library.read(paths[2])  # has to take the place of 1
    assert library.read(paths[0]) is first[0]
    assert library.read(paths[1]) is not first[1]


def test_an_adapter_larger_than_the_budget_works_and_is_kept_alone(paths: list[Path]) -> None:
    library = AdapterLibrary(SHAPES, BYTES - 1)
    first = library.read(paths[0])
    assert library.read(paths[0]) is first
    assert library.read(paths[1]).digest != first.digest
    assert library.read(paths[0]) is not first


def test_a_changed_file_is_read_again_even_if_its_size_and_time_are_the_same(paths: list[Path]) -> None:
    library = AdapterLibrary(SHAPES, 3 * BYTES)
    before, status = library.read(paths[0]), paths[0].stat()
    with paths[0].open("r+b") as file:
        file.write(paths[1].read_bytes())
    while paths[0].stat().st_ctime_ns == status.st_ctime_ns:  # which advances in steps of some milliseconds
        os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (paths[0].stat().st_ino, paths[0].stat().st_size) == (status.st_ino, status.st_size)
    assert library.read(paths[0]).digest == library.read(paths[1]).digest != before.digest


@pytest.mark.parametrize("name", [None, "https://example.org/x.safetensors"])
def test_refusals_name_the_file(name: str | None, tmp_path: Path) -> None:
    library = AdapterLibrary(SHAPES, BYTES)
    path = tmp_path / "x.safetensors"
    said = name or str(path)
    with pytest.raises(FormatError) as missing:
        library.read(path, name)
    assert str(missing.value) == f"{said} cannot be read: No such file or directory."
    path.write_bytes(b"PK\x03\x04" + bytes(20))
    with pytest.raises(FormatError) as unusable:
        library.read(path, name)
    assert str(unusable.value) == (
        f"{said} cannot be applied to FLUX.1: it is a zip or PyTorch pickle, not safetensors."
    )


def container(folder: Path, free: int) -> Path:
    """A control group whose memory has so many bytes left."""
    (folder / "memory.max").write_text(str(10**12))
    (folder / "memory.current").write_text(str(10**12 - free))
    return folder


def test_without_a_budget_a_quarter_of_the_free_memory_is_taken(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "CGROUP", container(tmp_path, 4 * 2 * BYTES + 1))
    library = AdapterLibrary(SHAPES)
    container(tmp_path, 2**31)
    first = [library.read(path) for path in paths]
    assert library.read(paths[1]) is first[1]
    assert library.read(paths[0]) is not first[0]


def test_adapters_go_when_memory_becomes_short_and_what_does_not_fit_is_refused(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "CGROUP", container(tmp_path, 2**31))
    library = AdapterLibrary(SHAPES, 10**9)
    first = [library.read(path) for path in paths[:2]]
    container(tmp_path, 2**30)
    library.read(paths[2])  # which takes the others' place
    container(tmp_path, 2**31)
    assert library.read(paths[0]) is not first[0]
    container(tmp_path, 10)
    with pytest.raises(FormatError, match=r"x\.org cannot be read: it takes 0 MiB of host memory, and 0 MiB are free"):
        library.read(paths[1], "x.org")
    container(tmp_path, 2**31)
    assert library.read(paths[1]).digest == first[1].digest
