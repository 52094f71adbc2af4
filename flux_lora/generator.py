"""The story: a request -> its fine-tune merged -> images drawn -> checked -> files."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from flux_lora.checkpoint import assembling, download
from flux_lora.device import devices
from flux_lora.drawing import safety
from flux_lora.drawing.image import decode, denoise
from flux_lora.drawing.prompts import Encoded, PromptEncoder, readable
from flux_lora.errors import DrawingError, SafetyError, WeightsError
from flux_lora.files import outputs
from flux_lora.files.record import Environment, Lora, Parameters, Software
from flux_lora.lora.formats import Adapter
from flux_lora.lora.library import AdapterLibrary
from flux_lora.lora.merge import AdapterSet, MergedModule
from flux_lora.memory import placement
from flux_lora.request import MAX_TEXT_TOKENS, SIZES, Request
from flux_lora.settings import Settings
from flux_lora.sources import Sources
from flux_lora.sources.address import label
from flux_lora.speed import attention, compilation, profiles, projections, step_cache

BUNDLED = "lora.safetensors"
"""The fine-tune's file in a weights directory."""

ENCODERS = ("text_encoder", "text_encoder_2")
STAGES = ("adapter", "text", "denoise", "decode", "safety", "save")

WARM_UP_SIZE = SIZES["16:9"]
"""Its sides differ, so that compiled code takes neither for the other."""

Metric = int | float | str | list[int]
Record = Callable[[str, Metric], None]
Log = Callable[[str], None]
Seconds = dict[str, float]
Done = TypeVar("Done")


@dataclass(frozen=True)
class Finished:
    """One image after decoding, check and saving; ``path`` is None when it was withheld, and ``reason`` says why."""

    seed: int
    path: Path | None
    reason: str
    seconds: Seconds


class Generator:
    """FLUX.1 dev and schnell with a fine-tune, ready to draw; one request at a time."""

    def __init__(self, settings: Settings, fine_tune: str | None = None, log: Log = print) -> None:
        """Load the weights directory and apply the fine-tune.

        Args:
            settings: the operator's.
            fine_tune: where the fine-tune is (``COG_WEIGHTS``); None or empty: the weights directory's own, if any.
            log: receives one readable line at a time.

        Raises:
            FluxLoraError: set-up is impossible; the message says what is missing, and the command that helps.
        """
        started = time.perf_counter()
        self._settings = settings
        self._log = log
        self._device = devices.choose(settings.device)
        self._profile = profiles.choose(settings.profile, self._device)
        self._dtype = torch.bfloat16 if self._device.type == "cuda" else getattr(torch, settings.cpu_dtype)
        if settings.download:
            download.fetch_base(settings, settings.download, log)
        loaded = assembling.assemble(settings.weights, self._dtype)
        for note in loaded.notes:
            log(note)
        self._memory = placement.place(loaded, settings, self._device, self._dtype, log, self._profile.scheme)
        self._pipelines, self._fingerprints = loaded.pipelines, loaded.fingerprints
        self._transformers = {model: self._merged(model) for model in self._pipelines}
        self._encoders = {name: self._merged(name) for name in ENCODERS}
        self._prompts = PromptEncoder(settings.prompt_cache)
        self._checker = safety.load_checker(settings.weights, self._device, settings.safety_threshold)
        self._outputs = outputs.Outputs()
        self._workers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finish")
        self._writers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._sources = Sources.from_settings(settings)
        self._library = AdapterLibrary(self._shapes(), settings.adapter_memory_bytes)
        self._fine_tune = self._load_fine_tune(fine_tune)
        self._memory.surviving(self._merge_fine_tune)
        self._attention = self._choose_attention()
        if self._profile.compiled:
            self._memory.surviving(self._compile)
        precision = str(self._dtype).removeprefix("torch.")
        models = " and ".join(self._pipelines)
        speed = f"profile {self._profile.name}, attention {self._attention}"
        log(f"ready in {time.perf_counter() - started:.1f} s: {models} on {self._device} in {precision}, {speed}")

    def draw(self, request: Request, record: Record) -> list[Path]:
        """Draw a request's images, in the order of their seeds.

        The files lie in a directory of this request's own, which stays until the next request starts.

        Args:
            request: what is asked.
            record: receives the metrics by name, also when drawing fails.

        Raises:
            FluxLoraError: the request cannot be drawn, or all of its images were withheld.
        """
        seconds: Seconds = dict.fromkeys(STAGES, 0.0)
        finishing: list[Future[Finished]] = []
        graphs = compilation.graphs()
        record("seed", request.seed)
        record("profile", self._profile.name)
        record("attention", self._attention)
        try:
            return self._memory.surviving(
                lambda: self._draw(request, seconds, finishing, record), before_retry=lambda: self._rest(finishing)
            )
        except BaseException:
            self._outputs.discard()
            raise
        finally:
            record("memory_plan", self._memory.choice.label)
            self._account(request, seconds, finishing, record)
            record("recompilations", compilation.graphs() - graphs)

    def healthy(self) -> bool:
        """Say whether the device still computes: a GPU that has failed once does not."""
        return devices.computes(self._device)

    # The story

    def _draw(
        self, request: Request, seconds: Seconds, finishing: list[Future[Finished]], record: Record
    ) -> list[Path]:
        self._rest(finishing)  # a request that was cancelled may have left something
        directory = self._outputs.start()
        pipeline = self._pipeline(request.model)
        overlap = self._memory.choice.plan.overlap
        self._announce(request)

        # 1. The fine-tune, merged into what this request uses: first into what reads the prompt.
        with _timed(seconds, "adapter"):
            adapter = self._adapter(request.replicate_weights)
            adapters = _set_of(adapter, request.lora_scale)
            self._memory.enter(request.model)
            self._merge(self._encoders, adapters)

        # 2. The prompt, read while the fine-tune is merged into the transformer, too.
        with _timed(seconds, "text"):
            encoding = self._submit_reading(pipeline, request, adapters)
            if not overlap:
                _result(encoding)
        with _timed(seconds, "adapter"):
            self._merge({request.model: self._transformers[request.model]}, adapters)
        with _timed(seconds, "text"):
            encoded = _result(encoding)
            self._memory.encoded()

        # 3. Each image by itself; while one is denoised, the one before is decoded, checked and saved.
        reused, steps = 0, request.num_inference_steps
        for index, seed in enumerate(request.seeds):
            counting = step_cache.counting(pipeline.transformer, steps, self._profile.schedule)
            with _timed(seconds, "denoise"), counting as computed:
                latents = denoise(
                    pipeline,
                    encoded,
                    seed,
                    request.size,
                    steps=steps,
                    guidance=request.guidance_scale,
                    title=f"image {index + 1}/{request.num_outputs}",
                )
            reused += steps - computed.steps
            record("reused_steps", reused)
            if computed.steps < steps:
                self._log(f"seed {seed}: {steps - computed.steps} of {steps} steps reuse what was computed before")
            path = directory / outputs.file_name(index, seed, request.output_format)
            parameters = self._parameters(request, seed, adapter)
            check = not request.disable_safety_checker
            finishing.append(self._workers.submit(self._finish, pipeline, latents, path, parameters, check))
            for future in finishing:
                if future.done():
                    future.result()  # a full disk is not worth another image
            if not overlap:
                _result(finishing[-1])

        # 4. The files, in the order of the seeds.
        finished = [_result(future) for future in finishing]
        paths = [image.path for image in finished if image.path]
        if not paths:
            raise SafetyError(
                f"The safety checker withheld every image (seed {', '.join(map(str, request.seeds))}). Try another "
                "prompt or another seed."
            )
        self._outputs.require(paths)
        return paths

    # Set-up

    def _merged(self, key: str) -> MergedModule:
        placed = self._memory.placed(key)
        network = placed.network
        merged = MergedModule(placed.component, network.module, network.readers, device=self._device, base=placed.base)
        placed.when_unloaded.append(merged.forget)
        return merged

    def _shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        transformer: dict[str, tuple[int, ...]] = {}
        for merged in self._transformers.values():
            transformer |= merged.shapes
        return {"transformer": transformer, **{name: merged.shapes for name, merged in self._encoders.items()}}

    def _load_fine_tune(self, fine_tune: str | None) -> Adapter | None:
        bundled = self._settings.weights / BUNDLED
        if fine_tune:
            here = os.path.join(self._settings.weights, fine_tune)  # noqa: PTH118 - a data: URI is too long for a Path
            source = here if os.path.isfile(here) else fine_tune  # noqa: PTH113
            adapter = self._library.read(self._sources.fetch(source, root=None), label(fine_tune))
        elif bundled.exists() or bundled.is_symlink():
            adapter = self._library.read(bundled)
        else:
            self._log(f"fine-tune: none, so the base model alone: no {bundled}, and COG_WEIGHTS is not set")
            return None
        self._log(f"fine-tune: {adapter.summary}")
        return adapter

    def _merge_fine_tune(self) -> None:
        drawing = {model: self._transformers[model] for model in self._memory.drawing}
        self._merge(self._encoders | drawing, _set_of(self._fine_tune, scale=1.0))

    def _choose_attention(self) -> str:
        """How the transformers compute attention from now on: the kernel's name, and whether q, k, v are fused."""
        if not self._profile.compiled:
            return attention.DEFAULT
        pipeline = next(iter(self._pipelines.values()))
        width, height = SIZES["1:1"]
        tokens = width * height // (2 * pipeline.vae_scale_factor) ** 2 + MAX_TEXT_TOKENS["dev"]
        transformers = [pipeline.transformer for pipeline in self._pipelines.values()]
        exact, folder = self._profile.exact_attention, self._settings.cache
        name, measured = attention.set_fastest(transformers, tokens, self._device, exact=exact, folder=folder)
        if measured:
            self._log(f"attention: {name} is the fastest here; kept in {folder}")
        if self._memory.streams_transformers:
            return name
        scheme = self._profile.scheme
        projected, measured = projections.choose(pipeline.transformer, tokens, scheme, self._device, folder)
        if measured:
            self._log(f"query, key and value: {projected} is the fastest here; kept in {folder}")
        if projected == "separate":
            return name
        self._memory.fuse_projections()
        return f"{name}, fused qkv"

    def _compile(self) -> None:
        """Compile what draws and decodes, by drawing one step with each model."""
        started = time.perf_counter()
        self._log("compiling; the first time on a machine this takes a while")
        key = "; ".join(
            (devices.describe(self._device), repr(self._profile), str(self._dtype), str(Software.installed()))
        )
        if self._memory.streams_transformers:
            self._log("the transformer's blocks are streamed, and so not compiled")
        compilation.compile_pipelines(self._pipelines.values(), blocks=not self._memory.streams_transformers)
        with compilation.cached(self._settings.cache, key):
            compilation.warm_up(self._profile.name, self._draw_unseen)
        graphs, known = compilation.graphs(), compilation.loaded_graphs()
        self._log(f"compiled in {time.perf_counter() - started:.1f} s: {graphs} graphs, {known} of them known before")

    def _draw_unseen(self) -> None:
        """What a prediction runs, on the threads that run it."""
        for model, limit in MAX_TEXT_TOKENS.items():
            if pipeline := self._pipelines.get(model):
                self._memory.enter(model)
                encoded = self._prompts.encode(pipeline, "", limit, "warm-up")
                self._memory.encoded()
                with suppress(DrawingError):  # a fine-tune's fault, which those who ask for it are told
                    latents = denoise(pipeline, encoded, 0, WARM_UP_SIZE, steps=1, guidance=0.0, title="warm-up")
                    strips = self._memory.choice.strips
                    self._workers.submit(decode, pipeline, latents, WARM_UP_SIZE, strips).result()

    # Parts of the story

    def _pipeline(self, model: str) -> Any:
        if model not in self._pipelines:
            raise WeightsError(
                f"The model {model} is not on this server. Ask for model={next(iter(self._pipelines))}, or fetch it "
                f"with `scripts/download_weights {model}` and start again."
            )
        return self._pipelines[model]

    def _announce(self, request: Request) -> None:
        width, height = request.size
        self._log(f"seed: {request.seed}")
        self._log(
            f"size: {width}×{height}, {request.num_outputs} × {request.model}, {request.num_inference_steps} steps"
        )
        for note in request.ignored:
            self._log(note)
        if request.model == "dev" and not self._has_guidance("dev"):
            self._log("guidance_scale is ignored: the dev model of this server has no guidance input")

    def _adapter(self, source: str | None) -> Adapter | None:
        if source is None:
            return self._fine_tune
        adapter = self._library.read(self._sources.fetch(source, root=self._settings.weights), label(source))
        self._log(f"LoRA of this request: {adapter.summary}")
        return adapter

    def _merge(self, networks: Mapping[str, MergedModule], adapters: AdapterSet) -> None:
        """Bring networks to a set of adapters, and touch nothing else."""
        merged = ", ".join(f"{adapter.digest[:12]} at {scale:g}" for adapter, scale in adapters if scale) or "none"
        for name, network in networks.items():
            if network.bring(adapters):
                self._log(f"LoRA: {merged}; merged into {name} ({network.where()})")

    def _submit_reading(self, pipeline: Any, request: Request, adapters: AdapterSet) -> Future[Encoded]:
        """Have the prompt encoded by text encoders that hold the adapters."""
        text, lost = readable(pipeline.tokenizer_2, request.prompt, request.max_text_tokens)
        if lost:
            self._log(f"T5 reads {request.max_text_tokens} tokens; cut off are the prompt's last {lost}")
        encoders = tuple(merged.state_of(adapters) for merged in self._encoders.values())
        return self._workers.submit(self._prompts.encode, pipeline, text, request.max_text_tokens, encoders)

    def _rest(self, finishing: list[Future[Finished]]) -> None:
        """Wait for what the workers have begun, and forget all of it."""
        for future in finishing:
            future.cancel()
        finishing.clear()
        _result(self._workers.submit(bool))

    def _has_guidance(self, model: str) -> bool:
        return bool(self._pipelines[model].transformer.config.guidance_embeds)

    def _parameters(self, request: Request, seed: int, adapter: Adapter | None) -> Parameters:
        width, height = request.size
        return Parameters(
            prompt=request.prompt,
            seed=seed,
            width=width,
            height=height,
            model=request.model,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale if self._has_guidance(request.model) else None,
            lora=Lora(digest=adapter.digest, scale=request.lora_scale) if adapter and request.lora_scale else None,
            output_format=request.output_format,
            output_quality=None if request.output_format == "png" else request.output_quality,
            environment=Environment(
                base=self._fingerprints[request.model],
                device=devices.describe(self._device),
                dtype=str(self._dtype).removeprefix("torch."),
                profile=self._profile.name,
                attention=self._attention,
                memory=self._memory.choice.label,
                software=Software.installed(),
            ),
        )

    def _finish(self, pipeline: Any, latents: Tensor, path: Path, parameters: Parameters, check: bool) -> Finished:
        """On a worker: latents -> image -> checked -> file."""
        seconds: Seconds = defaultdict(float)
        with _timed(seconds, "decode"):
            image = decode(pipeline, latents, (parameters.width, parameters.height), self._memory.choice.strips)
        content = self._writers.submit(outputs.encode, image, parameters, embed=self._settings.embed_parameters)
        if check:
            with _timed(seconds, "safety"):
                verdict = safety.judge(self._checker, image)
            if not verdict.allowed:
                return Finished(parameters.seed, None, verdict.reason, seconds)
        with _timed(seconds, "save"):
            outputs.write(content.result(), path)
        return Finished(parameters.seed, path, "", seconds)

    def _account(self, request: Request, seconds: Seconds, finishing: list[Future[Finished]], record: Record) -> None:
        """Record what was done, also of a request that failed half-way, and take back what was not begun."""
        finished = [future.result() for future in finishing if not future.cancel() and _succeeded(future)]
        for image in finished:
            for stage, spent in image.seconds.items():
                seconds[stage] += spent
            if not image.path:
                self._log(f"withheld: the image of seed {image.seed}: {image.reason}")
        images = sum(image.path is not None for image in finished)
        width, height = request.size
        record("withheld_seeds", [image.seed for image in finished if not image.path])
        record("images", images)
        record("megapixels", round(images * width * height / 1e6, 6))
        for stage, spent in seconds.items():
            record(f"{stage}_seconds", round(spent, 4))
        self._log("seconds: " + ", ".join(f"{stage} {spent:.2f}" for stage, spent in seconds.items()))


def _set_of(adapter: Adapter | None, scale: float) -> AdapterSet:
    return [(adapter, scale)] if adapter else []


def _succeeded(future: Future[Finished]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _result(future: Future[Done]) -> Done:
    """Wait in short turns: a prediction is cancelled by an exception, which a blocking wait would hold back."""
    while True:
        try:
            return future.result(timeout=0.1)
        except StillRunning:
            if future.done():
                raise


@contextmanager
def _timed(seconds: Seconds, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - started
