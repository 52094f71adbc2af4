"""Kernels that a step of FLUX.1 dev launches, and the bytes that they read and write: diffusers' blocks against ours.

    python -m benchmarks.launches --json benchmarks/results/launches.json

PyTorch's compiler plans each block for a GPU as it does there, from tensors that have a device and no memory, and what
it plans is counted: so no GPU is needed, and nothing is timed. Sizes are those of one megapixel, q, k and v fused. A
product, attention and a fused kernel count as one each; what libraries launch besides, like the clearing of a
workspace, is not seen. Bytes count each tensor that a kernel reads or writes once, and whole where it is read in part.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor import compile_fx, config, ir, scheduler
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from flux_lora.device.libraries import diffusers
from flux_lora.speed import compilation, projections, quantization

TEXTS, IMAGES, WIDTH, HEAD = 512, 4096, 3072, 128
BLOCKS = {"double": 19, "single": 38}
"""How many there are of each."""
LIBRARIES = {"mm": "products", "addmm": "products", "_scaled_mm": "products", "cudnn_attention": "attention"}
"""What is left to libraries, by a part of its operator's name."""

H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
)


ANSWERS = {
    "_get_device_properties": H100,
    "get_device_properties": H100,
    "get_device_capability": (H100.major, H100.minor),
    "current_device": 0,
    "device_count": 1,
    "is_available": True,
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
    "_lazy_init": None,
    "get_rng_state": torch.empty(1),
    "set_rng_state": None,
}
"""What PyTorch's compiler asks of a CUDA device."""


class Planned(Exception):  # noqa: N818 - no error: it ends the compiler's work before it makes code
    """The compiler has planned what is launched."""


def main() -> int:
    """Print the table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__}
    print(f"{'':28}{'launches':>10}{'of them products, attention, others':>40}{'others move':>14}")
    for profile in ("exact", "balanced"):
        for whose in ("diffusers", "ours"):
            step: dict[str, float] = dict.fromkeys(("products", "attention", "others", "others_bytes"), 0)
            for kind, times in BLOCKS.items():
                counted = count(profile, whose, kind)
                found[f"{profile} {whose} {kind}"] = counted
                step = {name: value + times * counted[name] for name, value in step.items()}
            launches = sum(value for name, value in step.items() if name != "others_bytes")
            found[f"{profile} {whose} step"] = {"launches": launches, **step}
            parts = ", ".join(f"{step[name]:g}" for name in ("products", "attention", "others"))
            print(
                f"{profile + ', ' + whose:28}{launches:10g}{parts:>40}{step['others_bytes'] / 1e9:11.2f} GB", flush=True
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def count(profile: str, whose: str, kind: str) -> dict[str, Any]:
    """Kernels of a block by what they do, the bytes that the others move, and the others' names.

    Args:
        profile: ``exact`` or ``balanced``.
        whose: ``ours`` or ``diffusers``.
        kind: ``double`` or ``single``.
    """
    found: dict[str, Any] = {"products": 0, "attention": 0, "others": 0, "others_bytes": 0, "kernels": []}
    for node, moved in _planned(*_traced(profile, whose, kind)):
        operator = _operator(node)
        what = next((what for part, what in LIBRARIES.items() if part in operator), "others")
        if isinstance(node, scheduler.NopKernelSchedulerNode):  # a view
            continue
        if what != "others":
            found[what] += not _is_part(node)
            continue
        found["others"] += not _is_part(node)
        found["others_bytes"] += moved
        found["kernels"].append([operator, moved])
    return found


def _operator(node: Any) -> str:
    """The operator that a planned kernel is, or of which it is a part; ``fused`` for generated code."""
    if not isinstance(node, scheduler.ExternKernelSchedulerNode):
        return "fused"
    if isinstance(node.node, ir.MultiOutput):
        return _operator_of(node.node.inputs[0]) + ", an output"
    return _operator_of(node.node)


def _is_part(node: Any) -> bool:
    return isinstance(node, scheduler.ExternKernelSchedulerNode) and isinstance(node.node, ir.MultiOutput)


def _operator_of(kernel: Any) -> str:
    return str(getattr(kernel, "op_overload", None) or getattr(kernel, "python_kernel_name", "?"))


def _traced(profile: str, whose: str, kind: str) -> tuple[FakeTensorMode, torch.fx.GraphModule, list[Tensor]]:
    """A block's operators, and its arguments on a device that is not there, with what they are tensors of."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    layers = quantization.prepare(model, "fp8") if profile == "balanced" else {}
    with fake, torch.no_grad(), _as_on_a_gpu():
        for module in model.modules():
            for name, parameter in module._parameters.items():  # noqa: SLF001 - exchanged where they are
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)  # noqa: SLF001
        for layer in layers.values():
            layer.move(torch.device("cpu"))
        projections.fuse(model)
        if whose == "ours":
            from flux_lora.speed import blocks  # after diffusers has loaded its own

            blocks.place(model)
        block = (model.transformer_blocks if kind == "double" else model.single_transformer_blocks)[0]
        state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        inputs = [torch.empty(1, tokens, WIDTH, dtype=torch.bfloat16) for tokens in (IMAGES, TEXTS)]
        inputs += [torch.empty(1, WIDTH, dtype=torch.bfloat16)]
        inputs += [torch.empty(TEXTS + IMAGES, HEAD) for _ in range(2)]

        def call(*given: Tensor) -> Any:
            image, text, modulation, cosine, sine = given[len(state) :]
            named = {"hidden_states": image, "encoder_hidden_states": text, "temb": modulation}
            weights = dict(zip(state, given, strict=False))
            return functional_call(block, weights, (), {**named, "image_rotary_emb": (cosine, sine)})

        arguments = [*state.values(), *inputs]
        graph = make_fx(call, decomposition_table=select_decomp_table())(*arguments)
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
        there = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in arguments]
    return fake, graph, there


def _planned(fake: FakeTensorMode, graph: torch.fx.GraphModule, arguments: list[Tensor]) -> list[tuple[Any, int]]:
    """What PyTorch's compiler would launch for it on an H100, and the bytes that each moves."""
    planned: list[tuple[Any, int]] = []

    def keep(plan: Any) -> None:
        planned.extend((node, int(node.get_read_write_buffers_sizes())) for node in plan.nodes)
        raise Planned

    with ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock(return_value=answer), create=True))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(scheduler.Scheduler, "codegen", keep))
        stack.enter_context(config.patch(compilation.OPTIONS))
        stack.enter_context(fake)
        try:
            compile_fx.compile_fx_inner(graph, arguments, is_inference=True)
        except Exception:
            if not planned:
                raise
    return planned


def _attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Attention by cuDNN, as PyTorch has it computed on an H100."""
    heads_first = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, False)[0]  # noqa: SLF001
    return out.permute(0, 2, 1, 3)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Trace what would run on a GPU, from tensors that say they are on the CPU, which alone can be sliced here."""
    flux = diffusers.models.transformers.transformer_flux
    dispatch = diffusers.models.attention_dispatch
    joined: Callable[..., Tensor] = lambda parts: torch.cat(list(parts))  # noqa: E731
    with (
        mock.patch.object(flux, "dispatch_attention_fn", _attend),
        mock.patch.object(dispatch, "dispatch_attention_fn", _attend),
        mock.patch.object(projections, "joined", joined),
        mock.patch.object(quantization, "emulated_product", quantization.hardware_product),
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
