"""The fused kernels against plain PyTorch and float64: on a GPU, or by Triton's interpreter."""

import itertools
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from flux_lora.speed import kernels

pytest.importorskip("triton", reason="Triton is there for Linux only")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = [torch.bfloat16, torch.float32]

WIDTHS = [1, 3, 16, 37, 48, 192, 1000, 3072]
"""Odd ones, those of the miniature, and FLUX.1's."""


def cases(every: int, *axes: Iterable[Any]) -> list[Any]:
    """All combinations, but only each ``every``-th, prime to the axes' lengths, in a quick run: each value occurs."""
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=[pytest.mark.slow] if index % every else [])
        for index, case in enumerate(itertools.product(*axes))
    ]


def noise(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(size) * 2).to(DEVICE, dtype)


def test_the_programs_run_here() -> None:
    assert kernels.launches(torch.zeros(1, device=DEVICE))


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for what a sum's order costs in float32, or one step of a coarser type where that crosses a tie."""
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6, equal_nan=True)
        return
    bits = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.int8}[actual.dtype]
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    steps = (actual.view(bits).int() - expected.view(bits).int()).abs()
    same_sign = torch.signbit(actual.float()) == torch.signbit(expected.float())
    steps = torch.where(actual.isnan() | ((actual == 0) & (expected == 0)), 0, steps)
    assert steps.max() <= 1 or not same_sign[steps > 1].any()
    assert (steps > 0).sum() <= 1 + steps.numel() // 500


def all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert one.is_contiguous()
        assert other.is_contiguous()
        close(one, other)


@pytest.mark.parametrize(
    ("dtype", "quantized", "sizes"),
    cases(3, DTYPES, [False, True], [(24, 128, 12288), (3, 64, 768), (1, 1, 5), (5, 7, 37)]),
)
def test_attention_and_gelu_are_joined(dtype: torch.dtype, quantized: bool, sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    heads, width, features = sizes
    mlp = noise(2, 3, features, dtype=dtype)
    for attention in (noise(2, 3, heads, width, dtype=dtype), noise(2, heads, 3, width, dtype=dtype).transpose(1, 2)):
        for left, right in ((attention, mlp), (attention, None), (None, mlp)):
            all_close(kernels.join(left, right, quantized), kernels.join_reference(left, right, quantized))


@pytest.mark.parametrize(
    ("dtype", "quantized", "added", "width"), cases(5, DTYPES, [False, True], [False, True], WIDTHS)
)
def test_tokens_are_normalized_and_modulated(dtype: torch.dtype, quantized: bool, added: bool, width: int) -> None:
    torch.manual_seed(width)
    both = noise(2, 3, width, dtype=dtype)
    tokens = [both[:, :2], both[:, 2:]]  # as a block's output is split
    scale, shift, gate = (list(noise(2, 6 * width, dtype=dtype).chunk(6, 1)[1:3]) for _ in range(3))
    out = [noise(2, 2, width, dtype=dtype), noise(2, 1, width, dtype=dtype)]
    arguments = (tokens, scale, shift, *((out, gate) if added else ([], [])), 1e-6, quantized)
    all_close(kernels.modulate(*arguments), kernels.modulate_reference(*arguments))


@pytest.mark.parametrize(
    ("dtype", "texts", "value", "sizes"),
    cases(7, DTYPES, [0, 1, 2], [False, True], [(24, 128), (3, 64), (1, 2), (6, 4), (2, 6)]),
)
def test_query_and_key_are_normalized_and_rotated(
    dtype: torch.dtype, texts: int, value: bool, sizes: tuple[int, int]
) -> None:
    heads, width = sizes
    torch.manual_seed(heads)
    kinds = 3 if value else 2

    def projected(tokens: int) -> list[Tensor]:
        separate = [noise(2, tokens, heads, width, dtype=dtype) for _ in range(kinds)]
        fused = noise(2, tokens, 3 * heads * width, dtype=dtype).chunk(3, dim=-1)
        return [part.unflatten(-1, (heads, width)) for part in fused[:kinds]] if texts % 2 else separate

    norms = [[noise(width, dtype=dtype) for _ in range(2)] for _ in range(2)]
    cosine, sine = noise(texts + 3, width), noise(texts + 3, width)
    arguments = (
        projected(3), projected(texts) if texts else [], norms[0], norms[1] if texts else [], cosine, sine, 1e-6,
    )  # fmt: skip
    all_close([kernels.rotate(*arguments)], [kernels.rotate_reference(*arguments)])


def test_zeros_have_a_scale() -> None:
    zeros = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16, device=DEVICE)
    for join in (kernels.join, kernels.join_reference):
        values, scales = join(zeros, None, True)
        assert torch.equal(values.float(), torch.zeros(1, 2, 48, device=DEVICE))
        assert (scales > 0).all()
        assert scales.isfinite().all()


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_spoils_its_token_and_no_other(strange: float) -> None:
    torch.manual_seed(1)
    attention, mlp = noise(1, 3, 2, 8), noise(1, 3, 24)
    attention[0, 1, 1, 3] = strange
    mlp[0, 2, 5] = strange
    for join in (kernels.join, kernels.join_reference):
        values, scales = join(attention, mlp, True)
        product = (values.float() * scales).sum(dim=2)
        assert torch.equal(product.isfinite(), torch.tensor([[True, False, False]], device=DEVICE))
    assert kernels.join(attention, mlp, False)[0][0, 0].isfinite().all()


def test_gelu_is_exact_to_float32() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])]).to(DEVICE)
    expected = F.gelu(x.double(), approximate="tanh")
    # The formula cancels in float64 too: it is 0 below −6 or so, where the function is not.
    reliable = expected.abs() > 1e-9
    for actual in (kernels.gelu(x), kernels.join(None, x[None, None], False)[0][0, 0]):
        assert ((actual - expected).abs() <= 5e-6 * expected.abs())[reliable].all()
        assert (actual.abs() <= 2e-9)[~reliable].all()


def test_numbers_are_rounded_as_the_formats_define() -> None:
    """Every number of eight bits, every midpoint between two of them, and their neighbours, in bits."""
    eight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    eight = eight[eight.isfinite()].sort().values
    middles = (eight[1:] + eight[:-1]) / 2
    x = torch.cat([eight, middles, *(torch.nextafter(middles, torch.tensor(way)) for way in (-1e9, 1e9))])
    x = torch.cat([x, torch.tensor([448.0])]).to(DEVICE)  # so the scale is one
    values, scales = kernels.join(x[None, None, None], None, True)
    assert scales.item() == 1
    assert torch.equal(values.view(torch.uint8), x[None, None].to(torch.float8_e4m3fn).view(torch.uint8))


def test_part_covers_every_width() -> None:
    assert [kernels.part(width) for width in (3072, 12288, 192)] == [1024, 4096, 64]
    for width in (*range(1, 300), *random.Random(0).sample(range(300, 20000), 200)):
        part = kernels.part(width)
        assert part & (part - 1) == 0
        assert part >= width or (width % part == 0 and width // part <= kernels.MOST_PARTS)


def test_operators_keep_pytorchs_rules() -> None:
    """Their fakes have the shapes and orders of what they return, and nothing is changed in place."""
    torch.manual_seed(2)
    attention, mlp = noise(1, 3, 2, 8), noise(1, 3, 24)
    tokens = [noise(1, 2, 16), noise(1, 3, 16)]
    vectors = [noise(1, 16), noise(1, 16)]
    parts = [noise(1, 3, 2, 8) for _ in range(3)]
    norms = [noise(8), noise(8)]
    tests = ("test_schema", "test_faketensor")
    for quantized in (False, True):
        torch.library.opcheck(kernels.join, (attention, mlp, quantized), test_utils=tests)
        for out, gate in (([], []), (tokens, vectors)):
            modulated = (tokens, vectors, vectors, out, gate, 1e-6, quantized)
            torch.library.opcheck(kernels.modulate, modulated, test_utils=tests)
        rotated = (parts, parts, norms, norms, noise(6, 8), noise(6, 8), 1e-6)
        torch.library.opcheck(kernels.rotate, rotated, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_without_triton_the_reference_computes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    mlp = noise(1, 3, 24, dtype=dtype)
    assert torch.equal(kernels.join(None, mlp, False)[0], kernels.gelu(mlp.float()).to(dtype))
