"""The fused kernels, whole blocks and merging, timed on a GPU at FLUX.1's sizes, and checked there first.

What takes less time on the GPU than its call on the host is replayed as a CUDA graph: else the host is what is timed.

    python benchmarks/kernels.py --json kernels.json [--parts kernels,blocks,merge,attention,host,references,products]

Parts run in that order, the most important first, none begins after ``--limit`` seconds, and the file is written after
each. Needs a checkout, PyTorch with Triton, and diffusers for the blocks. On a CPU ``--small`` tries all of it.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from flux_lora.lora import fused
from flux_lora.lora.deltas import LowRank, Rows
from flux_lora.lora.merge import Contribution
from flux_lora.speed import kernels
from flux_lora.speed.quantization import FORMATS, QuantizedLinear, emulated_product, hardware_product, prepare

OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"deterministic": True}
"""What the service compiles with (compilation.py)."""

Case = tuple[str, Callable[..., Any], Callable[..., Any], tuple[Any, ...], int]
"""Name, kernel, reference, arguments, and the fewest bytes that must be moved."""

TUNED = ("join -> fp8", "GELU -> fp8", "modulate -> fp8", "add, modulate -> fp8", "modulate", "rotate q k")
"""Timed with several numbers of warps, each of which takes a second to compile."""


class Sizes:
    """Of one image of 1024×1024 pixels; or small."""

    def __init__(self, small: bool) -> None:
        """Take the sizes of one image of a megapixel, or small ones."""
        self.texts, self.images = (8, 24) if small else (512, 4096)
        self.heads, self.head = (2, 32) if small else (24, 128)
        self.width = self.heads * self.head
        self.tokens = self.texts + self.images
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def noise(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Make normal noise of a size on the device."""
        return torch.randn(size, device=self.device, dtype=torch.float32).to(dtype)


def seconds(work: Callable[[], object], device: torch.device, rep: int = 40, *, replayed: bool = True) -> float:
    """Median seconds of a call whose inputs are not in the cache, without what the host needs for it."""
    if device.type == "cuda":
        from triton.testing import do_bench

        if replayed:
            work()  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
            work = graph.replay
        return float(do_bench(work, warmup=10, rep=rep, return_mode="median")) / 1000
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def steady(work: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """Median seconds of a call among many, as in a step."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        return seconds(work, device)
    spent: list[float] = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(rounds):
            work()
        end.record()
        torch.cuda.synchronize()
        spent.append(begin.elapsed_time(end) / rounds / 1000)
    return statistics.median(spent)


def copy_rate(sizes: Sizes) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(2**20 if sizes.device.type == "cpu" else 2**30, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), sizes.device)


def cases(sizes: Sizes) -> Iterator[Case]:
    """Every kernel as the blocks call it."""
    tokens, width, heads, head = sizes.tokens, sizes.width, sizes.heads, sizes.head
    wide, both = 4 * width, [sizes.noise(1, sizes.texts, width), sizes.noise(1, sizes.images, width)]
    attention = sizes.noise(1, heads, tokens, head).transpose(1, 2)
    mlp, image_mlp = sizes.noise(1, tokens, wide), sizes.noise(1, sizes.images, wide)
    vectors = [list(sizes.noise(1, 6 * width).chunk(6, dim=1)[i : i + 2]) for i in (0, 2, 4)]
    out = [torch.randn_like(x) for x in both]
    join, modulate, rotate = kernels.join, kernels.modulate, kernels.rotate
    for quantized, size in ((True, 1), (False, 2)):
        mark = " -> fp8" if quantized else ""
        moved = tokens * width * (2 + size)
        yield f"join{mark}", join, kernels.join_reference, (attention, mlp, quantized), 5 * moved
        if quantized:
            moved_image = sizes.images * wide * (2 + size)
            yield f"GELU{mark}", join, kernels.join_reference, (None, image_mlp, quantized), moved_image
            yield f"attention{mark}", join, kernels.join_reference, (attention, None, quantized), moved
        plain: tuple[Any, ...] = (both, vectors[0], vectors[1], [], [], 1e-6, quantized)
        added = (both, vectors[0], vectors[1], out, vectors[2], 1e-6, quantized)
        yield f"modulate{mark}", modulate, kernels.modulate_reference, plain, moved
        yield f"add, modulate{mark}", modulate, kernels.modulate_reference, added, moved + tokens * width * 4
    fused = sizes.noise(1, tokens, 3 * width).chunk(3, dim=-1)
    parts = [x.unflatten(-1, (heads, head)) for x in fused]
    split = [[x[:, : sizes.texts].contiguous() for x in parts], [x[:, sizes.texts :].contiguous() for x in parts]]
    norms = [sizes.noise(head), sizes.noise(head)]
    angles = torch.rand(tokens, head // 2, device=sizes.device) * 6.3
    turn = (angles.cos().repeat_interleave(2, 1).contiguous(), angles.sin().repeat_interleave(2, 1).contiguous(), 1e-6)
    reference, moved = kernels.rotate_reference, tokens * width * 4
    table = 2 * tokens * head * 4
    yield "rotate q k", rotate, reference, (parts[:2], [], norms, [], *turn), 2 * moved + table
    joined = (split[1], split[0], norms, norms, *turn)
    yield "rotate q k v of text and image", rotate, reference, joined, 3 * moved + table


def time_kernels(sizes: Sizes, rate: float) -> dict[str, Any]:
    """Each kernel: checked against its reference, then timed with several numbers of warps."""
    found = {}
    for name, kernel, reference, arguments, moved in cases(sizes):
        operator = kernel.name().split("::")[1]  # type: ignore[attr-defined]
        row: dict[str, Any] = {
            "check": check(kernel(*arguments), reference(*arguments)),
            "floor_us": moved / rate * 1e6,
        }
        chosen = kernels.WARPS[operator]
        options = {"join": (4, 8, 16), "modulate": (2, 4, 8), "rotate": (1, 2, 4)}[operator]
        row["us"] = {}
        tuned = name in TUNED and sizes.device.type == "cuda"
        for warps in options if tuned else (chosen,):
            kernels.WARPS[operator] = warps
            row["us"][warps] = seconds(lambda: kernel(*arguments), sizes.device) * 1e6  # noqa: B023 - called at once
        kernels.WARPS[operator] = chosen
        found[name] = row
        times = "  ".join(f"{warps} warps {us:7.1f}" for warps, us in row["us"].items())
        print(f"{name:40} floor {row['floor_us']:7.1f}  {times} µs  {row['check']}", flush=True)
    return found


def time_references(sizes: Sizes, rate: float) -> dict[str, float]:  # noqa: ARG001 - as the other parts
    """Each kernel's reference, compiled."""
    found = {}
    for name, _, reference, arguments, _ in cases(sizes):
        torch._dynamo.reset()
        compiled = torch.compile(reference, options=OPTIONS, dynamic=False)
        found[name] = seconds(lambda: compiled(*arguments), sizes.device) * 1e6  # noqa: B023 - called at once
        print(f"{name:40} compiled reference {found[name]:7.1f} µs", flush=True)
    return found


def check(actual: Any, expected: Any) -> str:
    """Largest distance and how many numbers differ, or FAILED."""
    pairs = zip(actual, expected, strict=True) if isinstance(actual, list) else [(actual, expected)]
    said = []
    for one, other in pairs:
        distance = float((one.float() - other.float()).norm() / other.float().norm())
        differ = (
            float((one != other).float().mean())
            if one.dtype.itemsize > 1
            else float((one.view(torch.uint8) != other.view(torch.uint8)).float().mean())
        )
        limit = {torch.bfloat16: 1e-3, torch.float8_e4m3fn: 5e-3, torch.float32: 1e-5}[one.dtype]
        wrong = "" if distance < limit and one.shape == other.shape else " FAILED"
        said.append(f"{str(one.dtype).removeprefix('torch.')} {distance:.1e} {100 * differ:.3f}%{wrong}")
    return "; ".join(said)


def time_blocks(sizes: Sizes, rate: float) -> dict[str, Any]:  # noqa: ARG001 - as the other parts
    """Both blocks, diffusers' and ours, compiled as the service does, q, k and v fused."""
    from diffusers import FluxTransformer2DModel

    from flux_lora.speed import blocks, projections

    axes = (16, 56, 56) if sizes.head == 128 else (8, 12, 12)
    with sizes.device:
        base = FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, attention_head_dim=sizes.head, num_attention_heads=sizes.heads,
            axes_dims_rope=axes,
        )  # fmt: skip
    base = base.to(torch.bfloat16).eval()
    temb = sizes.noise(1, sizes.width)
    ids = torch.zeros(sizes.tokens, 3, device=sizes.device)
    ids[sizes.texts :, 1] = torch.arange(sizes.images, device=sizes.device) // 64
    ids[sizes.texts :, 2] = torch.arange(sizes.images, device=sizes.device) % 64
    rotary = base.pos_embed(ids)
    joint = sizes.noise(1, sizes.tokens, sizes.width)
    image, text = sizes.noise(1, sizes.images, sizes.width), sizes.noise(1, sizes.texts, sizes.width)
    inputs = {
        "double": {"hidden_states": image, "encoder_hidden_states": text},
        "single": {"hidden_states": joint[:, sizes.texts :], "encoder_hidden_states": joint[:, : sizes.texts]},
    }
    found: dict[str, Any] = {}
    outputs: dict[str, Tensor] = {}
    for profile in ("balanced", "exact"):
        for whose in ("ours", "diffusers"):
            model = copy.deepcopy(base)
            if profile == "balanced":
                weights = dict(model.named_parameters())
                for name, layer in prepare(model, "fp8").items():
                    layer.move(sizes.device)
                    layer.write_rows(0, len(weights[name]), weights[name])
            projections.fuse(model)
            if whose == "ours":
                blocks.place(model)
            for kind, block in (
                ("single", model.single_transformer_blocks[0]), ("double", model.transformer_blocks[0]),
            ):  # fmt: skip
                torch._dynamo.reset()
                block.compile(fullgraph=True, dynamic=True, options=OPTIONS)
                arguments = {**inputs[kind], "temb": temb, "image_rotary_emb": rotary, "joint_attention_kwargs": None}
                started = time.perf_counter()
                text_out, image_out = block(**arguments)
                compiling = time.perf_counter() - started
                name = f"{profile} {kind}"
                outputs[f"{name} {whose}"] = torch.cat([text_out, image_out], dim=1).float()
                row: dict[str, Any] = {
                    "ms": steady(lambda: block(**arguments), sizes.device) * 1e3,  # noqa: B023 - called at once
                    "first_call_s": compiling,
                    "kernels_us": profiled(lambda: block(**arguments), sizes.device),  # noqa: B023
                }
                found.setdefault(name, {})[whose] = row
                print(f"{name:16} {whose:10} {row['ms']:7.3f} ms (first call {compiling:.1f} s)", flush=True)
                for kernel, us in list(row["kernels_us"].items())[:14] if whose == "ours" else ():
                    print(f"    {us:8.1f} µs  {kernel[:100]}", flush=True)
    for name, rows in found.items():
        ours, theirs = outputs[f"{name} ours"], outputs[f"{name} diffusers"]
        rows["distance"] = float((ours - theirs).norm() / theirs.norm())
        print(f"{name:16} distance to diffusers' {rows['distance']:.2e}")
    for profile in ("balanced", "exact"):
        step = {
            whose: 19 * found[f"{profile} double"][whose]["ms"] + 38 * found[f"{profile} single"][whose]["ms"]
            for whose in ("ours", "diffusers")
        }
        found[f"{profile} step"] = step
        print(
            f"{profile}: 19 double, 38 single blocks: ours {step['ours']:.1f} ms, diffusers' {step['diffusers']:.1f} ms"
        )
    return found


def profiled(work: Callable[[], object], device: torch.device, rounds: int = 5) -> dict[str, float]:
    """Microseconds a call of each kernel, the longest first."""
    if device.type != "cuda":
        return {}
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(rounds):
            work()
        torch.cuda.synchronize()
    spent = {event.key: event.self_device_time_total / rounds for event in profile.key_averages()}
    return dict(sorted(((key, us) for key, us in spent.items() if us), key=lambda item: -item[1]))


def time_attention(sizes: Sizes, rate: float) -> dict[str, float]:  # noqa: ARG001 - as the other parts
    """SDPA by the order of its inputs in memory, TFLOP/s."""
    tokens, heads, head = sizes.tokens, sizes.heads, sizes.head
    operations = 4 * tokens**2 * heads * head
    first = [sizes.noise(1, heads, tokens, head) for _ in range(3)]
    last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in first]

    def within(count: int) -> list[Tensor]:
        """Tensors that lie beside each other for each token."""
        return [x.transpose(1, 2) for x in sizes.noise(1, tokens, count, heads, head).unbind(2)]

    three = within(3)
    orders = {
        "as `rotate` leaves q and k, the fused product v": [*within(2), three[2]],
        "as `rotate` leaves q, k and v of text and image": three,
        "heads first": first,
        "tokens first": last,
    }
    found = {}
    for name, (q, k, v) in orders.items():
        spent = seconds(lambda: F.scaled_dot_product_attention(q, k, v), sizes.device, replayed=False)  # noqa: B023
        out = F.scaled_dot_product_attention(q, k, v)
        found[name] = operations / spent / 1e12
        print(f"SDPA {name:56} {found[name]:7.1f} TFLOP/s, output strides {out.stride()}", flush=True)
    return found


def time_host(sizes: Sizes, rate: float) -> dict[str, float]:  # noqa: ARG001 - as the other parts
    """Microseconds that the host needs to launch a kernel, alone and as an operator."""
    x = sizes.noise(1, 4, 256)
    out = kernels.empty_rows(x, 1, 4, 256, True)

    def launch() -> None:
        kernels.launch(
            "join", (4,), x, *out, None, x, 4, 0, 0, 0, HEAD=1, WIDTH=0, PART=1, MLP=256, MLP_PART=256, QUANTIZED=True
        )

    found = {}
    calls: dict[str, Callable[[], object]] = {"operator": lambda: kernels.join(None, x, True)}
    if sizes.device.type == "cuda":
        calls["program"] = launch
    with torch.no_grad():
        for name, call in calls.items():
            call()
            started = time.perf_counter()
            for _ in range(300):
                call()
            found[name] = (time.perf_counter() - started) / 300 * 1e6
            if sizes.device.type == "cuda":
                torch.cuda.synchronize()
            print(f"host, launching as {name}: {found[name]:.1f} µs", flush=True)
    return found


MERGES = {
    "merge": ((64, 128, 4, 3), (64, 128, 4, 1), (64, 64, 4, 3), (128, 128, 8, 3), (32, 256, 4, 3)),
    "merge_eight_bits": ((16, 256, 4, 3), (16, 256, 4, 1), (16, 256, 8, 3), (32, 256, 8, 3), (16, 128, 4, 3)),
}
"""Rows and columns that a program computes at a time, its warps, and stages in which it loads ahead."""


def time_merge(sizes: Sizes, rate: float) -> dict[str, Any]:
    """A scale change of all of FLUX.1 dev: estimated from one double and one single block's layers.

    By PyTorch's products; as served, with what the host does for each layer; and by the programs alone, in other tiles.
    """
    width, device, rank = sizes.width, sizes.device, 16
    shapes = {  # (rows, columns): how many in the model
        (width, width): 19 * 8 + 38 * 3, (4 * width, width): 19 * 2 + 38, (width, 4 * width): 19 * 2,
        (width, 5 * width): 38, (6 * width, width): 19 * 2, (3 * width, width): 38,
    }  # fmt: skip
    total = sum(rows * columns * count for (rows, columns), count in shapes.items())
    found: dict[str, Any] = {"floor_s": {"bf16": 4 * total / rate, "fp8": 3 * total / rate}}
    print(f"merge: {total / 1e9:.2f} G elements; floor {found['floor_s']}")
    layers = {shape: Layer(sizes, *shape, rank) for shape in shapes}
    methods: dict[str, Callable[[Layer], object]] = {}
    for kind, target in (("bf16", "merge"), ("fp8", "merge_eight_bits")):
        methods[f"{kind} PyTorch"] = Layer.by_torch_eight_bits if kind == "fp8" else Layer.by_torch
        if not kernels.launches(layers[width, width].base):
            continue
        methods[f"{kind} as served"] = Layer.served_eight_bits if kind == "fp8" else Layer.served
        for tile in MERGES[target] if device.type == "cuda" else ():
            name = "{} program, {}×{}, {} warps, {} stages".format(kind, *tile)
            methods[name] = partial(Layer.program, name=target, tile=fused.Tile(*tile))
    for name, method in methods.items():
        differing = 0.0
        for layer in layers.values():
            expected, actual = layer.expected(name.startswith("fp8")), layer.result(name.startswith("fp8"))
            actual.fill_(1)
            method(layer)
            differing = max(differing, float((actual.view(expected.dtype) != expected).float().mean()))
        spent = sum(
            steady(lambda: method(layer), device, 5) * shapes[shape]  # noqa: B023 - called at once
            for shape, layer in layers.items()
        )
        found[name] = {"s": spent, "differing": differing}
        print(f"merge {name:48} {spent:7.4f} s  {100 * differing:.4f}% of the numbers differ", flush=True)
    return found


class Layer:
    """A weight and a low-rank update of it, whose matrices wait in host memory as an adapter's do."""

    def __init__(self, sizes: Sizes, rows: int, columns: int, rank: int) -> None:
        """Make noise, and the results by PyTorch."""
        self.base = sizes.noise(rows, columns) * 0.02
        self.out = torch.empty_like(self.base)
        linear = torch.nn.Linear(columns, rows, bias=False, dtype=self.base.dtype, device="meta")
        self.eight = QuantizedLinear(linear, "fp8", self.base.device)
        up, down = (sizes.noise(*size).cpu() for size in ((rows, rank), (rank, columns)))
        self.up, self.down = up.to(self.base.device).float(), down.to(self.base.device).float()
        self.contribution = Contribution("", LowRank((Rows("", 0, rows),), up, down, 1.0), 0.7, 0, rows, 0)
        self.by_torch()
        self.by_torch_eight_bits()
        self._expected = [self.result(quantized).clone() for quantized in (False, True)]

    def result(self, quantized: bool) -> Tensor:
        """The merged weight as the program leaves it."""
        return self.eight.values.view(torch.uint8) if quantized else self.out

    def expected(self, quantized: bool) -> Tensor:
        """The weight as PyTorch computes it."""
        return self._expected[quantized]

    def by_torch(self) -> None:
        """As other algorithms than low-rank ones are merged."""
        self.out.copy_(self.base.float().addmm_(self.up, self.down, alpha=0.7))

    def by_torch_eight_bits(self) -> None:
        """Merge and quantize by PyTorch."""
        self.eight.write_rows(0, len(self.base), self.base.float().addmm_(self.up, self.down, alpha=0.7))

    def program(self, name: str, tile: fused.Tile) -> None:
        """Merge by one program with a tile."""
        chosen, fused.TILES[name] = fused.TILES[name], tile
        out = [self.out] if name == "merge" else [self.eight.values, self.eight.scales]
        fused.launch(name, out, self.base, self.up, self.down, 0.7)
        fused.TILES[name] = chosen

    def served(self) -> None:
        """Merge as the service does."""
        fused.merge(self.out, self.base, [self.contribution], self.base.device)

    def served_eight_bits(self) -> None:
        """Merge and quantize as the service does."""
        fused.merge(self.eight, self.base, [self.contribution], self.base.device)


TEMPLATES: dict[str, str | int | bool | Callable[..., Any]] = {
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "ATEN,TRITON",
    "triton.enable_persistent_tma_matmul": True,
}
"""Has PyTorch's compiler choose between the library's products and its own templates, by measuring.

Not what the service compiles with: with `deterministic` no choice is measured, and without it another process may
choose otherwise, and so round otherwise.
"""

PRODUCTS_SECONDS = 60
"""After so long no further product is tried: the templates of one take some ten seconds to compile."""


def time_products(sizes: Sizes, rate: float) -> dict[str, Any]:  # noqa: ARG001 - as the other parts
    """The blocks' products as served and by the faster of templates and library, the longest of a step first."""
    width, tokens, started = sizes.width, sizes.tokens, time.monotonic()
    eight = FORMATS["fp8"].dtype
    shapes = ((5 * width, width), (width, 4 * width), (width, 3 * width), (4 * width, width), (width, width))
    found: dict[str, Any] = {}
    for active in ("", " + GELU"):
        for columns, rows in shapes[1:2] if active else shapes:
            x, weight, bias = sizes.noise(tokens, columns), sizes.noise(rows, columns), sizes.noise(rows)
            scales = torch.ones(tokens, 1, device=sizes.device), torch.ones(rows, device=sizes.device)

            def plain(x: Tensor, weight: Tensor, bias: Tensor, active: str = active) -> Tensor:
                out = F.linear(x, weight, bias)
                return F.gelu(out, approximate="tanh") if active else out

            def quantized(x: Tensor, weight: Tensor, bias: Tensor, by_token: Tensor, by_row: Tensor) -> Tensor:
                product = hardware_product if x.is_cuda else emulated_product
                return product(x, weight, by_token, by_row, bias, torch.bfloat16)

            kinds: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {"bf16": (plain, (x, weight, bias))}
            if not active:
                kinds["fp8"] = (quantized, (x.to(eight), weight.to(eight), bias, *scales))
            for kind, (function, arguments) in kinds.items():
                name = f"{kind} {tokens}x{columns}x{rows}{active}"
                if time.monotonic() - started > PRODUCTS_SECONDS:
                    print(f"no time is left for {name}")
                    continue
                row = {"served": _rate(function, OPTIONS, arguments, sizes)}
                row["chosen"] = _rate(function, TEMPLATES, arguments, sizes)
                found[name] = row
                print(f"{name:36}" + "".join(f"{whose} {tflops:8.1f} TFLOP/s  " for whose, tflops in row.items()))
    return found


def _rate(function: Callable[..., Tensor], options: Any, arguments: tuple[Tensor, ...], sizes: Sizes) -> float:
    """TFLOP/s of a compiled product of (n, in) and (out, in)."""
    torch._dynamo.reset()
    compiled = torch.compile(function, options=options, dynamic=False)
    operations = 2 * arguments[0].numel() * len(arguments[1])
    return operations / steady(lambda: compiled(*arguments), sizes.device) / 1e12


PARTS: dict[str, Callable[[Sizes, float], Any]] = {
    "kernels": time_kernels,
    "blocks": time_blocks,
    "merge": time_merge,
    "attention": time_attention,
    "host": time_host,
    "references": time_references,
    "products": time_products,
}


@torch.no_grad()
def main() -> None:
    """Run the parts that fit the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("kernels.json"))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--limit", type=float, default=90)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    torch.manual_seed(0)
    sizes = Sizes(options.small)
    rate = copy_rate(sizes)
    device = torch.cuda.get_device_name() if sizes.device.type == "cuda" else "CPU"
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "copy_TB_s": rate / 1e12}
    print(f"{device}, PyTorch {torch.__version__}, copies at {rate / 1e12:.2f} TB/s", flush=True)
    for name in options.parts.split(","):
        if time.monotonic() - started > options.limit:
            print(f"no time is left for {name}")
            continue
        began = time.monotonic()
        try:
            found[name] = PARTS[name](sizes, rate)
        except Exception as error:  # noqa: BLE001 - the other parts are still worth their time
            import traceback

            traceback.print_exc()
            found[name] = {"error": repr(error)}
        found[f"{name}_took_s"] = time.monotonic() - began
        print(f"-- {name} took {found[f'{name}_took_s']:.1f} s", flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
