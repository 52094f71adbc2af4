"""Plans carried out on the CPU, with real copies and the whole engine: the same pictures, and memory that runs out."""

import functools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flux_lora.assembly import assemble
from flux_lora.checkpoint import reading
from flux_lora.checkpoint.assembling import Checkpoints, open_directory
from flux_lora.checkpoint.components import ENCODERS
from flux_lora.checkpoint.reading import StoredTensor
from flux_lora.errors import DeviceMemoryError, SettingsError
from flux_lora.files import provenance
from flux_lora.generator import Generator, Step
from flux_lora.lora import deltas
from flux_lora.memory import measure, plans
from flux_lora.memory.placement import ran_out
from flux_lora.memory.plans import Room, Sizes
from flux_lora.request import Request
from flux_lora.settings import PlanName, Settings
from flux_lora.speed import profiles
from flux_lora.speed.quantization import quantized_layers
from tests.memory.helpers import tiny

WITNESS = {
    "prompt": "a witness",
    "seed": 7,
    "num_outputs": 2,
    "aspect_ratio": "custom",
    "width": 256,
    "height": 256,
    "num_inference_steps": 2,
    "output_format": "png",
    "disable_safety_checker": True,
}
STORY: list[dict[str, Any]] = [
    {"model": model, "lora_scale": scale, "num_outputs": images}
    for model, scale, images in (
        *(("dev", 1.0, 2), ("schnell", 0.3, 1), ("schnell", 0.3, 1), ("dev", 1.0, 1), ("dev", 0.0, 1)),
        *(("schnell", -1.0, 1), ("dev", 0.5, 1)),
    )
]
"""Models in turns, scales that change while a model is away, and the base model."""

PLENTY = 2**40


def sizes() -> Sizes:
    return measure.needed_sizes(open_directory(tiny(), torch.float32).networks, torch.float32)


def least() -> int:
    """Device memory for streaming when no block stays, and decoding is in strips."""
    return plans.choose_plan(sizes(), Room(0, PLENTY), named="streamed").device


def floor() -> int:
    """The same when decoding and encoding are whole."""
    of = sizes()
    kinds = ((of.decode, of.encode), (of.decode_strips, of.encode_strips))
    whole, in_strips = (int(plans.MARGIN * max(of.denoise, *both, of.merge)) for both in kinds)
    return least() + whole - in_strips


def half_of_the_blocks() -> int:
    return sum(sizes().transformers["dev"].blocks) // 2


Rooms = dict[str, tuple[PlanName, Callable[[], Room]]]
ROOMS: Rooms = {
    "alternating": ("alternating", lambda: Room(PLENTY, PLENTY)),
    "alternating, from files": ("alternating", lambda: Room(PLENTY, 0)),
    "offload-text": ("offload-text", lambda: Room(PLENTY, PLENTY)),
    "offload-text, from files": ("offload-text", lambda: Room(PLENTY, sum(sizes().t5.blocks))),
    "streamed": ("streamed", lambda: Room(floor(), PLENTY)),
    "streamed, some blocks stay": ("streamed", lambda: Room(floor() + half_of_the_blocks(), PLENTY)),
    "streamed, from files": ("streamed", lambda: Room(floor() + half_of_the_blocks(), 10**6)),
    "streamed, all blocks stay": ("streamed", lambda: Room(PLENTY, PLENTY)),
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A copy of the tiny weights directory that a test may damage."""
    return Path(shutil.copytree(tiny(), tmp_path / "weights"))


@pytest.fixture
def build() -> Callable[..., Generator]:
    def build(given: Room | None = None, **settings: Any) -> Generator:
        lines: list[str] = []
        chosen = Settings(weights=settings.pop("weights", tiny()), **settings)
        generator = assemble(chosen, log=lines.append, room=given or Room(PLENTY, PLENTY))
        generator.lines = lines  # type: ignore[attr-defined]
        return generator

    return build


def draw(generator: Generator, **inputs: Any) -> list[Path]:
    return generator.draw(Request.parse(**WITNESS | inputs), lambda *_: None)


def pixels(files: list[Path]) -> list[bytes]:
    return [Image.open(file).tobytes() for file in files]


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[bytes], list[Any]]]:
    """The story under the plan that leaves everything where it is."""
    generator = assemble(Settings(weights=tiny(), memory_plan="resident"), log=lambda _: None)
    told = []
    for asked in STORY:
        files = draw(generator, **asked)
        told.append((pixels(files), [provenance.read(file) for file in files]))
    return told


Fresh = Callable[..., tuple[str, list[bytes]]]


@pytest.fixture(scope="module")
def fresh() -> Fresh:
    """What a generator draws that has drawn nothing before, and its plan; each question is answered once."""

    @functools.cache
    def drawn(plan: PlanName, given: Room | None = None, **inputs: Any) -> tuple[str, list[bytes]]:
        settings = Settings(weights=tiny(), memory_plan=plan)
        generator = assemble(settings, log=lambda _: None, room=given or Room(PLENTY, PLENTY))
        return generator.parts.memory.choice.label, [path.read_bytes() for path in draw(generator, **inputs)]

    return drawn


@pytest.mark.parametrize("case", ROOMS)
def test_every_plan_draws_the_same_pictures(
    case: str, build: Callable[..., Generator], expected: list[tuple[list[bytes], list[Any]]]
) -> None:
    named, given = ROOMS[case]
    generator = build(given(), memory_plan=named)
    choice = generator.parts.memory.choice
    assert choice.label == named
    assert choice.kept != ("files" in case)
    assert ("some" in case) <= (0 < choice.stay < sum(sizes().transformers["dev"].blocks))
    for asked, (same, records) in zip(STORY, expected, strict=True):
        files = draw(generator, **asked)
        assert pixels(files) == same, asked
        for file, record in zip(files, records, strict=True):
            environment = record.environment.model_copy(update={"memory": named})
            assert provenance.read(file) == record.model_copy(update={"environment": environment})


def test_one_model_has_nobody_to_take_turns_with(
    weights: Path, build: Callable[..., Generator], expected: list[tuple[list[bytes], list[Any]]]
) -> None:
    for path in sorted((weights / "schnell").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (weights / "schnell").rmdir()
    for given in (Room(floor(), PLENTY), Room(floor() + half_of_the_blocks(), 10**6), Room(PLENTY, PLENTY)):
        for named in ("streamed", "offload-text", "alternating"):
            generator = build(given, memory_plan=named, weights=weights)
            for index in (0, 3, 4, 6):
                assert pixels(draw(generator, **STORY[index])) == expected[index][0]


def test_who_is_away_takes_no_memory(build: Callable[..., Generator]) -> None:
    generator = build(memory_plan="alternating")
    transformers = {model: pipeline.transformer for model, pipeline in generator.parts.pipelines.items()}
    for model, other in (("dev", "schnell"), ("schnell", "dev")):
        draw(generator, model=model)
        assert all(parameter.isfinite().all() for parameter in transformers[model].parameters())
        # One NaN in the shape of the weights: whatever were computed with it would not be a picture.
        assert all(p.untyped_storage().nbytes() == p.element_size() for p in transformers[other].parameters())
        assert all(p.isnan().all() for p in transformers[other].parameters())


def test_the_text_encoder_leaves_after_use(build: Callable[..., Generator]) -> None:
    generator = build(memory_plan="offload-text")
    stream = generator.parts.memory.placed("text_encoder_2").stream
    assert stream
    seen: list[int] = []
    encoder = generator.parts.memory.placed("text_encoder_2").network.module
    encoder.register_forward_hook(lambda *_: seen.append(len(stream.slots)))
    draw(generator)
    assert seen == [plans.SLOTS]
    assert stream.slots == []


def test_both_models_are_loaded_once_and_share_what_they_share() -> None:
    read: list[StoredTensor] = []

    def open_counting(directory: Path, dtype: torch.dtype) -> Checkpoints:
        opened = open_directory(directory, dtype)

        def fill(reads: Iterable[tuple[StoredTensor, Tensor]]) -> None:
            reads = list(reads)
            read.extend(stored for stored, _ in reads)
            opened.fill(reads)

        return replace(opened, fill=fill)

    settings = Settings(weights=tiny(), memory_plan="alternating")
    generator = assemble(settings, log=lambda _: None, open_weights=open_counting, room=Room(PLENTY, PLENTY))
    once = len(read)
    tensors = sum(len(n.stored) for n in {id(n): n for n in _networks(generator)}.values())
    assert once == len(set(read)) == tensors
    for model in ("schnell", "dev"):
        draw(generator, model=model)
    assert len(read) == once


def _networks(generator: Generator) -> Iterator[Any]:
    for key in (*ENCODERS, "vae", *generator.parts.pipelines):
        yield generator.parts.memory.placed(key).network


def test_set_up_says_what_lives_where(build: Callable[..., Generator]) -> None:
    (line,) = [line for line in build(memory_plan="offload-text").lines if line.startswith("memory plan")]  # type: ignore[attr-defined]
    assert "offload-text; dev and schnell take turns on the device, from pinned host memory; T5 streamed" in line
    assert "1024.0 GiB of the device and 1024.0 GiB of the host" in line
    (line,) = [line for line in build(Room(1, 1), memory_plan="resident").lines if line.startswith("memory plan")]  # type: ignore[attr-defined]
    assert "more than there is" in line


def test_the_plan_is_in_the_metrics(build: Callable[..., Generator]) -> None:
    metrics: dict[str, Any] = {}
    build(memory_plan="streamed").draw(Request.parse(**WITNESS), metrics.__setitem__)
    assert metrics["memory_plan"] == "streamed"


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile with quantized weights that need not be compiled."""
    monkeypatch.setitem(profiles.PROFILES, "eager", profiles.Profile("eager", compiled=False, scheme="fp8"))


@pytest.mark.usefixtures("lossy")
def test_quantized_weights_draw_the_same_under_every_plan(
    build: Callable[..., Generator], expected: list[tuple[list[bytes], list[Any]]]
) -> None:
    def told(generator: Generator) -> list[list[bytes]]:
        return [pixels(draw(generator, **asked)) for asked in STORY]

    generator = build(memory_plan="resident")
    quantized = told(generator)
    assert not any(one == exact for one, (exact, _) in zip(quantized, expected, strict=True))
    for named in ("alternating", "offload-text", "quantized"):
        for host in (PLENTY, sum(sizes().t5.blocks)):
            generator = build(Room(PLENTY, host), memory_plan=named)
            assert generator.parts.memory.choice.kept == (host == PLENTY)
            assert told(generator) == quantized, named


@pytest.mark.usefixtures("lossy")
def test_who_is_away_takes_no_memory_when_quantized_either(build: Callable[..., Generator]) -> None:
    generator = build(memory_plan="quantized")
    for model, other in (("dev", "schnell"), ("schnell", "dev")):
        draw(generator, model=model)
        here, away = (quantized_layers(generator.parts.pipelines[name].transformer) for name in (model, other))
        assert here
        assert all(layer.device == torch.device("cpu") for layer in here.values())
        assert all(layer.device == torch.device("meta") for layer in away.values())


@pytest.mark.usefixtures("lossy")
def test_what_is_streamed_is_not_quantized(
    build: Callable[..., Generator], expected: list[tuple[list[bytes], list[Any]]]
) -> None:
    generator = build(Room(floor(), PLENTY), memory_plan="streamed")
    assert "the transformers' blocks are streamed, and so not quantized" in generator.lines  # type: ignore[attr-defined]
    assert pixels(draw(generator)) == expected[0][0]


@pytest.mark.usefixtures("lossy")
def test_quantized_weights_stay_quantized_when_memory_runs_out(build: Callable[..., Generator]) -> None:
    generator = build(memory_plan="alternating")
    before, failures = pixels(draw(generator)), iter([True])

    def exhausted(_: Step) -> None:
        if next(failures, False):
            raise torch.OutOfMemoryError("as much as there is")

    assert pixels(generator.draw(Request.parse(**WITNESS), lambda *_: None, exhausted)) == before
    assert generator.parts.memory.choice.plan.name == "offload-text"
    assert quantized_layers(generator.parts.pipelines["dev"].transformer)


def test_quantized_weights_need_a_profile(build: Callable[..., Generator]) -> None:
    with pytest.raises(SettingsError, match="FLUX_MEMORY_PLAN=quantized"):
        build(memory_plan="quantized")


def test_no_room_at_all_fails_set_up_with_the_numbers(build: Callable[..., Generator]) -> None:
    with pytest.raises(DeviceMemoryError, match=r"need .* MiB of the device .* and there are 1\.0 MiB of the device"):
        build(Room(2**20, PLENTY))


# Out of memory


class Shortage:
    """Raises out of memory at a place in the engine, at the calls of these numbers."""

    def __init__(self, *calls: int) -> None:
        self.calls, self.count = calls, 0

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count in self.calls or not self.calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nmore")


def at_text(generator: Generator, shortage: Shortage, _: pytest.MonkeyPatch) -> None:
    encoder = generator.parts.memory.placed("text_encoder_2").network.module
    encoder.get_submodule("encoder.block.1").register_forward_pre_hook(shortage)


def at_denoise(generator: Generator, shortage: Shortage, _: pytest.MonkeyPatch) -> None:
    generator.parts.pipelines["dev"].transformer.single_transformer_blocks[0].register_forward_pre_hook(shortage)


def at_decode(generator: Generator, shortage: Shortage, _: pytest.MonkeyPatch) -> None:
    generator.parts.pipelines["dev"].vae.decoder.up_blocks[0].resnets[0].conv1.register_forward_pre_hook(shortage)
    generator.parts.pipelines["dev"].vae.decoder.mid_block.register_forward_pre_hook(shortage)


def at_merge(_: Generator, shortage: Shortage, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = deltas.LowRank.delta

    def failing(self: deltas.LowRank, *arguments: Any) -> Any:
        shortage()
        return delta(self, *arguments)

    monkeypatch.setattr(deltas.LowRank, "delta", failing)


def at_arrival(generator: Generator, shortage: Shortage, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(move_in: Callable[[Any], Any], home: Any) -> Any:
        shortage()
        return move_in(home)

    for key in (*ENCODERS, "vae", *generator.parts.pipelines):
        placed = generator.parts.memory.placed(key)
        monkeypatch.setattr(placed, "move_in", functools.partial(failing, placed.move_in))


# Of each stage: the call at which memory runs out, in the middle of a request of three images.
STAGES: dict[str, tuple[Callable[..., None], int]] = {
    "text": (at_text, 1),
    "denoise": (at_denoise, 4),
    "decode": (at_decode, 3),
    "merge": (at_merge, 5),
}
AFTER: dict[PlanName, tuple[PlanName, str]] = {
    "resident": ("alternating", "alternating"),
    "alternating": ("offload-text", "offload-text"),
    "offload-text": (
        "streamed",
        "streamed, decoded in strips",
    ),  # two slots hold all of the miniature: whole saves nothing
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("plan", AFTER)
def test_a_request_that_runs_out_of_memory_is_drawn_under_the_next_plan(
    stage: str, plan: PlanName, build: Callable[..., Generator], fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"num_outputs": 3, "lora_scale": 0.6}
    named, label = AFTER[plan]
    chosen, same = fresh(named, Room(least(), PLENTY) if "strips" in label else None, **asked)
    assert chosen == label
    generator = build(memory_plan=plan)
    inject, call = STAGES[stage]
    shortage = Shortage(call)
    with monkeypatch.context() as patches:
        inject(generator, shortage, patches)
        metrics: dict[str, Any] = {}
        files = generator.draw(Request.parse(**WITNESS | asked), metrics.__setitem__)
    assert shortage.count > call
    assert [path.read_bytes() for path in files] == same  # the first images too: all are drawn again
    assert metrics["memory_plan"] == label
    assert metrics["images"] == 3
    lines = generator.lines  # type: ignore[attr-defined]
    assert any(f"out of memory under the plan {plan} (CUDA out of memory. Tried" in line for line in lines)
    assert sum(line.startswith("memory plan: ") for line in lines) == 2
    for model, scale in (("dev", 0.6), ("schnell", 1.0)):  # back under the plan of set-up
        _, again = fresh(plan, model=model, lora_scale=scale)
        assert [path.read_bytes() for path in draw(generator, model=model, lora_scale=scale)] == again
    assert lines.count("there may be room again: back to the plan of set-up") == 1


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("plan", ["resident", "streamed"])
def test_a_request_that_runs_out_twice_fails_and_the_next_is_right(
    stage: str, plan: PlanName, build: Callable[..., Generator], fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = build(memory_plan=plan)
    inject, _ = STAGES[stage]
    with monkeypatch.context() as patches:
        shortage = Shortage()
        inject(generator, shortage, patches)
        with pytest.raises(DeviceMemoryError, match=rf"{plan} and then .*it was to need .* free now\. Ask for a small"):
            draw(generator, lora_scale=0.6)
    shortage.calls = (-1,)
    assert generator.parts.memory.choice.plan.name != "resident"
    _, same = fresh(plan, lora_scale=0.6)
    assert [path.read_bytes() for path in draw(generator, lora_scale=0.6)] == same


def test_the_end_of_the_plans_is_an_error_with_the_numbers(build: Callable[..., Generator]) -> None:
    generator = build(Room(least(), PLENTY))
    assert generator.parts.memory.choice.label == "streamed, decoded in strips"
    shortage = Shortage()
    at_denoise(generator, shortage, None)  # type: ignore[arg-type]
    with pytest.raises(DeviceMemoryError, match="under the plan streamed: it was to need"):
        draw(generator)
    shortage.calls = (-1,)
    assert len(draw(generator)) == 2


def test_the_plan_of_set_up_comes_back_when_there_is_room(build: Callable[..., Generator]) -> None:
    plenty = room = Room(PLENTY, PLENTY)
    generator = build(lambda: room)
    label = generator.parts.memory.choice.label
    first = [path.read_bytes() for path in draw(generator)]
    at_denoise(generator, Shortage(1), None)  # type: ignore[arg-type]
    draw(generator)
    room = Room(least(), PLENTY)  # somebody else takes the rest
    for _ in range(3):
        draw(generator)
        assert generator.parts.memory.choice.label != label
    room = plenty
    assert [path.read_bytes() for path in draw(generator)] == first
    assert generator.parts.memory.choice.label == label


def test_coming_back_in_vain_is_tried_twice_as_late_each_time(build: Callable[..., Generator]) -> None:
    generator = build(memory_plan="alternating")
    placed = generator.parts.memory.placed("text_encoder_2")
    seen: list[str] = []

    def only_where_t5_is_streamed(*_: Any) -> None:
        seen[-1] += "alternating " if placed.orders.where == "device" else "offload-text"
        if placed.orders.where == "device":
            raise torch.OutOfMemoryError("out of memory")

    hook = generator.parts.pipelines["dev"].transformer.register_forward_pre_hook(only_where_t5_is_streamed)
    for _ in range(8):
        seen.append("")
        draw(generator, num_outputs=1, num_inference_steps=1)
    vain = "alternating offload-text"
    assert seen == [vain, vain, "offload-text", vain, *["offload-text"] * 3, vain]
    hook.remove()
    for _ in range(8):
        draw(generator, num_outputs=1, num_inference_steps=1)
    assert generator.parts.memory.choice.label == "alternating"


@pytest.mark.parametrize("plan", ["resident", "streamed"])
@pytest.mark.parametrize("call", [1, 7])
def test_what_a_request_brings_lowers_no_plan(
    call: int, plan: PlanName, build: Callable[..., Generator], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = build(memory_plan=plan, weights=weights)
    shutil.copy(weights / "lora.safetensors", weights / "other.safetensors")
    before = [path.read_bytes() for path in draw(generator)]
    with monkeypatch.context() as patches:
        at_merge(generator, Shortage(call), patches)
        with pytest.raises(
            DeviceMemoryError, match="The LoRA of this request takes more memory than there is .CUDA out"
        ):
            draw(generator, replicate_weights="other.safetensors", lora_scale=0.6)
    assert generator.parts.memory.choice.label == plan
    assert [path.read_bytes() for path in draw(generator)] == before


def test_running_out_while_weights_arrive_is_survived(
    build: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, fresh = build(memory_plan="alternating"), build(memory_plan="offload-text")
    with monkeypatch.context() as patches:
        at_arrival(generator, Shortage(1), patches)
        files = draw(generator, model="schnell")
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in draw(fresh, model="schnell")]


def test_running_out_at_set_up_is_survived(build: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patches:
        at_merge(None, Shortage(2), patches)  # type: ignore[arg-type]
        generator = build()
    assert generator.parts.memory.choice.label == "alternating"
    assert pixels(draw(generator)) == pixels(draw(build()))


def test_a_request_interrupted_while_weights_arrive_leaves_the_next_one_right(
    build: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = build(Room(PLENTY, 0), memory_plan="alternating")
    before = pixels(draw(generator, model="dev"))

    class Interrupted(FileIO):
        def readinto(self, _: Any) -> int:
            raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(reading, "FileIO", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw(generator, model="schnell")
    assert pixels(draw(generator, model="dev")) == before
    assert pixels(draw(generator, model="schnell")) == pixels(draw(build(), model="schnell"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried …"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_means_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert ran_out(error) == expected
