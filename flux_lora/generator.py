"""The story: a request -> its picture read -> its adapters merged -> images drawn -> checked -> files."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux_lora.adapters import Adapters
from flux_lora.beside import Beside, result, succeeded
from flux_lora.device import devices
from flux_lora.drawing.image import Start, denoise, encode, image_tokens
from flux_lora.drawing.pipeline import Pipeline, Pipelines
from flux_lora.drawing.prompts import Embeddings, PromptEncoder, read_part, unknown_words
from flux_lora.drawing.schedule import steps_run
from flux_lora.drawing.source import Given, Pictures
from flux_lora.errors import SafetyError, WeightsError
from flux_lora.files import outputs
from flux_lora.files.record import Environment, Lora, Parameters, Source
from flux_lora.finishing import Drawn, Finisher
from flux_lora.ledger import Finished, Ledger, Log, Record
from flux_lora.lora.formats.triggers import without_trigger
from flux_lora.lora.merge import AdapterSet, MergedModule
from flux_lora.memory.placement import Placement, refusing
from flux_lora.request import Request
from flux_lora.speed import compilation, step_cache

FEW_TOKENS = 128
"""Patches below which a picture stays poor or empty; FLUX.1 has 256 of them at 256×256, the miniature 16."""


@dataclass(frozen=True)
class Step:
    """A step of the scheduler that was just taken, as an observer sees it."""

    image: int
    """Which of the request's images, from 1."""
    images: int
    step: int
    """Which step of that image, from 1."""
    steps: int
    """How many are taken: fewer than were asked for where it starts from another image."""
    size: tuple[int, int]
    """Of each image, width and height in pixels."""
    latents: Tensor
    """(1, h/2·w/2, 4C), packed as tokens; not to be changed."""


Observer = Callable[[Step], None]
"""Called after each step; what it raises ends the request and comes out of `Generator.draw`."""


@dataclass(frozen=True)
class Task:
    """A request, and what it comes to once its picture is read."""

    request: Request
    given: Given | None
    """The picture that is seen while drawing; None: it is drawn from noise alone."""
    size: tuple[int, int]
    """Of each image, width and height in pixels."""
    schedule: step_cache.Schedule | None
    """Of the steps that are extrapolated."""

    @property
    def steps(self) -> int:
        """How many steps are taken for each image."""
        asked = self.request.num_inference_steps
        return steps_run(asked, self.given.source.strength) if self.given else asked


@dataclass(frozen=True)
class Parts:
    """What a generator works with; `flux_lora.assembly` makes and connects them."""

    device: torch.device
    pipelines: Pipelines
    memory: Placement
    """Says where the weights of all networks live, and brings them to the device."""
    transformers: Mapping[str, MergedModule]
    """By model: what merges adapters into its transformer."""
    encoders: Mapping[str, MergedModule]
    """By component: what merges adapters into a text encoder."""
    pictures: Pictures
    adapters: Adapters
    prompts: PromptEncoder
    beside: Beside
    """The thread that reads prompts and finishes images."""
    finisher: Finisher
    outputs: outputs.Outputs
    environments: Mapping[str, Environment]
    """By model: what may change its pictures although the request is the same."""
    schedule: step_cache.Schedule | None
    """Of the steps that are extrapolated; None: every step is computed."""
    allow: Callable[[Request], None]
    """Raises `RequestError` for what the operator does not allow."""
    log: Log
    webp_method: int | None = None
    """libwebp's effort for all files; None: what suits their quality."""
    known_words: frozenset[str] | None = None
    """All words that the models know, where they are few and listed."""


class Generator:
    """FLUX.1 dev and schnell with a fine-tune, ready to draw; one request at a time."""

    def __init__(self, parts: Parts) -> None:
        """Take the parts, all of them ready; `flux_lora.assembly.assemble` makes them from settings."""
        self.parts = parts

    def draw(self, request: Request, record: Record = lambda *_: None, observer: Observer | None = None) -> list[Path]:
        """Draw a request's images, in the order of their seeds.

        The files lie in a directory of this request's own, which stays until the next request starts.

        Args:
            request: what is asked.
            record: receives the metrics by name, also when drawing fails.
            observer: called after each step; it ends the request by raising.

        Raises:
            FluxLoraError: the request cannot be drawn, or all of its images were withheld.
        """
        self.parts.allow(request)
        memory, environment = self.parts.memory, next(iter(self.parts.environments.values()))
        ledger = Ledger(record, self.parts.log)
        images: list[Future[Finished]] = []
        size = request.size
        graphs = compilation.graphs()
        record("seed", request.seed)
        record("profile", environment.profile)
        record("attention", environment.attention)
        try:
            self._clear(images)  # a request that was cancelled may have left something
            task = self._read_picture(request, ledger)
            size = task.size
            return memory.serve(
                lambda: self._draw(task, ledger, images, observer), before_retry=lambda: self._clear(images)
            )
        except BaseException:
            self.parts.outputs.discard()
            raise
        finally:
            record("memory_plan", memory.choice.label)
            ledger.close([image.result() for image in images if succeeded(image)], size)
            for image in images:
                image.cancel()
            record("recompilations", compilation.graphs() - graphs)

    def healthy(self) -> bool:
        """Say whether the device still computes: a GPU that has failed once does not."""
        return devices.computes(self.parts.device)

    def _read_picture(self, request: Request, ledger: Ledger) -> Task:
        """Get the picture that a request starts from, if there is one, and what follows from it."""
        with ledger.timed("source"):
            given = self.parts.pictures.read(request, ledger.log)
        seen = given.seen(request.num_inference_steps) if given else None
        if given and not seen:
            ledger.log(
                f"the image gives the size alone: prompt_strength {given.source.strength:g} runs all "
                f"{request.num_inference_steps} steps, which begin with noise"
            )
        schedule = self.parts.schedule or (step_cache.Schedule() if request.go_fast else None)
        return Task(request, seen, given.source.pixels.size if given else request.size, schedule)

    def _draw(
        self, task: Task, ledger: Ledger, images: list[Future[Finished]], observer: Observer | None
    ) -> list[Path]:
        request = task.request
        parts, pipeline = self.parts, self._pipeline(request.model)
        directory = parts.outputs.start()
        overlap = parts.memory.choice.plan.overlap
        self._announce(task, ledger)

        # 1. The adapters, merged into what this request uses: first into what reads the prompt.
        own = any(source and scale for source, scale in request.adapters)
        with ledger.timed("adapter"):
            with _own_fault(own):
                adapters = parts.adapters.read(request.adapters, ledger.log)
            for adapter, scale in adapters:
                if scale and (note := without_trigger(request.prompt, adapter.triggers)):
                    ledger.log(note)
            parts.memory.load_model(request.model)
            with _own_fault(own):
                _merge(parts.encoders, adapters, ledger)

        # 2. The prompt, read while the adapters are merged into the transformer, too.
        with ledger.timed("text"):
            reading = self._submit_reading(pipeline, request, adapters, ledger)
            if not overlap:
                result(reading)
        with ledger.timed("adapter"), _own_fault(own):
            _merge({request.model: parts.transformers[request.model]}, adapters, ledger)
        with ledger.timed("text"):
            embeddings = result(reading)
            parts.memory.after_encoding()

        # 3. The picture that all images start from, if there is one, as latents.
        with ledger.timed("source"):
            start = encode(pipeline, task.given.source, parts.memory.choice.strips) if task.given else None

        # 4. Each image by itself; while one is denoised, the one before is decoded, checked and saved.
        all_reused = 0
        for index, seed in enumerate(request.seeds):
            latents, reused = self._denoise(pipeline, embeddings, start, task, index, ledger, observer)
            all_reused += reused
            ledger.record("reused_steps", all_reused)
            drawn = Drawn(
                latents,
                self._parameters(task, seed, adapters, reused),
                directory / outputs.file_name(index, seed, request.output_format),
                check=not request.disable_safety_checker,
                in_strips=parts.memory.choice.strips,
                given=task.given,
            )
            images.append(parts.finisher.submit(pipeline, drawn))
            for image in images:
                if image.done():
                    image.result()  # a full disk is not worth another image
            if not overlap:
                result(images[-1])

        # 5. The files, in the order of the seeds.
        paths = [image.path for image in map(result, images) if image.path]
        if not paths:
            raise SafetyError(
                f"The safety checker withheld every image (seed {', '.join(map(str, request.seeds))}). Try another "
                "prompt or another seed."
            )
        parts.outputs.require(paths)
        return paths

    def _clear(self, images: list[Future[Finished]]) -> None:
        """Wait for what was begun beside, and forget all of it."""
        self.parts.beside.clear()
        images.clear()

    def _pipeline(self, model: str) -> Pipeline:
        if model not in self.parts.pipelines:
            raise WeightsError(
                f"The model {model} is not on this server. Ask for model={next(iter(self.parts.pipelines))}, or fetch "
                f"it with `scripts/download_weights {model}` and start again."
            )
        return self.parts.pipelines[model]

    def _announce(self, task: Task, ledger: Ledger) -> None:
        request, (width, height) = task.request, task.size
        steps = f"{task.steps} of {request.num_inference_steps}" if task.given else str(task.steps)
        ledger.log(f"seed: {request.seed}")
        ledger.log(f"size: {width}×{height}, {request.num_outputs} × {request.model}, {steps} steps")
        if request.go_fast and task.schedule and not task.schedule.reused(task.steps):
            ledger.log(f"go_fast has no effect: {task.steps} steps are too few to reuse any")
        for note in request.notes:
            ledger.log(note)
        if (known := self.parts.known_words) and (strange := unknown_words(request.prompt, known)):
            ledger.log(f"this model knows {len(known)} words, in small letters, and not: {strange}")
        if request.model == "dev" and not self._has_guidance("dev"):
            ledger.log("guidance_scale is ignored: the dev model of this server has no guidance input")
        tokens = image_tokens(self.parts.pipelines[request.model], task.size)
        if tokens < FEW_TOKENS:
            ledger.log(
                f"this model sees {width}×{height} as {tokens} patches, too few to show much: ask for about a megapixel"
            )

    def _submit_reading(
        self, pipeline: Pipeline, request: Request, adapters: AdapterSet, ledger: Ledger
    ) -> Future[Embeddings]:
        """Have the prompt encoded, beside, by text encoders that hold the adapters."""
        text, cut = read_part(pipeline.tokenizer_2, request.prompt, request.max_text_tokens)
        if cut:
            ledger.log(f"T5 reads {request.max_text_tokens} tokens; cut off are the prompt's last {cut}")
        states = tuple(encoder.state_of(adapters) for encoder in self.parts.encoders.values())
        return self.parts.beside.submit(self.parts.prompts.encode, pipeline, text, request.max_text_tokens, states)

    def _denoise(
        self,
        pipeline: Pipeline,
        embeddings: Embeddings,
        start: Start | None,
        task: Task,
        index: int,
        ledger: Ledger,
        observer: Observer | None,
    ) -> tuple[Tensor, int]:
        """Draw the latents of one image; returns them, and how many steps reused what was computed before."""
        request, steps = task.request, task.steps
        images, seed = request.num_outputs, request.seeds[index]

        def observe(step: int, latents: Tensor) -> None:
            if observer:
                observer(Step(index + 1, images, step, steps, task.size, latents))

        counting = step_cache.counting(pipeline.transformer, steps, task.schedule)
        with ledger.timed("denoise"), counting as computed:
            latents = denoise(
                pipeline,
                embeddings,
                seed,
                task.size,
                steps=request.num_inference_steps,
                guidance=request.guidance_scale,
                title=f"image {index + 1}/{images}",
                start=start,
                after_step=observe if observer else None,
            )
        reused = steps - computed.steps
        if reused:
            ledger.log(f"seed {seed}: {reused} of {steps} steps reuse what was computed before")
        return latents, reused

    def _has_guidance(self, model: str) -> bool:
        return bool(self.parts.pipelines[model].transformer.config.guidance_embeds)

    def _parameters(self, task: Task, seed: int, adapters: AdapterSet, reused: int) -> Parameters:
        request, given, (width, height) = task.request, task.given, task.size
        loras = [
            Lora(digest=adapter.digest, scale=scale, name=adapter.name, data_digest=adapter.data_digest)
            for adapter, scale in adapters
            if scale
        ]
        environment = self.parts.environments[request.model]
        return Parameters(
            prompt=request.prompt,
            seed=seed,
            width=width,
            height=height,
            model=request.model,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale if self._has_guidance(request.model) else None,
            loras=tuple(loras),
            source=given
            and Source(
                image=given.image_digest,
                mask=given.mask_digest,
                prompt_strength=given.source.strength,
                megapixels=request.megapixels,
            ),
            go_fast=request.go_fast,
            reused_steps=reused,
            output_format=request.output_format,
            output_quality=None if request.output_format == "png" else request.output_quality,
            webp_method=self._webp_method(request) if request.output_format == "webp" else None,
            environment=environment.model_copy(update={"memory": self.parts.memory.choice.label}),
        )

    def _webp_method(self, request: Request) -> int:
        chosen = self.parts.webp_method
        return outputs.webp_method(request.output_quality) if chosen is None else chosen


def _own_fault(brings: bool) -> AbstractContextManager[None]:
    """While what a request brings is merged: running out of memory is the request's fault, if it brings anything."""
    return refusing("The LoRA of this request") if brings else nullcontext()


def _merge(networks: Mapping[str, MergedModule], adapters: AdapterSet, ledger: Ledger) -> None:
    """Bring networks to a set of adapters, and touch nothing else."""
    held = " and ".join(f"LoRA {adapter.digest[:12]} at {scale:g}" for adapter, scale in adapters if scale)
    for name, network in networks.items():
        if network.bring(adapters):
            ledger.log(f"{name} now holds {held or 'no LoRA'}; {network.where()}")
