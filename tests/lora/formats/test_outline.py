"""What the header alone tells is refused before any tensor is read, and what is read is judged in pieces."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flux_lora.errors import FormatError
from flux_lora.lora.formats import contents, read

LAYER = "transformer.transformer_blocks.0.attn.to_q"
SHAPES = {"transformer": {f"{LAYER.removeprefix('transformer.')}.weight": (64, 48)}}
DOWN, UP, ALPHA = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", f"{LAYER}.alpha"


def sparse(path: Path, **tensors: tuple[str, list[int], int]) -> Path:
    """A file of zeros that takes no room on the disk: name -> type, shape, bytes."""
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


BIG = 200_000_000
WRONG = {
    "a float8 factor": ({DOWN: ("F8_E4M3", [1, BIG], BIG), UP: ("F32", [64, 1], 256)}, r"has shape \[1, 200000000\]"),
    "a float factor": ({DOWN: ("F32", [1, BIG // 4], BIG), UP: ("F32", [64, 1], 256)}, r"where FLUX.1 needs \[1, 48\]"),
    "a rank of the file's size": (
        {DOWN: ("F8_E4M3", [100_000, 48], 4_800_000), UP: ("F8_E4M3", [64, 100_000], 6_400_000)},
        r"lora_A.weight' has rank 100,000, where .* has shape \[64, 48\] and so at most rank 48",
    ),
    "a rank above the layer's": ({DOWN: ("F32", [49, 48], 9408), UP: ("F32", [64, 49], 12544)}, "has rank 49, .* 48"),
    "a LoHa of such a rank": (
        {
            f"{LAYER}.hada_w{n}_{part}": ("F32", shape, shape[0] * shape[1] * 4)
            for n in (1, 2)
            for part, shape in (("a", [64, 49]), ("b", [49, 48]))
        },
        "has rank 49, .* at most rank 48",
    ),
    "a long alpha": (
        {DOWN: ("F32", [1, 48], 192), UP: ("F32", [64, 1], 256), ALPHA: ("F32", [BIG // 4], BIG)},
        "alpha' has shape .* and must be one number",
    ),
    "OFT's blocks": ({f"{LAYER}.oft_blocks": ("F8_E4M3", [1, BIG], BIG)}, r"has shape .* too large for .* \[64, 48\]"),
    "a factor alone": ({DOWN: ("F8_E4M3", [1, BIG], BIG)}, "is there without its lora_B"),
    "endless shapes of nothing": (
        {DOWN: ("F32", [0, 2**62, 2**62], 0), UP: ("F32", [64, 0], 0)},
        "which no layer of FLUX.1 has",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_shapes_are_refused_before_a_tensor_is_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, reason = WRONG[case]
    path = sparse(tmp_path / "x.safetensors", **tensors)
    opened: list[Path] = []

    def look(*args: Any, **more: Any) -> Any:
        opened.append(path)
        return safe_open(*args, **more)

    monkeypatch.setattr(contents, "safe_open", look)
    with pytest.raises(FormatError, match=reason):
        read(path, SHAPES)
    assert opened == []


def test_a_pattern_longer_than_any_name_is_refused_at_once(tmp_path: Path) -> None:
    settings = {"lora_adapter_metadata": json.dumps({"alpha_pattern": {"a" * 1_000_000 + ".*": 1}})}
    save_file({DOWN: torch.ones(1, 48), UP: torch.ones(64, 1)}, tmp_path / "x.safetensors", settings)
    started = time.process_time()
    with pytest.raises(FormatError, match="its alpha pattern 'aaa.* is not a layer's name"):
        read(tmp_path / "x.safetensors", SHAPES)
    assert time.process_time() - started < 1


def test_the_highest_rank_is_taken(tmp_path: Path) -> None:
    save_file({DOWN: torch.ones(48, 48), UP: torch.ones(64, 48)}, tmp_path / "x.safetensors")
    assert read(tmp_path / "x.safetensors", SHAPES).nbytes == (48 + 64) * 48 * 4


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 40, 99])
def test_one_number_that_is_none_is_found_in_any_piece(
    place: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "PIECE", 33)
    shapes = {"transformer": {f"{LAYER.removeprefix('transformer.')}.weight": (10, 10)}}
    values = torch.ones(100)
    save_file({f"{LAYER}.diff": values.view(10, 10).to(dtype)}, tmp_path / "good.safetensors")
    read(tmp_path / "good.safetensors", shapes)
    values[place] = torch.nan
    save_file({f"{LAYER}.diff": values.view(10, 10).to(dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="diff' holds NaN"):
        read(tmp_path / "x.safetensors", shapes)


def test_judging_takes_no_second_copy(tmp_path: Path) -> None:
    file = sparse(tmp_path / "x.safetensors", **{f"{LAYER}.diff": ("F8_E4M3", [2**12, 2**13], 2**25)})
    shapes = {"transformer": {f"{LAYER.removeprefix('transformer.')}.weight": (2**12, 2**13)}}
    peak = largest_allocation(lambda: read(file, shapes))
    assert 0 < peak < 2**25


def largest_allocation(work: Callable[[], object]) -> int:
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return max(int(abs(event.self_cpu_memory_usage // max(event.count, 1))) for event in profile.key_averages())
