"""Any rank, alpha, type, order of keys and choice of layers means the same as the formula in float64."""

import json
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from flux_lora.lora.formats import read
from tests.lora.formats.helpers import linears, merged, shapes, tiny_flux
from tests.lora.formats.test_spellings import IN_DIFFUSERS_LAYOUT

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
LAYERS = linears(tiny_flux())
BASE = dict(tiny_flux().state_dict())


def write(path: Path, tensors: list[tuple[str, Tensor]], dtype: str) -> None:
    """A safetensors file whose keys and data have this order; the library's own writer sorts them."""
    header, data = {}, b""
    for key, tensor in tensors:
        own = tensor.to(DTYPES[dtype]).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(own)]}
        data += own
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa", "LoKr", "DoRA"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_formula(algorithm: str, data: st.DataObject, tmp_path: Path) -> None:
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    spelling = data.draw(st.sampled_from(list(IN_DIFFUSERS_LAYOUT.values())))
    alpha = data.draw(st.sampled_from([None, 0.5, 1.0, 4.0, -2.0, 16.0]))  # which every type holds
    scale = data.draw(st.floats(-2, 2))
    names = data.draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6, unique=True))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))

    def stored(*shape: int) -> Tensor:
        return torch.randn(shape).to(DTYPES[dtype]).double()

    tensors: list[tuple[str, Tensor]] = []
    expected = dict(BASE)
    for name in names:
        rows, columns = BASE[f"{name}.weight"].shape
        rank = data.draw(st.integers(1, 5))
        parts, change = {
            "LoRA": low_rank,
            "DoRA": low_rank,
            "LoHa": hadamard,
            "LoKr": kronecker,
        }[algorithm](stored, rows, columns, rank)
        if alpha is not None:
            parts["alpha"] = torch.tensor(alpha, dtype=torch.float64)
            change = change * (alpha / rank)
        weight = BASE[f"{name}.weight"]
        if algorithm == "DoRA":
            parts["dora_scale"] = stored(rows, 1).abs()
            moved = weight + change
            change = parts["dora_scale"] * moved / moved.norm(dim=1, keepdim=True) - weight
        expected[f"{name}.weight"] = weight + scale * change
        ends = {"down": spelling.down, "up": spelling.up}
        tensors += [(spelling.key(name, ends.get(part, part)), tensor) for part, tensor in parts.items()]

    path = tmp_path / "x.safetensors"
    write(path, data.draw(st.permutations(tensors)), dtype)
    adapter = read(path, {"transformer": shapes(BASE)})
    actual = merged(BASE, adapter, scale, torch.float32, "transformer")
    for name, weight in expected.items():
        assert (actual[name] - weight).abs().max() <= 2e-5 * (weight.abs().max() + BASE[name].abs().max()), name


def low_rank(stored: Callable[..., Tensor], rows: int, columns: int, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    parts = {"down": stored(rank, columns), "up": stored(rows, rank)}
    return parts, parts["up"] @ parts["down"]


def hadamard(stored: Callable[..., Tensor], rows: int, columns: int, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    parts = {
        f"hada_w{i}_{end}": stored(*shape)
        for i in (1, 2)
        for end, shape in (("a", (rows, rank)), ("b", (rank, columns)))
    }
    return parts, (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])


def kronecker(stored: Callable[..., Tensor], rows: int, columns: int, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    parts = {"lokr_w1": stored(4, 2), "lokr_w2_a": stored(rows // 4, rank), "lokr_w2_b": stored(rank, columns // 2)}
    return parts, torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
