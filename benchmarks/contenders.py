"""Who draws in the benchmark of a GPU: this project, wired by assembly as it serves, and what others do."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import full_size
from benchmarks.measure import median_seconds
from flux_lora.assembly import assemble
from flux_lora.generator import Step
from flux_lora.inputs import Model
from flux_lora.request import MAX_TEXT_TOKENS, SIZES, Request
from flux_lora.settings import ProfileName, Settings
from flux_lora.speed import attention
from training.random_weights import random_lora

RANK = 16
FILES = ("first.safetensors", "second.safetensors")
"""The LoRAs' files; the first is the fine-tune."""

AfterStep = Callable[[int], None]
"""Called with a step's number, from 1, when the step has been asked of the device."""


class Contender(Protocol):
    """Draws pictures of one model."""

    pipeline: Any
    """A FluxPipeline."""
    set_up: dict[str, float]
    """Seconds of what was done once."""

    def draw(
        self, turn: int, *, steps: int, ratio: str = "1:1", after_step: AfterStep | None = None
    ) -> Mapping[str, Any]:
        """Draw one image with a prompt and a seed of its own to its file: the metrics, if there are any."""

    def switching(self, times: int) -> dict[str, Any]:
        """Seconds to another LoRA and to another scale of the same one."""


@dataclass(frozen=True)
class Given:
    """What all contenders are given."""

    device: torch.device
    dtype: torch.dtype
    small: bool
    folder: Path
    """Holds the LoRAs; pictures may go there."""
    cache: Path
    """For what is compiled or chosen."""


def write_loras(folder: Path, *, small: bool) -> None:
    """Write two random LoRAs on all linear layers of the transformer's blocks."""
    with torch.device("meta"):
        layers = full_size.transformer("dev", small=small)
    for seed, name in enumerate(FILES):
        torch.manual_seed(seed)
        save_file(random_lora(layers, rank=RANK), folder / name)


class Ours:
    """This project, from random weights in a weights directory's place."""

    def __init__(self, given: Given, profile: ProfileName, *models: str, **settings: Any) -> None:
        """Set it up.

        Args:
            given: what all contenders are given.
            profile: of speed.
            models: to load; the first is drawn.
            settings: further ones of the operator's.
        """
        self.model = models[0]
        filling, started = full_size.Stopwatch(), time.perf_counter()
        self._setting_up = True
        self.generator = assemble(
            Settings(weights=given.folder, profile=profile, device=str(given.device), cache=given.cache, **settings),
            str(given.folder / FILES[0]),
            log=self._log,
            open_weights=full_size.source(*models, small=given.small, filling=filling),
        )
        self._setting_up = False
        self.set_up = {"seconds": time.perf_counter() - started, "weights_seconds": filling.seconds}
        self.pipeline: Any = self.generator.parts.pipelines[self.model]

    def draw(
        self, turn: int, *, steps: int, ratio: str = "1:1", after_step: AfterStep | None = None, **inputs: Any
    ) -> dict[str, Any]:
        """Draw one image with a prompt and a seed of its own, the checker off: the metrics of the request."""
        asked = {"prompt": f"picture {turn}", "seed": turn % 100, "model": self.model, "num_inference_steps": steps}
        request = Request.parse(**asked | {"aspect_ratio": ratio, "disable_safety_checker": True} | inputs)
        metrics: dict[str, Any] = {}

        def observe(step: Step) -> None:
            if after_step:
                after_step(step.step)

        self.generator.draw(request, metrics.__setitem__, observe if after_step else None)
        return metrics

    def switching(self, times: int) -> dict[str, Any]:
        """Seconds to bring the transformer to another LoRA and to another scale, and where its base weights are."""
        merged = self.generator.parts.transformers[self.model]
        sets = [self.generator.parts.adapters.read([(name, 1.0)], lambda _: None) for name in FILES]
        adapters = [adapter for adapter_set in sets for adapter, _ in adapter_set]

        def switch(turn: int) -> None:
            merged.bring([(adapters[(turn + 1) % 2], 1.0)])

        def scale(turn: int) -> None:
            merged.bring([(adapters[0], 0.5 + turn / 100)])

        switch(0)  # whatever is read or allocated once
        switch(1)
        found = {"switch_seconds": median_seconds(switch, times), "scale_seconds": median_seconds(scale, times)}
        return {**found, "where": merged.where()}

    def _log(self, line: str) -> None:
        if self._setting_up:
            print(f"  {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Recipe:
    """What others do."""

    hotswap: bool = False
    """The LoRA's tensors have room for the largest rank, and another LoRA is written into them."""
    compile: str = ""
    """``whole``: the transformer as one graph; ``blocks``: its repeated blocks."""
    mode: str | None = None
    """Of torch.compile."""
    fp8: bool = False


# The public recipe is that of https://huggingface.co/blog/lora-fast (July 2025). Its figures come from
# https://github.com/huggingface/lora-fast, utils/benchmark_utils.py: enable_lora_hotswap, the first LoRA loaded, then
# `transformer.compile(fullgraph=True)`, the VAE as it is, other LoRAs with hotswap=True; fp8 by torchao with a scale
# for each row of all linear layers (TorchAoConfig("float8dq_e4m3_row") there, which newer versions spell as a class).
# The post itself shows mode="max-autotune" too, and diffusers' documentation compile_repeated_blocks, which compiles
# in less time: they are rows of their own, and the fastest row counts.
#
# Its FlashAttention 3 takes query, key and value in eight bits. Here every peer gets the fastest kernel of diffusers'
# that computes in bfloat16, FlashAttention 3 among them where it is installed: what ours is given, too.
PEERS = {
    "peer1": Recipe(),
    "peer2": Recipe(hotswap=True, compile="whole"),
    "peer2-blocks": Recipe(hotswap=True, compile="blocks"),
    "peer2-autotune": Recipe(hotswap=True, compile="whole", mode="max-autotune"),
    "peer2-fp8": Recipe(hotswap=True, compile="whole", fp8=True),
    "peer2-fp8-autotune": Recipe(hotswap=True, compile="whole", mode="max-autotune", fp8=True),
}


class Peer:
    """diffusers with a PEFT adapter, by a recipe; without one, the base model as diffusers runs it."""

    def __init__(self, given: Given, recipe: Recipe | None, model: Model) -> None:
        """Set it up."""
        started = time.perf_counter()
        self._given, self._recipe, self._model = given, recipe, model
        self.pipeline = pipeline = full_size.pipeline(model, given.device, given.dtype, small=given.small)
        weights_seconds = time.perf_counter() - started
        pipeline.set_progress_bar_config(disable=True)
        if recipe:
            if recipe.fp8:
                _quantize(pipeline.transformer)
            if recipe.hotswap:
                pipeline.enable_lora_hotswap(target_rank=RANK)
            pipeline.load_lora_weights(given.folder / FILES[0], adapter_name="hotswap")
            if recipe.compile:
                self._compile(recipe)
            self.draw(-1, steps=2)
        self.set_up = {"seconds": time.perf_counter() - started, "weights_seconds": weights_seconds}

    def draw(
        self, turn: int, *, steps: int, ratio: str = "1:1", after_step: AfterStep | None = None
    ) -> Mapping[str, Any]:
        """Draw one image with a prompt and a seed of its own."""
        width, height = _size(ratio)

        def observe(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if after_step:
                after_step(step + 1)
            return tensors

        image = self.pipeline(
            f"picture {turn}",
            width=width,
            height=height,
            num_inference_steps=steps,
            max_sequence_length=MAX_TEXT_TOKENS[self._model],
            generator=torch.Generator("cpu").manual_seed(turn % 100),
            callback_on_step_end=observe if after_step else None,
        ).images[0]
        image.save(self._given.folder / "picture.webp", quality=80)
        return {}

    def switching(self, times: int) -> dict[str, Any]:
        """Seconds to another LoRA and, unless it is compiled, to another scale.

        Where the LoRA is compiled, `set_adapters` puts a number in a tensor's place, and all is compiled again at the
        next image: with the public recipe a scale is as good as another LoRA.
        """

        def switch(turn: int) -> None:
            file = self._given.folder / FILES[(turn + 1) % 2]
            if self._recipe and self._recipe.hotswap:
                self.pipeline.load_lora_weights(file, adapter_name="hotswap", hotswap=True)
            else:
                self.pipeline.unload_lora_weights()
                self.pipeline.load_lora_weights(file, adapter_name="hotswap")

        def scale(turn: int) -> None:
            self.pipeline.set_adapters("hotswap", 0.5 + turn / 100)

        found = {"switch_seconds": median_seconds(switch, times)}
        if self._recipe and not self._recipe.hotswap:
            found["scale_seconds"] = median_seconds(scale, times)
        return found

    def _compile(self, recipe: Recipe) -> None:
        transformer = self.pipeline.transformer
        tokens = image_tokens(self.pipeline, "1:1") + MAX_TEXT_TOKENS["dev"]
        attention.set_fastest([transformer], tokens, self._given.device, exact=True, folder=self._given.cache)
        if recipe.compile == "blocks":
            transformer.compile_repeated_blocks(fullgraph=True, mode=recipe.mode)
        else:
            transformer.compile(fullgraph=True, mode=recipe.mode)


def _quantize(transformer: nn.Module) -> None:
    try:
        # Not among the project's requirements: diffusers imports it wherever it is, and it warns at every start.
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quant_api, quantize_
    except ImportError:
        raise SystemExit("peer2-fp8 needs torchao: .venv/bin/pip install torchao==0.18.0") from None
    # On a CPU, where only the benchmark itself is tried, torchao computes the same slowly, but asks for a GPU first.
    asking = nullcontext() if torch.cuda.is_available() else mock.patch.object(quant_api, "_check_hardware_support")
    with asking:
        quantize_(transformer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def _size(ratio: str) -> tuple[int, int]:
    return {str(name): size for name, size in SIZES.items()}[ratio]


def image_tokens(pipeline: Any, ratio: str) -> int:
    """How many tokens the transformer sees of an image."""
    width, height = _size(ratio)
    return int(width * height // (2 * pipeline.vae_scale_factor) ** 2)
