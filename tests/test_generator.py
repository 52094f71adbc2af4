"""The engine without Cog: judged by bits against fresh generators, and by diffusers and PEFT."""

import base64
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from flux_lora.assembly import assemble
from flux_lora.errors import (
    AdapterError,
    DrawingError,
    FluxLoraError,
    SafetyError,
    SettingsError,
    WeightsError,
)
from flux_lora.files import outputs
from flux_lora.finishing import Finisher
from flux_lora.generator import Generator, Observer, Step
from flux_lora.request import Request
from flux_lora.settings import Settings
from tests.conftest import MINI

SMALL = {
    "aspect_ratio": "custom",
    "width": 256,
    "height": 256,
    "num_inference_steps": 2,
    "disable_safety_checker": True,
}
WITNESS: dict[str, Any] = {"prompt": "a witness", "seed": 7, "output_format": "png", **SMALL}


def build(weights: Path = MINI, fine_tune: str | None = None, **settings: Any) -> Generator:
    return assemble(Settings(weights=weights, **settings), fine_tune, log=lambda _: None)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return build()


def draw(generator: Generator, observer: Observer | None = None, **inputs: Any) -> list[bytes]:
    return [path.read_bytes() for path in generator.draw(Request.parse(**inputs), lambda *_: None, observer)]


def with_checker(generator: Generator, score: Callable[[], float]) -> Generator:
    """The same generator with a checker that scores as told."""

    class Checker:
        name, threshold = "told", 0.5

        def score(self, _: Image.Image) -> float:
            return score()

    finisher = Finisher(generator.parts.beside, Checker(), embed=True)
    return Generator(replace(generator.parts, finisher=finisher))


def failing_at(image: int, error: BaseException, before: Callable[[], object] = lambda: None) -> Observer:
    """An observer that raises after the first step of an image, counted from 1."""

    def observe(step: Step) -> None:
        if step.image == image:
            before()
            raise error

    return observe


def pixels(generator: Generator, **inputs: Any) -> np.ndarray:
    (path,) = generator.draw(Request.parse(**inputs), lambda *_: None)
    return np.asarray(Image.open(path))


def write_lora(path: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    save_file(edit(load_file(MINI / "lora.safetensors")), path)
    return path


def clip_lora(folder: Path) -> str:
    """A fine-tune of the text encoder that the miniature's own leaves alone."""
    clip = CLIPTextModel.from_pretrained(MINI / "dev" / "text_encoder")
    torch.manual_seed(0)
    tensors = {}
    for name, layer in clip.named_modules():
        if isinstance(layer, torch.nn.Linear):
            tensors[f"text_encoder.{name}.lora_A.weight"] = torch.randn(4, layer.in_features)
            tensors[f"text_encoder.{name}.lora_B.weight"] = torch.randn(layer.out_features, 4) / 4
    save_file(tensors, folder / "clip.safetensors")
    return str(folder / "clip.safetensors")


def without_lora(folder: Path) -> Path:
    shutil.copytree(MINI, folder, ignore=shutil.ignore_patterns("lora.safetensors"))
    return folder


@pytest.mark.parametrize("size", [(1024, 1024), (320, 448)])
def test_the_base_picture_is_that_of_diffusers(generator: Generator, size: tuple[int, int]) -> None:
    pipeline = FluxPipeline.from_pretrained(MINI / "dev", dtype=torch.float32)
    expected = pipeline(
        "a witness",
        width=size[0],
        height=size[1],
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]
    inputs = {"aspect_ratio": "custom", "width": size[0], "height": size[1], "num_inference_steps": 3}
    actual = pixels(generator, **WITNESS | inputs, guidance_scale=2.0, lora_scale=0)
    assert np.array_equal(actual, np.asarray(expected))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_the_fine_tuned_picture_is_that_of_diffusers_with_peft(generator: Generator, model: str, scale: float) -> None:
    """PEFT adds the LoRA beside the weights, so float32 rounds elsewhere: one grey level apart at most."""
    pipeline = FluxPipeline.from_pretrained(MINI / "dev", dtype=torch.float32)
    if model == "schnell":
        pipeline.register_modules(transformer=type(pipeline.transformer).from_pretrained(MINI / "schnell/transformer"))
        pipeline.register_modules(scheduler=type(pipeline.scheduler).from_pretrained(MINI / "schnell/scheduler"))
    pipeline.load_lora_weights(MINI / "lora.safetensors", adapter_name="bundled")
    pipeline.set_adapters("bundled", scale)
    expected = pipeline(
        "a witness",
        width=256,
        height=256,
        num_inference_steps=2,
        guidance_scale=3.5,
        max_sequence_length=512 if model == "dev" else 256,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]
    actual = pixels(generator, **WITNESS, model=model, lora_scale=scale)
    assert np.abs(actual.astype(int) - np.asarray(expected).astype(int)).max() <= 1
    base = pixels(generator, **WITNESS, model=model, lora_scale=0)
    assert np.abs(actual.astype(int) - base.astype(int)).max() > 20


def test_scale_zero_is_the_base_model_to_the_bit(generator: Generator, tmp_path: Path) -> None:
    base = build(without_lora(tmp_path / "weights"))
    assert np.array_equal(pixels(base, **WITNESS), pixels(generator, **WITNESS, lora_scale=0))
    assert not np.array_equal(pixels(base, **WITNESS), pixels(generator, **WITNESS))


def test_a_fine_tune_of_clip_alone_is_in_the_key_of_the_prompt(tmp_path: Path) -> None:
    """The same prompt at two scales: what was remembered of one must not serve the other."""
    used = build(fine_tune=clip_lora(tmp_path))
    first = {scale: draw(used, **WITNESS, lora_scale=scale) for scale in (1.0, 0.2, 0.0)}
    assert len({files[0] for files in first.values()}) == 3
    for scale in (0.2, 0.0, 1.0):
        assert draw(used, **WITNESS, lora_scale=scale) == first[scale]
        assert draw(build(fine_tune=clip_lora(tmp_path)), **WITNESS, lora_scale=scale) == first[scale]


def test_dev_and_schnell_keep_their_own_states(generator: Generator) -> None:
    """Alternating with different scales, each as on a fresh generator; the shared encoders follow along."""
    wanted = [("dev", 1.0), ("schnell", 0.3), ("dev", -0.5), ("schnell", 0.3), ("dev", 1.0), ("schnell", 1.0)]
    fresh = {pair: draw(build(), **WITNESS, model=pair[0], lora_scale=pair[1]) for pair in dict.fromkeys(wanted)}
    for model, scale in wanted:
        assert draw(generator, **WITNESS, model=model, lora_scale=scale) == fresh[model, scale]


def test_a_request_touches_only_what_it_uses(generator: Generator) -> None:
    draw(generator, **WITNESS, model="schnell", lora_scale=0.25)
    before = generator.parts.transformers["schnell"].state
    draw(generator, **WITNESS, model="dev", lora_scale=0.75)
    assert generator.parts.transformers["schnell"].state == before


@pytest.mark.parametrize("size", [(256, 256), (1392, 256), (272, 304), (1040, 1008)])
def test_sizes_off_the_grid_are_the_centre_of_the_next_larger(generator: Generator, size: tuple[int, int]) -> None:
    width, height = size
    asked = {"aspect_ratio": "custom", "width": width, "height": height, "num_inference_steps": 1}
    actual = pixels(generator, **WITNESS | asked)
    larger = {"width": -(-width // 64) * 64, "height": -(-height // 64) * 64}
    whole = pixels(generator, **WITNESS | asked | larger)
    top, left = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 2
    assert np.array_equal(actual, whole[top : top + height, left : left + width])


def test_a_failure_in_the_middle_leaves_no_file_and_no_trace(generator: Generator) -> None:
    before = draw(generator, **WITNESS)
    interrupted = failing_at(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        draw(generator, interrupted, **WITNESS | {"seed": 50}, num_outputs=4, lora_scale=0.4)
    generator.parts.beside.clear()
    assert [path for path in generator.parts.outputs.home.rglob("*") if path.is_file()] == []
    assert draw(generator, **WITNESS) == before


def test_metrics_are_recorded_when_drawing_fails(generator: Generator) -> None:
    metrics: dict[str, Any] = {}
    request = Request.parse(**WITNESS, replicate_weights="no-such-file.safetensors")
    with pytest.raises(AdapterError):
        generator.draw(request, metrics.__setitem__)
    assert metrics["seed"] == 7
    assert "adapter_seconds" in metrics


def test_a_picture_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    path = write_lora(
        tmp_path / "huge.safetensors",
        lambda tensors: {name: (tensor.float() * 1e25) for name, tensor in tensors.items() if "transformer." in name},
    )
    with pytest.raises(DrawingError, match="seed 7.*not finite"):
        draw(build(fine_tune=str(path)), **WITNESS)


def test_the_absent_model_is_refused_with_the_command_that_fetches_it(weights: Path) -> None:
    shutil.rmtree(weights / "schnell")
    with pytest.raises(WeightsError, match="schnell is not on this server.*scripts/download_weights schnell"):
        draw(build(weights), **WITNESS, model="schnell")


def test_withheld_images_leave_the_others(generator: Generator) -> None:
    checked = WITNESS | {"disable_safety_checker": False, "num_outputs": 3}
    metrics: dict[str, Any] = {}
    scores = iter([0.0, 1.0, 0.0])
    checking = with_checker(generator, lambda: next(scores))
    paths = checking.draw(Request.parse(**checked), metrics.__setitem__)
    assert [path.name for path in paths] == ["0-seed7.png", "2-seed9.png"]
    assert metrics["withheld_seeds"] == [8]
    assert metrics["images"] == 2


def test_a_checker_that_cannot_run_withholds(generator: Generator) -> None:
    def broken() -> float:
        raise RuntimeError("no")

    with pytest.raises(SafetyError, match="seed 7"):
        draw(with_checker(generator, broken), **WITNESS | {"disable_safety_checker": False})
    assert draw(generator, **WITNESS)


def test_what_was_done_is_recorded_when_a_later_image_fails(generator: Generator) -> None:
    metrics: dict[str, Any] = {}
    lines: list[str] = []
    scores = iter([0.0, 1.0])
    checking = Generator(replace(with_checker(generator, lambda: next(scores)).parts, log=lines.append))
    request = Request.parse(**WITNESS | {"disable_safety_checker": False, "num_outputs": 3})
    # The observer waits until the two images before are finished.
    failing = failing_at(3, DrawingError("no"), before=lambda: checking.parts.beside.submit(int).result())
    with pytest.raises(DrawingError):
        checking.draw(request, metrics.__setitem__, failing)
    assert metrics["withheld_seeds"] == [8]
    assert metrics["seed"] == 7
    assert metrics["decode_seconds"] > 0
    assert any("seed 8" in line for line in lines)


def test_one_image_is_finished_while_the_next_is_denoised(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first decode waits for the second denoising to begin: run one after the other, they would wait for ever."""
    second = threading.Event()
    vae = generator.parts.pipelines["dev"].vae
    decode = vae.decode

    def observe(step: Step) -> None:
        if step.image == 2:
            second.set()

    def waiting(*arguments: Any, **options: Any) -> Any:
        assert second.wait(20)
        return decode(*arguments, **options)

    monkeypatch.setattr(vae, "decode", waiting)
    assert len(draw(generator, observe, **WITNESS, num_outputs=2)) == 2


def test_the_prompt_is_read_while_the_fine_tune_is_merged_into_the_transformer(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other to begin: run one after the other, they would wait for ever."""
    reading, merging = threading.Event(), threading.Event()
    pipeline, transformer = generator.parts.pipelines["dev"], generator.parts.transformers["dev"]
    encode, bring = pipeline.encode_prompt, transformer.bring

    def reads(*arguments: Any, **options: Any) -> Any:
        reading.set()
        assert merging.wait(20)
        return encode(*arguments, **options)

    def merges(*arguments: Any) -> bool:
        merging.set()
        assert reading.wait(20)
        return bring(*arguments)

    expected = draw(generator, **WITNESS | {"prompt": "another one"}, lora_scale=0.7)
    monkeypatch.setattr(pipeline, "encode_prompt", reads)
    monkeypatch.setattr(transformer, "bring", merges)
    generator.parts.prompts.forget()
    assert draw(generator, **WITNESS | {"prompt": "another one"}, lora_scale=0.7) == expected


def test_a_request_cancelled_while_its_prompt_is_read_leaves_the_next_one_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is still being read then must not see the text encoders that the next request brings elsewhere."""
    generator = build(fine_tune=clip_lora(tmp_path))
    expected = {scale: draw(generator, **WITNESS, lora_scale=scale) for scale in (0.3, 0.7)}
    pipeline, transformer = generator.parts.pipelines["dev"], generator.parts.transformers["dev"]
    encode, began = pipeline.encode_prompt, threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        began.set()
        time.sleep(0.5)
        return encode(*arguments, **options)

    def cancelled(*_: Any) -> bool:
        assert began.wait(20)
        raise KeyboardInterrupt

    generator.parts.prompts.forget()
    with monkeypatch.context() as patches:
        patches.setattr(pipeline, "encode_prompt", slow)
        patches.setattr(transformer, "bring", cancelled)
        with pytest.raises(KeyboardInterrupt):
            draw(generator, **WITNESS, lora_scale=0.3)
    for scale in (0.7, 0.3):
        assert draw(generator, **WITNESS, lora_scale=scale) == expected[scale]


def test_an_image_is_encoded_while_it_is_checked(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check waits for the encoding to begin: run one after the other, it would wait for ever."""
    encoding = threading.Event()
    encode = outputs.encode

    def noting(*arguments: Any, **options: Any) -> bytes:
        encoding.set()
        return encode(*arguments, **options)

    def waiting() -> float:
        assert encoding.wait(20)
        return 0.0

    monkeypatch.setattr(outputs, "encode", noting)
    assert draw(with_checker(generator, waiting), **WITNESS | {"disable_safety_checker": False})


def test_a_known_prompt_is_not_encoded_again(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(generator, **WITNESS | {"prompt": "a known one"})
    for pipeline in generator.parts.pipelines.values():
        monkeypatch.setattr(pipeline, "encode_prompt", None)
    # FluxPipeline passes through what it is given by the same method.
    passing = type(generator.parts.pipelines["dev"]).encode_prompt
    for pipeline in generator.parts.pipelines.values():

        def only_given(*arguments: Any, pipeline: Any = pipeline, **options: Any) -> Any:
            assert options["prompt_embeds"] is not None
            return passing(pipeline, *arguments, **options)

        monkeypatch.setattr(pipeline, "encode_prompt", only_given)
    assert draw(generator, **WITNESS | {"prompt": "a known one"})


def test_what_has_no_effect_is_logged(generator: Generator) -> None:
    lines: list[str] = []
    asked = {"prompt": "a", "width": 256, "model": "schnell", "guidance_scale": 9, "num_inference_steps": 1}
    Generator(replace(generator.parts, log=lines.append)).draw(Request.parse(**asked), lambda *_: None)
    assert sum("ignored" in line for line in lines) == 2


def test_the_type_on_a_cpu_is_a_setting(generator: Generator) -> None:
    narrow = build(cpu_dtype="bfloat16")
    assert narrow.parts.pipelines["dev"].transformer.dtype == torch.bfloat16
    assert draw(narrow, **WITNESS) != draw(generator, **WITNESS)


def test_healthy(generator: Generator) -> None:
    assert generator.healthy()


FINE_TUNES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_bytes((MINI / "lora.safetensors").read_bytes()[:-10]), "truncated"),
    "text": (lambda p: p.write_text("<html>"), "not.* safetensors"),
    "shapes": (lambda p: write_lora(p, lambda ts: {n: torch.zeros(8, 8) for n in ts}), "shape"),
    "nan": (lambda p: write_lora(p, lambda ts: {n: t * float("nan") for n, t in ts.items()}), "NaN|finite"),
    "keys": (lambda p: write_lora(p, lambda ts: ts | {"what.is.this": torch.zeros(1)}), r"what\.is\.this"),
}


@pytest.mark.parametrize("named", [True, False], ids=["COG_WEIGHTS", "bundled"])
@pytest.mark.parametrize("case", FINE_TUNES)
def test_a_fine_tune_that_cannot_be_applied_fails_set_up(weights: Path, case: str, named: bool) -> None:
    make, reason = FINE_TUNES[case]
    path = weights / ("mine.safetensors" if named else "lora.safetensors")
    make(path)
    with pytest.raises(FluxLoraError, match=f"{path.name}.*{reason}|{reason}.*{path.name}"):
        build(weights, str(path) if named else None)


def test_a_fine_tune_may_be_named_as_in_the_weights_directory(weights: Path) -> None:
    (weights / "lora.safetensors").rename(weights / "mine.safetensors")
    assert build(weights, "mine.safetensors").parts.adapters.fine_tune is not None


def test_a_fine_tune_may_be_the_file_itself(tmp_path: Path) -> None:
    content = base64.b64encode((MINI / "lora.safetensors").read_bytes()).decode()
    used = build(without_lora(tmp_path / "w"), f"data:;base64,{content}", adapter_cache=tmp_path / "cache")
    assert used.parts.adapters.fine_tune is not None


def test_a_named_fine_tune_that_is_missing_fails_set_up_before_any_weights_are_opened(tmp_path: Path) -> None:
    def opened(*_: Any) -> Any:
        raise AssertionError

    settings = Settings(weights=MINI)
    with pytest.raises(AdapterError, match=r"gone\.safetensors"):
        assemble(settings, str(tmp_path / "gone.safetensors"), log=lambda _: None, open_weights=opened)


def test_a_bundled_fine_tune_that_is_a_broken_link_fails_set_up(weights: Path) -> None:
    (weights / "lora.safetensors").unlink()
    (weights / "lora.safetensors").symlink_to(weights / "gone.safetensors")
    with pytest.raises(FluxLoraError, match=r"lora\.safetensors"):
        build(weights)


def test_the_base_model_alone_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    assemble(Settings(weights=without_lora(tmp_path / "weights")), log=lines.append)
    assert any("base model alone" in line for line in lines)


def test_an_impossible_device_is_a_setting_that_is_named() -> None:
    with pytest.raises(SettingsError, match="FLUX_DEVICE=cuda:77"):
        build(device="cuda:77")


@pytest.mark.parametrize(("side", "poor"), [(256, True), (512, True), (1024, False)])
def test_too_few_patches_are_mentioned(generator: Generator, side: int, poor: bool) -> None:
    lines: list[str] = []
    asked = WITNESS | {"width": side, "height": side, "num_inference_steps": 1}
    Generator(replace(generator.parts, log=lines.append)).draw(Request.parse(**asked))
    assert any("too few to show much" in line for line in lines) == poor


def test_words_that_a_small_model_does_not_know_are_told_once(generator: Generator) -> None:
    lines: list[str] = []
    asked = WITNESS | {"prompt": "a tomato riding a horse", "num_outputs": 2, "num_inference_steps": 1}
    Generator(replace(generator.parts, log=lines.append)).draw(Request.parse(**asked))
    assert [line for line in lines if "words" in line] == [
        "this model knows 167 words, in small letters, and not: riding"
    ]
    lines.clear()
    any_vocabulary = replace(generator.parts, log=lines.append, known_words=None)  # as of weights that list no words
    Generator(any_vocabulary).draw(Request.parse(**asked))
    assert not [line for line in lines if "words" in line]


def test_the_trigger_of_any_lora_is_missed_in_a_prompt_without_it(tmp_path: Path) -> None:
    weights = without_lora(tmp_path / "weights")
    tensors = load_file(MINI / "lora.safetensors")
    for name, word in (("lora", "OWN"), ("other", "OTHER")):
        save_file(tensors, weights / f"{name}.safetensors", {"modelspec.trigger_phrase": word})
    lines: list[str] = []
    triggered = assemble(Settings(weights=weights), log=lines.append)

    def missed(prompt: str, **inputs: Any) -> list[str]:
        lines.clear()
        asked = WITNESS | {"prompt": prompt, "num_inference_steps": 1} | inputs
        triggered.draw(Request.parse(**asked))
        return [line.split(",")[0] for line in lines if "lacks" in line]

    assert missed("a tomato") == ["the prompt lacks 'OWN'"]
    assert missed("an own tomato") == []
    assert missed("a tomato", lora_scale=0) == []
    assert missed("an OWN tomato", replicate_weights="other.safetensors") == ["the prompt lacks 'OTHER'"]
