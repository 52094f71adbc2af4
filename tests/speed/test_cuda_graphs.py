"""Recorded steps, with a recorder that does the work again in a CUDA graph's place; CUDA's own in test_cuda.py."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flux_lora.assembly import assemble
from flux_lora.drawing.image import denoise, image_tokens
from flux_lora.drawing.prompts import PromptEncoder
from flux_lora.generator import Generator, Step
from flux_lora.lora.formats import read
from flux_lora.request import Request
from flux_lora.settings import Settings
from flux_lora.speed import cuda_graphs
from flux_lora.speed.cuda_graphs import StepGraphs, Work, choose, example, time_step
from flux_lora.speed.step_cache import Schedule, counting
from tests.conftest import MINI
from tests.loaded import Loaded, load
from training.random_weights import random_lora

CPU = torch.device("cpu")
SIZE, TEXTS = (256, 256), 32
STEPS = 5


class Again:
    """Records by doing the work, and does it again when it is replayed: on the same tensors, as a CUDA graph does."""

    def __init__(self, _: torch.device = CPU) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Work) -> Work:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


@pytest.fixture(autouse=True)
def _recorded_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "AFTER", 2)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load()


@pytest.fixture
def launches(loaded: Loaded) -> Iterator[list[int]]:
    """How often the transformer is computed; afterwards it is as it was."""
    calls: list[int] = []
    for model in ("dev", "schnell"):
        transformer = loaded.pipeline(model).transformer
        transformer.forward = counted(transformer.forward, calls)
    yield calls
    for model in ("dev", "schnell"):
        del loaded.pipeline(model).transformer.forward


def counted(forward: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*inputs: Any, **named: Any) -> Any:
        calls.append(1)
        return forward(*inputs, **named)

    return call


def draw(
    loaded: Loaded,
    size: tuple[int, int] = SIZE,
    seed: int = 7,
    *,
    prompt: str = "a witness",
    model: str = "dev",
    schedule: Schedule | None = None,
) -> torch.Tensor:
    pipeline = loaded.pipeline(model)
    encoded = PromptEncoder(1).encode(pipeline, prompt, TEXTS, ())
    with counting(pipeline.transformer, STEPS, schedule):
        return denoise(pipeline, encoded, seed, size, steps=STEPS, guidance=seed / 2, title="")


def place(loaded: Loaded, record: Any, may_record: Callable[[], bool] = lambda: True) -> tuple[StepGraphs, list[str]]:
    said: list[str] = []
    graphs = StepGraphs(record, may_record, said.append)
    for model in ("dev", "schnell"):
        graphs.place(loaded.pipeline(model).transformer)
    return graphs, said


def test_replayed_steps_draw_the_same_bits(loaded: Loaded, launches: list[int], tmp_path: Path) -> None:
    """Also with other prompts, seeds and guidance than were recorded, with steps that are reused, and other weights."""
    asked: list[dict[str, Any]] = [
        {},
        {"seed": 8, "prompt": "a cat"},
        {"schedule": Schedule(first=2)},
        {"model": "schnell"},
        {"size": (256, 128)},
        {"size": (128, 256)},  # as many tokens
    ]
    save_file(random_lora(loaded.pipeline().transformer, rank=4), tmp_path / "lora.safetensors")
    adapters = [(read(tmp_path / "lora.safetensors", {"transformer": loaded.merged().shapes}), 0.7)]
    merged = loaded.merged()
    expected = [draw(loaded, **each) for each in asked]
    merged.bring(adapters)
    changed = draw(loaded)
    merged.bring([])
    record = Again()
    place(loaded, record)
    del launches[:]
    for _ in range(2):
        assert all(torch.equal(draw(loaded, **each), out) for each, out in zip(asked, expected, strict=True))
    assert record.recorded == 3  # dev, schnell, dev with fewer tokens
    merged.bring(adapters)
    assert torch.equal(draw(loaded), changed)
    merged.bring([])
    assert not torch.equal(changed, expected[0])
    assert record.recorded == 3
    assert len(launches) == 3 * cuda_graphs.AFTER + record.replayed


@pytest.mark.usefixtures("launches")
def test_outputs_are_the_callers_own(loaded: Loaded) -> None:
    place(loaded, Again())
    transformer = loaded.pipeline().transformer
    inputs = example(transformer, 16, 8)
    with torch.no_grad():
        for _ in range(cuda_graphs.AFTER):
            (first,) = transformer(**inputs)
        (second,) = transformer(**inputs)
        kept = second.clone()
        transformer(**{**inputs, "hidden_states": inputs["hidden_states"] * 2})
    assert torch.equal(first, second)
    assert torch.equal(second, kept)


@pytest.mark.usefixtures("launches")
def test_a_size_is_recorded_once_it_was_seen_often_and_not_while_it_must_not_be(loaded: Loaded) -> None:
    record, allowed = Again(), [False]
    place(loaded, record, lambda: allowed[0])
    draw(loaded)
    assert (record.recorded, record.replayed) == (0, 0)
    allowed[0] = True
    draw(loaded)
    assert (record.recorded, record.replayed) == (1, STEPS)  # one of them compares
    draw(loaded, (128, 128))
    assert record.recorded == 2


@pytest.mark.usefixtures("launches")
def test_the_last_used_are_kept(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST", 2)
    record = Again()
    place(loaded, record)
    sizes = [(128, 128), (256, 128), (256, 256)]
    for size in (sizes[0], sizes[1], sizes[0], sizes[2], sizes[0]):
        draw(loaded, size)
    assert record.recorded == 3
    draw(loaded, sizes[1])  # has left
    assert record.recorded == 4


@pytest.mark.usefixtures("launches")
def test_what_cannot_be_recorded_is_launched_as_before(loaded: Loaded) -> None:
    expected = draw(loaded)
    for error in (torch.OutOfMemoryError("no memory\nmore"), RuntimeError("no memory\nmore")):

        def fail(_: Work, error: RuntimeError = error) -> Work:
            raise error

        _, said = place(loaded, fail)
        assert torch.equal(draw(loaded), expected)
        assert torch.equal(draw(loaded), expected)
        assert said == ["steps are no longer replayed as CUDA graphs: no memory"]


@pytest.mark.usefixtures("launches")
def test_what_draws_other_bits_is_not_replayed(loaded: Loaded) -> None:
    expected = draw(loaded)

    def nothing(_: Work) -> Work:
        return lambda: None

    _, said = place(loaded, nothing)
    assert torch.equal(draw(loaded), expected)
    assert said == ["steps are no longer replayed as CUDA graphs: what was recorded draws other bits"]


@pytest.mark.usefixtures("launches")
def test_bits_are_compared_and_not_numbers(loaded: Loaded) -> None:
    """Weights that give no number anywhere are the request's fault, and no reason to record no more."""
    record = Again()
    _, said = place(loaded, record)
    transformer = loaded.pipeline().transformer
    inputs = example(transformer, 16, 8)
    inputs["hidden_states"] = inputs["hidden_states"] * torch.nan
    with torch.no_grad():
        outputs = [transformer(**inputs)[0] for _ in range(cuda_graphs.AFTER + 1)]
    assert outputs[-1].isnan().all()
    assert (said, record.recorded, record.replayed) == ([], 1, 2)


@pytest.mark.usefixtures("launches")
def test_an_interrupted_recording_leaves_nothing_behind(loaded: Loaded) -> None:
    expected, record = draw(loaded), Again()
    interruptions = iter([KeyboardInterrupt()])

    def interrupted(work: Work) -> Work:
        if error := next(interruptions, None):
            raise error
        return record(work)

    place(loaded, interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(loaded)
    assert torch.equal(draw(loaded), expected)
    assert record.recorded == 1


@pytest.mark.usefixtures("launches")
def test_weights_that_move_are_recorded_anew(loaded: Loaded) -> None:
    record = Again()
    graphs, said = place(loaded, record)
    draw(loaded)
    graphs.forget()
    draw(loaded)
    assert record.recorded == 2
    assert graphs.give_way()
    assert not graphs.give_way()
    replayed = record.replayed
    draw(loaded)
    assert (record.recorded, record.replayed) == (2, replayed)
    assert said == ["steps are no longer replayed as CUDA graphs: they give way to a request that takes their memory"]


@pytest.mark.usefixtures("launches")
def test_calls_of_another_kind_are_launched(loaded: Loaded) -> None:
    record = Again()
    place(loaded, record)
    transformer = loaded.pipeline().transformer
    inputs = example(transformer, 16, 8)
    kinds: list[dict[str, Any]] = [
        {"return_dict": True},
        {"joint_attention_kwargs": {"scale": 0.5}},
        {"controlnet_block_samples": [torch.zeros(1, 16, transformer.inner_dim)]},
    ]
    with torch.no_grad():
        for kind in kinds:
            for _ in range(cuda_graphs.AFTER + 1):
                transformer(**{**inputs, **kind})
        for _ in range(cuda_graphs.AFTER + 1):
            transformer(inputs["hidden_states"], **{k: v for k, v in inputs.items() if k != "hidden_states"})
    for _ in range(cuda_graphs.AFTER + 1):
        transformer(**inputs)  # with gradients
    assert record.recorded == 0


def test_the_example_is_what_a_pipeline_gives(loaded: Loaded) -> None:
    pipeline, calls = loaded.pipeline(), list[dict[str, Any]]()
    watching = pipeline.transformer.register_forward_pre_hook(
        lambda _, __, named: calls.append(named), with_kwargs=True
    )
    draw(loaded)
    watching.remove()
    made = example(pipeline.transformer, image_tokens(pipeline, SIZE), TEXTS)
    assert made.keys() == calls[0].keys()
    for name, value in calls[0].items():
        if isinstance(value, torch.Tensor):
            assert (made[name].shape, made[name].dtype) == (value.shape, value.dtype), name
        else:
            assert made[name] == value


def test_the_faster_of_both_is_chosen_and_kept(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graphs.CANDIDATES, "cpu", ("launched", "replayed"))
    transformer, record = loaded.pipeline().transformer, Again()
    inputs = example(transformer, 16, 8)
    for name in ("launched", "replayed"):
        seconds = time_step(name, transformer, inputs, record, CPU)
        assert seconds is not None
        assert seconds > 0
    assert record.replayed == 1 + cuda_graphs.ROUNDS
    assert time_step("replayed", transformer, inputs, lambda _: lambda: None, CPU) is None
    given = transformer, inputs, record, {"kernels": "native"}, CPU, tmp_path
    name, measured = choose(*given)
    assert measured
    assert choose(*given) == (name, False)
    other = transformer, example(transformer, 17, 8), record, {"kernels": "native"}, CPU, tmp_path
    assert choose(*other)[1]

    def fail(_: Work) -> Work:
        raise torch.OutOfMemoryError

    assert choose(transformer, inputs, fail, {"kernels": "none"}, CPU, tmp_path) == ("launched", True)


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> list[Again]:
    """Has servers on the CPU replay steps; holds their recorders."""
    made: list[Again] = []

    def recorder(device: torch.device) -> Again:
        made.append(Again(device))
        return made[-1]

    monkeypatch.setitem(cuda_graphs.CANDIDATES, "cpu", ("replayed",))
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", recorder)
    monkeypatch.setattr(cuda_graphs, "FREE_BYTES", 0)
    return made


def build(folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Generator:
    """A server of a compiled profile, of which nothing is compiled, since nothing here depends on that."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    return assemble(Settings(weights=MINI, cache=folder, profile="exact", device="cpu"), log=lines.append)


def ask(generator: Generator, observer: Any = None, **inputs: Any) -> bytes:
    asked = {"prompt": "a witness", "seed": 7, "num_inference_steps": STEPS, "output_format": "png"}
    asked |= {"aspect_ratio": "custom", "width": 256, "height": 256}
    return generator.draw(Request.parse(**asked | inputs), observer=observer)[-1].read_bytes()


def test_a_server_replays_steps_and_draws_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    asked: list[dict[str, Any]] = [{}, {"lora_scale": 0.3}, {"num_outputs": 2}, {"model": "schnell"}, {}]
    plain = build(tmp_path, [], monkeypatch)
    assert "forward" not in vars(plain.parts.pipelines["dev"].transformer)
    expected = [ask(plain, **each) for each in asked]
    (made, lines) = request.getfixturevalue("replaying"), list[str]()
    replaying = build(tmp_path, lines, monkeypatch)
    assert [ask(replaying, **each) for each in asked] == expected
    (record,) = made
    assert record.recorded == 2  # dev, schnell
    assert record.replayed > 2 * STEPS
    assert not [line for line in lines if "CUDA graphs" in line]


def test_memory_that_graphs_hold_is_given_back_before_a_plan_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaying: list[Again]
) -> None:
    lines: list[str] = []
    generator = build(tmp_path, lines, monkeypatch)
    expected = ask(generator)
    errors = iter([torch.OutOfMemoryError("told to")])

    def observe(_: Step) -> None:
        if error := next(errors, None):
            raise error

    plan, recorded = generator.parts.memory.choice, replaying[0].recorded
    assert ask(generator, observe) == expected
    assert generator.parts.memory.choice == plan
    assert "out of memory (told to): all of it again, without what was held for speed" in lines
    errors = iter([torch.OutOfMemoryError("told to")])
    assert ask(generator, observe)  # under another plan, as ever
    assert replaying[0].recorded == recorded == 1


def test_nothing_is_recorded_while_an_image_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaying: list[Again]
) -> None:
    generator = build(tmp_path, [], monkeypatch)
    parts, busy = generator.parts, [True]
    monkeypatch.setattr(type(parts.beside), "idle", property(lambda _: not busy[0]))
    ask(generator)
    assert replaying[0].recorded == 0
    busy[0] = False
    ask(generator)
    assert replaying[0].recorded == 1
