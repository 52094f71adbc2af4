"""Settings -> a generator that is ready to draw: the one place where the parts are made and connected.

Whoever wants another part (a test, a benchmark, a service) wires another one in the same way.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from flux_lora import rules
from flux_lora.adapters import Adapters
from flux_lora.beside import Beside
from flux_lora.checkpoint import download
from flux_lora.checkpoint.assembling import Checkpoints, open_directory
from flux_lora.checkpoint.components import ENCODERS
from flux_lora.device import devices
from flux_lora.drawing import safety
from flux_lora.drawing.image import decode, denoise, image_tokens
from flux_lora.drawing.pipeline import Pipelines
from flux_lora.drawing.prompts import PromptEncoder
from flux_lora.errors import DrawingError
from flux_lora.files.outputs import Outputs
from flux_lora.files.record import Environment, Software
from flux_lora.files.signing import Signer
from flux_lora.finishing import Finisher
from flux_lora.generator import Generator, Parts
from flux_lora.ledger import Log
from flux_lora.lora import fused
from flux_lora.lora.library import AdapterLibrary
from flux_lora.lora.merge import MergedModule
from flux_lora.memory import placement
from flux_lora.memory.placement import Placement
from flux_lora.memory.plans import Room
from flux_lora.pictures import Pictures
from flux_lora.request import MAX_TEXT_TOKENS, SIZES
from flux_lora.settings import Settings
from flux_lora.sources import Sources
from flux_lora.sources.local import operator_source
from flux_lora.speed import attention, blocks, compilation, cuda_graphs, kernels, profiles, projections
from flux_lora.speed.profiles import Profile
from flux_lora.wording import say

WARM_UP_SIZE = SIZES["16:9"]
"""Its sides differ, so that compiled code takes neither for the other."""

Open = Callable[[Path, torch.dtype], Checkpoints]
"""Opens a weights directory, or whatever takes its place: the networks without weights, and how to fill them."""


def assemble(
    settings: Settings,
    fine_tune: str | None = None,
    log: Log = say,
    *,
    open_weights: Open = open_directory,
    room: Room | None = None,
    fused_blocks: bool | None = None,
) -> Generator:
    """Load the weights directory, apply the fine-tune, and make everything ready to draw.

    Args:
        settings: the operator's.
        fine_tune: where the fine-tune is (``COG_WEIGHTS``); None or empty: the weights directory's own, if any.
        log: receives one readable line at a time.
        open_weights: where base weights come from; by default the files of the weights directory.
        room: the memory that the models may take; None: what is measured.
        fused_blocks: whether compiled blocks are computed by the fused kernels; None: where a device has programs for
            them.

    Raises:
        FluxLoraError: set-up is impossible; the message says what is missing, and the command that helps.
    """
    started = time.perf_counter()
    signer = Signer.from_settings(settings)
    device = devices.find_device(settings.device)
    profile = profiles.find_profile(settings.profile, device)
    dtype = torch.bfloat16 if device.type == "cuda" else getattr(torch, settings.cpu_dtype)
    if settings.download:
        download.fetch_base(settings, settings.download, log)

    sources = Sources.from_settings(settings)
    if fine_tune:  # a file that is missing is missed before minutes of loading
        sources.check(operator_source(fine_tune, settings.weights), root=None)
    checkpoints = open_weights(settings.weights, dtype)
    for note in checkpoints.notes:
        log(note)
    memory = placement.place(checkpoints, settings, device, dtype, log, profile.scheme, room)
    pipelines = checkpoints.pipelines
    # Programs take a compiler, which `eager` does without.
    programs = profile.compiled and fused.runs_on(device)
    if programs:
        compilation.warm_up(profile.name, lambda: fused.warm_up(device, dtype, profile.scheme))
    transformers = {model: merged_module(memory, model, device, programs=programs) for model in pipelines}
    encoders = {name: merged_module(memory, name, device, programs=programs) for name in ENCODERS}

    prompts = PromptEncoder(settings.prompt_cache)
    checker = safety.load_checker(settings.weights, device, settings.safety_threshold)
    beside = Beside("finish")
    outputs = Outputs()
    library = AdapterLibrary(_shapes(transformers, encoders), settings.adapter_memory_bytes)
    adapters = Adapters(sources, library, settings.weights)
    adapters.load_fine_tune(fine_tune, log)

    def merge_fine_tune() -> None:
        wanted = [(adapters.fine_tune, 1.0)] if adapters.fine_tune else []
        for network in (*encoders.values(), *(transformers[model] for model in memory.models_on_device)):
            network.bring(wanted)

    memory.with_fallback(merge_fine_tune)
    chosen = _choose_kernels(profile, pipelines, memory, device, settings.cache, log)
    if fused_blocks is None:
        fused_blocks = kernels.runs_on(device)
    if fused_blocks and profile.compiled and not memory.streams_transformers:
        for pipeline in pipelines.values():
            blocks.place(pipeline.transformer)
        chosen += ", fused blocks"
    if profile.compiled:
        memory.with_fallback(lambda: _compile(profile, pipelines, memory, prompts, device, dtype, settings.cache, log))
        _replay_steps(profile, pipelines, memory, beside, chosen, device, settings.cache, log)
    environments = {
        model: Environment(
            base=fingerprint,
            device=devices.describe(device),
            dtype=str(dtype).removeprefix("torch."),
            profile=profile.name,
            attention=chosen,
            software=Software.installed(),
        )
        for model, fingerprint in checkpoints.fingerprints.items()
    }
    described = f"{' and '.join(pipelines)} on {device} in {str(dtype).removeprefix('torch.')}"
    log(f"ready in {time.perf_counter() - started:.1f} s: {described}, profile {profile.name}, attention {chosen}")
    return Generator(
        Parts(
            device=device,
            pipelines=pipelines,
            memory=memory,
            transformers=transformers,
            encoders=encoders,
            pictures=Pictures(sources),
            adapters=adapters,
            prompts=prompts,
            beside=beside,
            finisher=Finisher(beside, checker, embed=settings.embed_parameters, signer=signer),
            outputs=outputs,
            environments=environments,
            schedule=profile.schedule,
            allow=lambda request: rules.check(request, settings),
            log=log,
            webp_method=settings.webp_method,
            known_words=checkpoints.known_words,
        )
    )


def merged_module(memory: Placement, key: str, device: torch.device, *, programs: bool | None = None) -> MergedModule:
    """Connect what merges adapters into a network with what places its weights; once for each network.

    Args:
        memory: places the weights.
        key: a model for its transformer, else the component's name.
        device: where sums are computed, wherever the weights live.
        programs: whether low-rank updates are merged by programs; None: where the device has them.
    """
    placed = memory.placed(key)
    network = placed.network
    merged = MergedModule(
        placed.component, network.module, network.readers, device=device, base=placed.base, programs=programs
    )
    placed.when_unloaded.append(merged.forget)
    return merged


def _shapes(
    transformers: Mapping[str, MergedModule], encoders: Mapping[str, MergedModule]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """What adapters may change: by component, the shape of each parameter."""
    transformer: dict[str, tuple[int, ...]] = {}
    for merged in transformers.values():
        transformer |= merged.shapes
    return {"transformer": transformer, **{name: merged.shapes for name, merged in encoders.items()}}


def _choose_kernels(
    profile: Profile, pipelines: Pipelines, memory: Placement, device: torch.device, cache: Path, log: Log
) -> str:
    """Set how the transformers compute attention: returns the kernel's name, and whether q, k, v are fused."""
    if not profile.compiled:
        return attention.DEFAULT
    pipeline = next(iter(pipelines.values()))
    tokens = image_tokens(pipeline, SIZES["1:1"]) + MAX_TEXT_TOKENS["dev"]
    transformers = [pipeline.transformer for pipeline in pipelines.values()]
    name, measured = attention.set_fastest(transformers, tokens, device, exact=profile.exact_attention, folder=cache)
    if measured:
        log(f"attention: {name} is the fastest here; kept in {cache}")
    if memory.streams_transformers:
        return name
    projected, measured = projections.choose_projection(pipeline.transformer, tokens, profile.scheme, device, cache)
    if measured:
        log(f"query, key and value: {projected} is the fastest here; kept in {cache}")
    if projected == "separate":
        return name
    memory.fuse_projections()
    return f"{name}, fused qkv"


def _compile(
    profile: Profile,
    pipelines: Pipelines,
    memory: Placement,
    prompts: PromptEncoder,
    device: torch.device,
    dtype: torch.dtype,
    cache: Path,
    log: Log,
) -> None:
    """Compile what draws and decodes, by drawing one step with each model."""
    started = time.perf_counter()
    log("compiling; the first time on a machine this takes a while")
    if memory.streams_transformers:
        log("the transformer's blocks are streamed, and so not compiled")
    compilation.compile_pipelines(pipelines.values(), blocks=not memory.streams_transformers)
    software = Software.installed().model_dump(exclude={"code"})  # PyTorch knows by itself which graphs have changed
    key = "; ".join((devices.describe(device), repr(profile), str(dtype), str(software)))
    with compilation.cached(cache, key, log):
        compilation.warm_up(profile.name, lambda: _draw_unseen(pipelines, memory, prompts))
    graphs, known = compilation.graphs(), compilation.loaded_graphs()
    log(f"compiled in {time.perf_counter() - started:.1f} s: {graphs} graphs, {known} of them known before")


def _replay_steps(
    profile: Profile,
    pipelines: Pipelines,
    memory: Placement,
    beside: Beside,
    kernels_chosen: str,
    device: torch.device,
    cache: Path,
    log: Log,
) -> None:
    """Have steps replayed as CUDA graphs where that is faster, and while there is memory for it."""

    def may_record() -> bool:
        return memory.transformers_stay and beside.idle and devices.free_memory(device) >= cuda_graphs.FREE_BYTES

    if not may_record():
        return
    record, pipeline = cuda_graphs.CudaRecorder(device), next(iter(pipelines.values()))
    tokens = image_tokens(pipeline, SIZES["1:1"]), MAX_TEXT_TOKENS["dev"]
    described = {"scheme": profile.scheme, "kernels": kernels_chosen}
    chosen: list[tuple[str, bool]] = []

    def choose() -> None:
        example = cuda_graphs.example(pipeline.transformer, *tokens)
        chosen[:] = [cuda_graphs.choose(pipeline.transformer, example, record, described, device, cache)]

    memory.with_fallback(lambda: compilation.warm_up(profile.name, choose))
    ((name, measured),) = chosen
    if measured:
        log(f"steps: {name} is the fastest here; kept in {cache}")
    if name != "replayed":
        return
    graphs = cuda_graphs.StepGraphs(record, may_record, log)
    memory.spare.append(graphs.give_way)
    for model, pipeline in pipelines.items():
        graphs.place(pipeline.transformer)
        memory.placed(model).when_unloaded.append(lambda _: graphs.forget())


def _draw_unseen(pipelines: Pipelines, memory: Placement, prompts: PromptEncoder) -> None:
    """Run once what a prediction runs."""
    for model, limit in MAX_TEXT_TOKENS.items():
        if pipeline := pipelines.get(model):
            memory.load_model(model)
            embeddings = prompts.encode(pipeline, "", limit, "warm-up")
            memory.after_encoding()
            with suppress(DrawingError):  # a fine-tune's fault, which those who ask for it are told
                latents = denoise(pipeline, embeddings, 0, WARM_UP_SIZE, steps=1, guidance=0.0, title="warm-up")
                decode(pipeline, latents, WARM_UP_SIZE, memory.choice.strips)
