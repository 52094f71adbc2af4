"""A step recorded once for each size, and begun as a whole from then on: CUDA graphs.

A step of FLUX.1 is some 1,150 kernels, and a GPU waits for a few microseconds before each that is launched by itself. A
graph holds all of them with their arguments: addresses, of the weights too, which stay where they are when an adapter
is merged. What a request gives is copied to the addresses that were recorded.

The same kernels with the same arguments compute the same bits; each graph is compared once with the step that was
launched before it, and where a bit differs, nothing is replayed any more. Nor is it where recording fails. So a graph
never decides whether or what is drawn, but how soon.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from flux_lora.speed import fastest

CANDIDATES = {"cuda": ("launched",), "cpu": ("launched",)}
"""``replayed`` joins them for CUDA once tests/test_cuda.py has passed with it on a GPU: that every weight stays at its
address, however adapters are merged, no CPU can show."""

AFTER = 16
"""Steps of a size that are launched before it is recorded. That takes about as long as two steps, and each step that is
replayed wins at most a twentieth of one: so a size that is seen once costs little, and others win."""

MOST = 8
"""Graphs that are kept, the last used. The eleven sizes are six for the transformer, which counts tokens."""

FREE_BYTES = 11 * 2**29
"""Device memory without which nothing is recorded: 4.9 GiB, as the memory plans count the work of the largest picture,
and 0.6 for a graph of a megapixel. All graphs share what the largest of them takes for its tensors. What base weights
leave free on the device (`lora.merge`) is more. By the numbers: on a GPU it has not been measured yet."""

ROUNDS = 5
"""Steps that are timed."""

Work = Callable[[], object]
Record = Callable[[Work], Work]
"""Does some work and returns what does the same again, with the same tensors."""
Key = tuple[object, ...]


class CudaRecorder:
    """Records what a device is asked to do, as CUDA graphs that share memory: they never run at the same time.

    Other threads may use the device meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        """Record nothing yet."""
        self._device = device
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, work: Work) -> Work:
        """Record some work, which is not done.

        Raises:
            RuntimeError: it cannot be recorded, or memory ran out.
        """
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            self._stream = self._stream or torch.cuda.Stream()
            pool = next((graph.pool() for graph in self._graphs), None)  # that of none that lives is gone
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                    work()
            finally:
                torch.cuda.set_stream(before)  # a recording that fails as it ends leaves its own
        self._graphs.add(graph)
        return graph.replay


@dataclass(frozen=True)
class Graph:
    """A transformer's call, recorded."""

    inputs: Mapping[str, Tensor]
    output: Tensor
    replay: Work

    def __call__(self, named: Mapping[str, Any]) -> Tensor:
        """The output for inputs of the same shapes; it is the caller's own."""
        for name, tensor in self.inputs.items():
            tensor.copy_(named[name])
        self.replay()
        return self.output.clone()


def record_call(record: Record, launch: Callable[..., Any], named: Mapping[str, Any], expected: Tensor) -> Graph | None:
    """Record a call whose output is known; None where the recorded one differs from it in a bit.

    Args:
        record: records.
        launch: a transformer's forward.
        named: its arguments.
        expected: what it has returned for them.

    Raises:
        RuntimeError: it cannot be recorded, or memory ran out.
    """
    # All that lives from one replay to the next is allocated here, beyond the memory that graphs share.
    inputs = {name: value.clone() for name, value in named.items() if isinstance(value, Tensor)}
    output = torch.full_like(expected, math.nan)  # what a replay must write
    graph = Graph(inputs, output, record(lambda: output.copy_(launch(**{**named, **inputs})[0])))
    same = torch.equal(graph(named).view(torch.uint8), expected.view(torch.uint8))
    return graph if same else None


class StepGraphs:
    """The recorded steps of transformers whose weights stay where they are."""

    def __init__(self, record: Record, may_record: Callable[[], bool], log: Callable[[str], None]) -> None:
        """Record nothing yet.

        Args:
            record: records.
            may_record: whether there is memory for it, weights stay where they are, and nobody else is at work.
            log: told why recording has come to an end, if it does.
        """
        self._record, self._may_record, self._log = record, may_record, log
        self._graphs: OrderedDict[Key, Graph] = OrderedDict()
        self._launched: Counter[Key] = Counter()
        self._given_up = False

    def place(self, transformer: Any) -> None:
        """Let a FluxTransformer2DModel's calls be replayed where they are recorded."""
        launch = transformer.forward

        @wraps(launch)
        def forward(*inputs: Any, **named: Any) -> Any:
            key = None if inputs or self._given_up else _key(transformer, named)
            if key is None:
                return launch(*inputs, **named)
            if graph := self._graphs.get(key):
                self._graphs.move_to_end(key)
                return (graph(named),)
            outputs = launch(**named)
            self._launched[key] += 1
            if self._launched[key] >= AFTER and self._may_record():
                self._keep(key, launch, named, *outputs)
            return outputs

        transformer.forward = forward

    def forget(self) -> None:
        """Forget all graphs, since weights move; sizes that are still seen are recorded anew."""
        self._graphs.clear()
        self._launched.clear()

    def give_way(self) -> bool:
        """Free the memory of all graphs, and record no more; False: there was none to free."""
        if held := bool(self._graphs):
            self._give_up("they give way to a request that takes their memory")
        return held

    def _keep(self, key: Key, launch: Callable[..., Any], named: Mapping[str, Any], expected: Tensor) -> None:
        try:
            graph = record_call(self._record, launch, named, expected)
        except RuntimeError as error:
            return self._give_up(str(error).partition("\n")[0])
        if graph is None:
            return self._give_up("what was recorded draws other bits")
        self._graphs[key] = graph
        if len(self._graphs) > MOST:
            self._launched.pop(self._graphs.popitem(last=False)[0])
        return None

    def _give_up(self, why: str) -> None:
        self._given_up = True
        self.forget()
        self._log(f"steps are no longer replayed as CUDA graphs: {why}")


def choose(
    transformer: Any,
    named: Mapping[str, Any],
    record: Record,
    described: Mapping[str, object],
    device: torch.device,
    folder: Path,
) -> tuple[str, bool]:
    """Decide whether steps are faster ``launched`` or ``replayed``, and whether that was measured just now.

    Args:
        transformer: a FluxTransformer2DModel, ready to draw.
        named: the arguments of a call.
        record: records.
        described: what its times depend on beside device, versions and sizes.
        device: computes.
        folder: a cache directory.
    """
    sizes = {name: list(value.shape) for name, value in named.items() if isinstance(value, Tensor)}
    blocks = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    shape = {**described, **sizes, "dtype": str(transformer.x_embedder.weight.dtype), "blocks": blocks}

    def measure(name: str) -> float | None:
        return time_step(name, transformer, named, record, device)

    return fastest.choose_fastest("steps", CANDIDATES[device.type], shape, device, folder, measure)


@torch.no_grad()
def time_step(
    name: str, transformer: Any, named: Mapping[str, Any], record: Record, device: torch.device
) -> float | None:
    """Measure the seconds of a step, ``launched`` or ``replayed``; None: it cannot be recorded, or draws other bits."""
    launch = transformer.forward
    expected = launch(**named)[0]
    if name == "launched":
        return fastest.time_call(lambda: launch(**named), device, ROUNDS)
    try:
        graph = record_call(record, launch, named, expected)
    except RuntimeError:
        return None
    return fastest.time_call(lambda: graph(named), device, ROUNDS) if graph else None


def example(transformer: Any, images: int, texts: int) -> dict[str, Any]:
    """Arguments of a call as diffusers' pipeline makes them, of noise.

    Args:
        transformer: a FluxTransformer2DModel on the device that computes.
        images: tokens of an image.
        texts: tokens of a prompt.
    """
    config, weight = transformer.config, transformer.x_embedder.weight

    def noise(*size: int) -> Tensor:
        return torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(weight)

    return {
        "hidden_states": noise(images, config.in_channels),
        "timestep": weight.new_full((1,), 0.5),
        "guidance": torch.full((1,), 3.5, device=weight.device) if config.guidance_embeds else None,
        "pooled_projections": noise(config.pooled_projection_dim),
        "encoder_hidden_states": noise(texts, config.joint_attention_dim),
        "txt_ids": weight.new_zeros(texts, 3),
        "img_ids": weight.new_zeros(images, 3),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def _key(transformer: Any, named: Mapping[str, Any]) -> Key | None:
    """What a recorded call is for; None: not one that can be recorded."""
    if torch.is_grad_enabled() or named.get("return_dict") is not False or named.get("joint_attention_kwargs"):
        return None
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    others = tuple(name for name, value in named.items() if name not in tensors and value)
    if others:
        return None
    return id(transformer), *((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items())
