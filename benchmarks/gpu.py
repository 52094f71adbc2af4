"""Seconds an image on a GPU: ours against what others do, one row a call, on FLUX.1 of full size with random weights.

    scripts/bench gpu exact            # one of peer1, peer2, peer2-fp8, eager, exact, balanced, fast
    scripts/bench gpu table            # all rows that were measured, as a table and as a plot
    scripts/bench gpu exact --trace    # also: where the time of a step goes
    scripts/bench gpu exact --small    # tries the same on a small model, here also without a GPU

Each call also measures a reference row, diffusers eager without LoRA, and the rate of a large bfloat16 product, so that
rows of several calls compare as ratios. Rows are kept in benchmarks/results/. Targets: on one H100 with 80 GB.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from benchmarks import full_size, results
from benchmarks.measure import machine
from flux_lora.checkpoint import assembling
from flux_lora.generator import Generator
from flux_lora.lora.merge import MergedModule
from flux_lora.memory import placement
from flux_lora.memory.plans import PLANS, Choice
from flux_lora.request import MAX_TEXT_TOKENS, SIZES, Request
from flux_lora.settings import Settings
from flux_lora.speed import attention, profiles, projections, quantization
from flux_lora.speed.quantization import Scheme
from training.random_weights import random_lora

PEERS = ("peer1", "peer2", "peer2-fp8")
OURS = ("eager", "exact", "balanced", "fast")
STEPS = {"dev": 28, "schnell": 4}
RANK = 16
CUSTOM = ((1008, 1008), (256, 256), (1440, 1440), (512, 512))
"""Sizes beyond the eleven; the last has as many image tokens as dev has text tokens."""

Draw = Callable[..., None]
"""Draws one image to its file: draw(turn, ratio="1:1", steps=28)."""


def main() -> int:
    """Measure one row, or print all of them."""
    options = _options()
    if options.row == "table":
        return results.show(options.results, small=options.small)
    if options.first:
        print(json.dumps(_first_image(options)))
        return 0
    device = _device(options)
    print(machine(), flush=True)
    row: dict[str, Any] = {"row": options.row, "machine": machine(), "small": options.small, "images": options.images}
    row["matrix_tflops"] = _matrix_rate(device, small=options.small)
    print(f"matrix rate: {row['matrix_tflops']:.4g} TFLOP/s", flush=True)
    row["projections"] = _projections(device, small=options.small)
    print(f"q, k and v: {json.dumps(row['projections'])}", flush=True)
    for model in ("dev", "schnell"):
        with TemporaryDirectory() as folder:
            row[model] = _measure(model, Path(folder), options, row)
        _free()
    row["first_image_seconds"] = _in_fresh_process(options)
    results.keep(options.results, row)
    return results.show(options.results, small=options.small)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", choices=(*PEERS, *OURS, "table"))
    parser.add_argument("--images", type=int, default=3, help="of each kind; their median counts")
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark")
    parser.add_argument("--trace", action="store_true", help="print where the time of a step goes")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where rows are kept")
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _device(options: argparse.Namespace) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    if options.small:
        return torch.device("cpu")
    raise SystemExit("There is no NVIDIA GPU here. --small tries the benchmark on a small model.")


def _dtype(options: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() or options.row == "peer2-fp8" else torch.float32


# One row


def _measure(model: str, folder: Path, options: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    device, steps = _device(options), STEPS[model]
    pipeline = full_size.build(model, device, _dtype(options), small=options.small)
    pipeline.set_progress_bar_config(disable=True)
    files = _loras(pipeline.transformer, folder)
    if model == "dev":
        row["reference_seconds"] = _median(_diffusers_draw(pipeline, folder), options.images, steps=steps)
        print(f"reference: {row['reference_seconds']:.3f} s an image", flush=True)
    started = time.perf_counter()
    contender = (Ours if options.row in OURS else Peer)(options.row, model, pipeline, files, folder)
    contender.draw(-1)
    _wait()
    found: dict[str, Any] = {"set_up_seconds": time.perf_counter() - started}
    _reset_peak()
    tokens = _tokens(pipeline, "1:1")
    operations = full_size.operations(model, tokens, MAX_TEXT_TOKENS[model], small=options.small)
    found["seconds"] = _median(contender.draw, options.images, steps=steps)
    found["wide_seconds"] = _median(contender.draw, options.images, ratio="16:9", steps=steps)
    computed, denoising = contender.denoising(steps)
    found |= {
        "computed_steps": computed,
        "step_seconds": denoising / steps,
        "tflop_a_step": operations / 1e12,
        "tflops": operations * computed / denoising / 1e12,
        "peak_bytes": _peak(),
    }
    if model == "dev":
        found["switch"] = contender.switching(options.images)
        if isinstance(contender, Ours):
            found["custom"] = contender.custom_sizes()
    if options.trace and model == "dev":
        _trace(lambda: contender.draw(0, steps=2))
    print(json.dumps({options.row: {model: found}}, indent=2), flush=True)
    return found


class Resident:
    """A placement of weights that are on the device from the start and have no files."""

    choice = Choice(PLANS[0], strips=False, kept=True, stay=0, device=0, host=0)
    streams_transformers = False

    def __init__(self, model: str, pipeline: Any, scheme: Scheme | None) -> None:
        self.drawing = (model,)
        self._schemes = {model: scheme}
        self._modules = {
            model: ("transformer", pipeline.transformer),
            "text_encoder": ("text_encoder", pipeline.text_encoder),
            "text_encoder_2": ("text_encoder_2", pipeline.text_encoder_2),
        }

    def merging(self, key: str) -> MergedModule:
        """What merges adapters into a network."""
        component, module = self._modules[key]
        return MergedModule(component, module, {}, self._schemes.get(key))

    def fuse_projections(self) -> None:
        """Compute query, key and value as one."""
        for model in self.drawing:
            projections.fuse(self._modules[model][1])

    def enter(self, model: str) -> None:
        """All is there."""

    def encoded(self) -> None:
        """All stays."""

    def surviving(self, work: Callable[[], Any], before_retry: Callable[[], None] | None = None) -> Any:  # noqa: ARG002
        """Run out of memory like anything else."""
        return work()


class Ours:
    """This project, with one model loaded and the pristine weights where there is room for them."""

    def __init__(self, profile: str, model: str, pipeline: Any, files: list[Path], folder: Path) -> None:
        loaded = assembling.Checkpoints({model: pipeline}, {model: {}}, {model: "random"}, [])
        settings = Settings(weights=folder, profile=profile, device=str(pipeline.device))
        built = mock.patch.object(assembling, "assemble", return_value=loaded)
        placed = mock.patch.object(
            placement, "place", return_value=Resident(model, pipeline, profiles.PROFILES[profile].scheme)
        )
        with built, placed:
            self.generator = Generator(settings, str(files[0]), log=lambda line: print(f"  {line}", flush=True))
        self.generator._log = lambda _: None
        self._model = model
        self._adapters = [self.generator._library.read(file) for file in files]
        self._metrics: dict[str, Any] = {}

    def draw(self, turn: int, ratio: str = "1:1", steps: int = 4, **inputs: Any) -> None:
        """Draw one image with the first LoRA, the checker off."""
        asked = {"prompt": f"picture {turn}", "seed": turn % 100, "model": self._model, "num_inference_steps": steps}
        request = Request.parse(**asked | {"aspect_ratio": ratio, "disable_safety_checker": True} | inputs)
        self.generator.draw(request, self._metrics.__setitem__)

    def denoising(self, steps: int) -> tuple[int, float]:
        """Steps that were computed, and the seconds of all."""
        self.draw(0, steps=steps)
        return steps - self._metrics["reused_steps"], self._metrics["denoise_seconds"]

    def switching(self, times: int) -> dict[str, float]:
        """Seconds to another LoRA and to another scale, from pristine weights on the device and in pinned memory."""
        merged = self.generator._transformers[self._model]
        found = {}
        for place in ("device", "host"):
            if place == "host":
                _to_pinned_memory(merged)
                _free()
            places = {kept.device.type for kept in merged._pristine.values() if isinstance(kept, torch.Tensor)}
            found[f"pristine_{place}"] = "/".join(sorted(places))
            found |= {f"{kind}_{place}_seconds": seconds for kind, seconds in self._switching(merged, times)}
        return found

    def _switching(self, merged: MergedModule, times: int) -> Iterator[tuple[str, float]]:
        first, second = self._adapters
        for adapter in (second, first):  # whatever is read or allocated once
            merged.bring([(adapter, 1.0)])
        adapters = (first, second)
        yield "switch", _median(lambda turn: merged.bring([(adapters[(turn + 1) % 2], 1.0)]), times)
        yield "scale", _median(lambda turn: merged.bring([(first, 0.5 + turn / 100)]), times)

    def custom_sizes(self) -> list[dict[str, Any]]:
        """What a size beyond the eleven costs the first time, and again."""
        found = []
        for width, height in CUSTOM:
            inputs = {"ratio": "custom", "width": width, "height": height, "steps": 1}
            seconds = []
            for turn in range(2):
                seconds.append(_seconds(lambda turn=turn, inputs=inputs: self.draw(turn, **inputs)))
                if turn == 0:
                    recompilations = self._metrics["recompilations"]
            size = f"{width}x{height}"
            found.append({"size": size, "first": seconds[0], "again": seconds[1], "recompilations": recompilations})
        return found


class Peer:
    """Plain diffusers with a PEFT adapter: as it is (peer 1), or compiled and hot-swappable (peer 2), also in fp8."""

    def __init__(self, row: str, _: str, pipeline: Any, files: list[Path], folder: Path) -> None:
        self._row, self._pipeline, self._files, self._folder = row, pipeline, files, folder
        if row == "peer2-fp8":
            _quantize_by_torchao(pipeline.transformer)
        if row != "peer1":
            pipeline.enable_lora_hotswap(target_rank=RANK)
        pipeline.load_lora_weights(files[0], adapter_name="lora")
        if row != "peer1":
            tokens, cache = _tokens(pipeline, "1:1") + MAX_TEXT_TOKENS["dev"], Settings().cache
            attention.set_fastest([pipeline.transformer], tokens, pipeline.device, exact=True, folder=cache)
            pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
            pipeline.vae.decoder.compile(dynamic=True)
        self.draw = _diffusers_draw(pipeline, folder=self._folder)

    def denoising(self, steps: int) -> tuple[int, float]:
        """Steps that were computed, and the seconds of all."""
        pipeline = self._pipeline
        tokens, pooled, _ = pipeline.encode_prompt("picture 0", None, max_sequence_length=_text_tokens(pipeline))
        inputs = {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled, "output_type": "latent"}
        size = {"width": 1024, "height": 1024, "num_inference_steps": steps}
        return steps, _seconds(lambda: pipeline(**inputs, **size))

    def switching(self, times: int) -> dict[str, float]:
        """Seconds to another LoRA and to another scale."""

        def switch(turn: int) -> None:
            file = self._files[(turn + 1) % 2]
            if self._row == "peer1":
                self._pipeline.unload_lora_weights()
                self._pipeline.load_lora_weights(file, adapter_name="lora")
            else:
                self._pipeline.load_lora_weights(file, adapter_name="lora", hotswap=True)

        scale = _median(lambda turn: self._pipeline.set_adapters("lora", 0.5 + turn / 100), times)
        return {"switch_device_seconds": _median(switch, times), "scale_device_seconds": scale}


def _quantize_by_torchao(transformer: Any) -> None:
    """fp8 with a scale for each row, as the public recipe has it, of the layers that ours quantizes."""
    try:
        # Not among the project's requirements: diffusers imports it wherever it is, and it warns at every start.
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quant_api, quantize_
    except ImportError:
        raise SystemExit("peer2-fp8 needs torchao: .venv/bin/pip install torchao==0.18.0") from None
    chosen = set(quantization.quantizable(transformer))
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    # On a CPU, where only the benchmark itself is tried, torchao computes the same slowly, but asks for a GPU first.
    asking = nullcontext() if torch.cuda.is_available() else mock.patch.object(quant_api, "_check_hardware_support")
    with asking:
        quantize_(transformer, config, filter_fn=lambda _, name: name in chosen)


def _diffusers_draw(pipeline: Any, folder: Path) -> Draw:
    def draw(turn: int, ratio: str = "1:1", steps: int = 4) -> None:
        width, height = SIZES[ratio]
        image = pipeline(
            f"picture {turn}",
            width=width,
            height=height,
            num_inference_steps=steps,
            max_sequence_length=_text_tokens(pipeline),
            generator=torch.Generator("cpu").manual_seed(turn % 100),
        ).images[0]
        image.save(folder / "picture.webp", quality=80)

    return draw


def _loras(transformer: Any, folder: Path) -> list[Path]:
    files = [folder / "first.safetensors", folder / "second.safetensors"]
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        save_file(random_lora(transformer, rank=RANK), file)
    return files


def _to_pinned_memory(merged: MergedModule) -> None:
    """Keep the pristine weights where they would be with two models loaded."""
    for name, kept in merged._pristine.items():
        if isinstance(kept, torch.Tensor) and kept.device.type == "cuda":
            merged._pristine[name] = torch.empty_like(kept, device="cpu", pin_memory=True).copy_(kept)


def _tokens(pipeline: Any, ratio: str) -> int:
    width, height = SIZES[ratio]
    return width * height // (2 * pipeline.vae_scale_factor) ** 2


def _text_tokens(pipeline: Any) -> int:
    return MAX_TEXT_TOKENS["dev" if pipeline.transformer.config.guidance_embeds else "schnell"]


# The first image of a fresh process


def _in_fresh_process(options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.gpu", options.row, "--first", *(["--small"] if options.small else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _first_image(options: argparse.Namespace) -> float:
    """From weights on the device, and code compiled by another process, to the first file."""
    pipeline = full_size.build("dev", _device(options), _dtype(options), small=options.small)
    pipeline.set_progress_bar_config(disable=True)
    with TemporaryDirectory() as folder:
        files = _loras(pipeline.transformer, Path(folder))
        started = time.perf_counter()
        contender = (Ours if options.row in OURS else Peer)(options.row, "dev", pipeline, files, Path(folder))
        contender.draw(0, steps=STEPS["dev"])
        return time.perf_counter() - started


# Measuring


def _matrix_rate(device: torch.device, *, small: bool) -> float:
    """TFLOP/s of a large product in the model's type: the median of 20."""
    size, dtype = (512, torch.float32) if small else (8192, torch.bfloat16)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = _median(lambda _: torch.mm(left, right), 20)
    return 2 * size**3 / seconds / 1e12


def _projections(device: torch.device, *, small: bool) -> dict[str, float]:
    """Seconds of a block's three projections one by one, and as one product: whether fusing them pays."""
    tokens, width = (768, 64) if small else (4608, 3072)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    schemes: tuple[Scheme | None, ...] = (None, "fp8")
    return {
        f"{scheme or 'plain'}_{kind}_seconds": projections.time_projection(kind, tokens, width, dtype, scheme, device)
        for scheme in schemes
        for kind in ("separate", "fused")
    }


def _median(work: Callable[..., object], times: int, **options: Any) -> float:
    work(-1, **options)
    return statistics.median(_seconds(lambda turn=turn: work(turn, **options)) for turn in range(times))


def _seconds(work: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


@contextmanager
def _profiler() -> Iterator[torch.profiler.profile]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        yield profile


def _trace(work: Callable[[], object]) -> None:
    """Print the kernels that take most of the time."""
    with _profiler() as profile:
        work()
        _wait()
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=80))


if __name__ == "__main__":
    sys.exit(main())
