import resource
from pathlib import Path

import psutil
import pytest
import torch

from flux_lora.device import devices
from flux_lora.errors import SettingsError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "5000", "memory.current": "1000"}, 4000),
        ({"memory/memory.limit_in_bytes": "700", "memory/memory.usage_in_bytes": "900"}, 0),
        ({"memory.max": "max", "memory.current": "1000"}, None),
        ({}, None),
    ],
)
def test_a_container_limit_counts_as_the_machines_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: int | None
) -> None:
    (tmp_path / "memory").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    measured = devices.free_memory(CPU)
    if free is None:
        assert measured == pytest.approx(psutil.virtual_memory().available, rel=0.1)
    else:
        assert measured == free


def test_a_limited_address_space_counts_too() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28, limits[1]))
        assert 2**27 < devices.free_memory(CPU) <= 2**28 + 2**24
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("name", ["xyz", "mps", "cuda:x", "CPU"])
def test_devices_that_are_not_served_are_named(name: str) -> None:
    with pytest.raises(SettingsError, match=f"FLUX_DEVICE={name} cannot be used: take auto, cpu"):
        devices.find_device(name)


def test_auto_is_a_device_that_computes() -> None:
    assert devices.computes(devices.find_device("auto"))
