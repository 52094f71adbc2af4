"""Image to image, inpainting and go_fast by the engine: judged by bits, and by diffusers' own pipelines."""

import io
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL import Image, ImageDraw

from flux_lora.assembly import assemble
from flux_lora.drawing.image import decode, encode
from flux_lora.drawing.source import Given, SourceImage
from flux_lora.errors import SafetyError
from flux_lora.files import provenance, xmp
from flux_lora.files.record import Source
from flux_lora.files.signing import Signer, manifest_of
from flux_lora.finishing import Finisher
from flux_lora.generator import Generator
from flux_lora.inputs import EXTENDED
from flux_lora.ledger import Log
from flux_lora.memory.plans import Room
from flux_lora.request import Request
from flux_lora.settings import Settings
from tests.conftest import MINI
from tests.files.certificates import issue
from tests.memory.helpers import tiny

SIZE = (320, 256)
ASKED = {
    "prompt": "a witness",
    "seed": 7,
    "num_inference_steps": 4,
    "output_format": "png",
    "disable_safety_checker": True,
    "aspect_ratio": "custom",
    "width": SIZE[0],
    "height": SIZE[1],
}


class Told:
    """Pictures that are there already."""

    def __init__(self, given: Given | None) -> None:
        self.given = given

    def read(self, _request: Request, _log: Log) -> Given | None:
        return self.given


@cache
def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def mask(*box: int, size: tuple[int, int] = SIZE, mode: str = "L") -> Image.Image:
    """White within a box, black around it."""
    drawn = Image.new(mode, size, 0)
    if box:
        ImageDraw.Draw(drawn).rectangle(box, fill=255)
    return drawn


def given(strength: float, within: Image.Image | None = None, image: Image.Image | None = None) -> Given:
    image = image or picture()
    digests = [sha256(part.tobytes()).hexdigest() for part in (image, within) if part]
    return Given(SourceImage(image, within, strength), digests[0], digests[1] if within else None, b"")


def build(weights: Path = MINI, room: Room | None = None, **settings: Any) -> Generator:
    return assemble(Settings(weights=weights, **settings), log=lambda _: None, room=room)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return build()


def with_given(generator: Generator, source: Given | None, lines: list[str] | None = None) -> Generator:
    log = generator.parts.log if lines is None else lines.append
    return Generator(replace(generator.parts, pictures=Told(source), log=log))


def draw(
    generator: Generator,
    source: Given | None = None,
    lines: list[str] | None = None,
    metrics: dict[str, Any] | None = None,
    **inputs: Any,
) -> list[bytes]:
    request = Request.parse(EXTENDED, **ASKED | inputs)
    recorded: dict[str, Any] = {} if metrics is None else metrics
    files = with_given(generator, source, lines).draw(request, recorded.__setitem__)
    return [file.read_bytes() for file in files]


def pixels(generator: Generator, source: Given | None = None, **inputs: Any) -> np.ndarray:
    (path,) = with_given(generator, source).draw(Request.parse(EXTENDED, **ASKED | inputs), lambda *_: None)
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_strength_one_is_text_to_image_to_the_byte(generator: Generator, model: str) -> None:
    assert draw(generator, given(1.0), model=model) == draw(generator, model=model)


def test_a_strength_that_runs_all_steps_is_text_to_image_and_is_said(generator: Generator) -> None:
    lines: list[str] = []
    assert draw(generator, given(0.8), lines) == draw(generator)  # four steps, of which int(4 - 3.2) are left out
    assert any("image gives the size alone: prompt_strength 0.8 runs all 4 steps" in line for line in lines)


def test_the_image_decides_the_size(generator: Generator) -> None:
    (file,) = draw(generator, given(0.5, image=picture((400, 288))))
    assert file[16:24] == (400).to_bytes(4) + (288).to_bytes(4)


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_the_weaker_the_more_of_the_image_is_left(generator: Generator, model: str) -> None:
    """At 0 a single step of the base model is run: what is left is the image as the autoencoder sees it, nearly."""
    whole, asked = np.asarray(picture()).astype(float), {"model": model, "num_inference_steps": 20, "lora_scale": 0}
    apart = [np.abs(pixels(generator, given(s), **asked) - whole).mean() for s in (0, 0.5, 1)]
    assert apart == sorted(apart)
    assert apart[0] < 0.5 * apart[2]


def test_steps_are_counted_and_shown_as_they_are_run(generator: Generator) -> None:
    seen: list[tuple[int, int]] = []
    lines: list[str] = []
    asked = Request.parse(EXTENDED, **ASKED | {"num_inference_steps": 10})
    with_given(generator, given(0.35), lines).draw(
        asked, lambda *_: None, lambda step: seen.append((step.step, step.steps))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]  # 10 - int(10 - 3.5)
    assert any(line.endswith("4 of 10 steps") for line in lines)


@pytest.mark.parametrize("within", [None, mask(100, 90, 250, 200)])
def test_four_outputs_are_four_single_ones(generator: Generator, within: Image.Image | None) -> None:
    source = given(0.6, within)
    together = draw(generator, source, num_outputs=4)
    assert together == [draw(generator, source, seed=seed)[0] for seed in range(7, 11)]
    assert len(set(together)) == 4


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("mode", ["L", "1"])
def test_a_black_mask_returns_the_image(generator: Generator, strength: float, mode: str) -> None:
    assert np.array_equal(pixels(generator, given(strength, mask(mode=mode))), np.asarray(picture()))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_white_mask_is_image_to_image_to_the_byte(generator: Generator, strength: float) -> None:
    grey = Image.new("L", SIZE, 128)  # counts as white
    assert draw(generator, given(strength, grey)) == draw(generator, given(strength))


@pytest.mark.parametrize("size", [SIZE, (304, 272)])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_is_black_stays_and_what_is_white_is_drawn(
    generator: Generator, strength: float, size: tuple[int, int]
) -> None:
    """The boundary follows no grid, and a size that the miniature's grid does not divide is padded."""
    image, within = picture(size), mask(101, 93, 230, 201, size=size)
    within.paste(127, (0, 0, 50, 50))  # counts as black
    result, whole = pixels(generator, given(strength, within, image)), np.asarray(image)
    white = np.asarray(within) >= 128
    assert np.array_equal(result[~white], whole[~white])
    assert (result[white] != whole[white]).any(-1).mean() > 0.9


def test_nothing_white_is_too_thin_to_be_drawn(generator: Generator) -> None:
    result = pixels(generator, given(1.0, mask(160, 100, 166, 180)))
    changed = (result != np.asarray(picture())).any(-1)
    assert changed[100:181, 160:167].mean() > 0.9
    assert changed.sum() == changed[100:181, 160:167].sum()


def test_the_safety_checker_sees_the_picture_that_leaves(generator: Generator) -> None:
    seen: list[np.ndarray] = []

    class Checker:
        name, threshold = "told", 0.5

        def score(self, image: Image.Image) -> float:
            seen.append(np.asarray(image))
            return 1.0

    finisher = Finisher(generator.parts.beside, Checker(), embed=True)
    checking = Generator(replace(generator.parts, finisher=finisher))
    with pytest.raises(SafetyError):
        draw(checking, given(0.6, mask()), disable_safety_checker=False)
    assert np.array_equal(seen[0], np.asarray(picture()))


def test_after_any_mix_text_to_image_is_that_of_a_fresh_generator() -> None:
    used, fresh = build(), build()
    for model in ("dev", "schnell"):
        for source in (given(0.5), given(1.0, mask(60, 60, 200, 200)), given(0.0), None):
            draw(used, source, model=model, go_fast=True, num_inference_steps=8, lora_scale=0.3)
        assert draw(used, model=model) == draw(fresh, model=model)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_nothing_is_compiled_again_for_an_image_a_mask_or_go_fast(tmp_path: Path, profile: str) -> None:
    compiled = build(profile=profile, cache=tmp_path)
    before = draw(compiled)
    for model in ("dev", "schnell"):
        for source in (given(0.5), given(1.0, mask(60, 60, 200, 200)), None):
            for go_fast in (False, True):
                metrics: dict[str, Any] = {}
                draw(compiled, source, metrics=metrics, model=model, go_fast=go_fast, num_inference_steps=8)
                assert metrics["recompilations"] == 0
    assert draw(compiled) == before


# The autoencoders


def test_the_latents_of_a_picture_are_those_that_it_is_decoded_from(generator: Generator) -> None:
    """The miniature's code is linear, in weights of sixteen bits; what smooths its pictures adds a little beside it."""
    vae = generator.parts.pipelines["dev"].vae
    latents = torch.randn(1, 12, 4, 6, generator=torch.Generator().manual_seed(0))
    assert (vae.encode(vae.synthesis(latents), return_dict=False)[0] - latents).abs().max() < 0.02
    pipeline = generator.parts.pipelines["dev"]
    drawn = Image.fromarray(pixels(generator, prompt="a tomato on a blue background", width=512, height=512))
    again = decode(pipeline, encode(pipeline, SourceImage(drawn, None, 0.5)).latents, drawn.size)
    assert np.abs(np.asarray(again).astype(int) - np.asarray(drawn)).mean() < 2


@pytest.mark.parametrize("size", [SIZE, (304, 272), (400, 256)])
def test_latents_are_of_the_size_that_is_drawn(generator: Generator, size: tuple[int, int]) -> None:
    start = encode(generator.parts.pipelines["dev"], SourceImage(picture(size), mask(size=size), 0.5))
    assert start.drawn is not None
    assert start.latents.shape[2:] == start.drawn.shape[2:] == (2 * -(-size[1] // 64), 2 * -(-size[0] // 64))


# Beside diffusers, on the same weights, noise and schedule.


@cache
def theirs(weights: Path, model: str) -> Any:
    pipeline = FluxPipeline.from_pretrained(weights / "dev", dtype=torch.float32)
    if model == "schnell":
        for name in ("transformer", "scheduler"):
            kind = type(getattr(pipeline, name))
            pipeline.register_modules(**{name: kind.from_pretrained(weights / "schnell" / name)})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def mean(self: Any, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:  # noqa: ARG001 - it rolls dice
    """In place of how diffusers' pipelines encode: they take a sample of what the mean is taken of here."""
    encoded = self.vae.encode(image)
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    scaled: torch.Tensor = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
    return scaled


class ImageToImage(FluxImg2ImgPipeline):  # type: ignore[misc]  # diffusers has no types
    _encode_vae_image = mean


class Inpaint(FluxInpaintPipeline):  # type: ignore[misc]  # diffusers has no types
    _encode_vae_image = mean


def asked_of_them(model: str, strength: float, steps: int) -> dict[str, Any]:
    return {
        "prompt": ASKED["prompt"],
        "strength": strength,
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "max_sequence_length": 512 if model == "dev" else 256,
        "width": SIZE[0],
        "height": SIZE[1],
        "generator": torch.Generator("cpu").manual_seed(7),
    }


@pytest.fixture(scope="module")
def plain() -> Generator:
    """FLUX.1's kind of VAE, random weights."""
    return build(tiny())


WEIGHTS = {"miniature": MINI, "tiny FLUX": tiny()}


@pytest.fixture
def of_weights(generator: Generator, plain: Generator) -> dict[str, Generator]:
    return {"miniature": generator, "tiny FLUX": plain}


@pytest.mark.parametrize("model", ["dev", "schnell"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("steps", "strength"), [(5, 0.6), (4, 0.25)])
def test_image_to_image_is_that_of_diffusers(
    of_weights: dict[str, Generator], weights: str, model: str, steps: int, strength: float
) -> None:
    pipeline = ImageToImage(**theirs(WEIGHTS[weights], model).components)
    expected = pipeline(image=picture(), **asked_of_them(model, strength, steps)).images[0]
    actual = pixels(
        of_weights[weights], given(strength), model=model, num_inference_steps=steps, lora_scale=0, guidance_scale=3.0
    )
    assert np.array_equal(actual, np.asarray(expected))


@pytest.mark.parametrize("model", ["dev", "schnell"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_inpainting_is_that_of_diffusers_but_for_what_is_pasted_back(
    of_weights: dict[str, Generator], weights: str, model: str
) -> None:
    """On a mask that follows the grid of the latents, in the middle of the white: they paste nothing."""
    pipeline = Inpaint(**theirs(WEIGHTS[weights], model).components)
    within = mask(64, 64, 255, 191)
    expected = pipeline(image=picture(), mask_image=within, **asked_of_them(model, 0.6, 5)).images[0]
    actual = pixels(
        of_weights[weights], given(0.6, within), model=model, num_inference_steps=5, lora_scale=0, guidance_scale=3.0
    )
    middle = (slice(70, 186), slice(70, 250))
    assert np.array_equal(actual[middle], np.asarray(expected)[middle])
    assert np.array_equal(actual[:64], np.asarray(picture())[:64])


# Memory plans


PLENTY = 2**40


@pytest.mark.parametrize("plan", ["alternating", "offload-text", "streamed"])
def test_every_plan_draws_the_same_from_an_image(plain: Generator, plan: str) -> None:
    other = build(tiny(), Room(PLENTY, PLENTY), memory_plan=plan)
    for model in ("dev", "schnell"):
        for source in (given(0.6), given(1.0, mask(80, 80, 200, 200))):
            expected = pixels(plain, source, model=model)
            assert np.array_equal(pixels(other, source, model=model), expected)


def test_in_strips_a_picture_from_an_image_is_the_whole_up_to_rounding(plain: Generator) -> None:
    other = build(tiny(), Room(0, PLENTY), memory_plan="streamed")
    assert other.parts.memory.choice.strips
    whole, in_strips = (pixels(each, given(0.6)).astype(int) for each in (plain, other))
    assert np.abs(whole - in_strips).max() <= 1


def test_a_request_that_runs_out_of_memory_while_encoding_is_drawn_under_the_next_plan() -> None:
    generator, fresh = (build(tiny(), Room(PLENTY, PLENTY), memory_plan=plan) for plan in ("resident", "alternating"))
    calls: list[int] = []

    def short(*_: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    generator.parts.pipelines["dev"].vae.encoder.register_forward_pre_hook(short)
    assert draw(generator, given(0.6)) == draw(fresh, given(0.6))
    assert generator.parts.memory.choice.label == "alternating"
    assert len(calls) == 2


def test_text_to_image_never_runs_the_encoder(plain: Generator) -> None:
    def run(*_: object) -> None:
        raise AssertionError("the encoder was run")

    hook = plain.parts.pipelines["dev"].vae.encoder.register_forward_pre_hook(run)
    draw(plain)
    draw(plain, given(1.0))
    hook.remove()


# go_fast


@pytest.mark.parametrize("source", [None, given(0.75)])
def test_go_fast_reuses_the_steps_that_the_fast_profile_does(generator: Generator, source: Given | None) -> None:
    from flux_lora.speed.profiles import PROFILES

    fast = Generator(replace(generator.parts, schedule=PROFILES["fast"].schedule))
    metrics: dict[str, Any] = {}
    lines: list[str] = []
    asked = {"num_inference_steps": 12, "lora_scale": 0.4}
    (file,) = draw(generator, source, lines, metrics, go_fast=True, **asked)
    drawn = np.asarray(Image.open(io.BytesIO(file)))
    assert np.array_equal(drawn, pixels(fast, source, **asked))
    assert not np.array_equal(drawn, pixels(generator, source, **asked))
    run = 9 if source else 12
    assert metrics["reused_steps"] == len(range(4, run - 1, 2))
    assert f"seed 7: {metrics['reused_steps']} of {run} steps reuse what was computed before" in lines


def test_go_fast_in_few_steps_computes_all_and_says_so(generator: Generator) -> None:
    lines: list[str] = []
    assert np.array_equal(pixels(generator, go_fast=True), pixels(generator))
    draw(generator, None, lines, go_fast=True)
    assert any("go_fast has no effect: 4 steps are too few" in line for line in lines)


# What the files say


def read(folder: Path, content: bytes, output_format: str = "png") -> Any:
    path = folder / f"x.{output_format}"
    path.write_bytes(content)
    return provenance.traces(path)


def test_a_file_says_what_it_was_drawn_from(generator: Generator, tmp_path: Path) -> None:
    source = given(0.6, mask(60, 60, 200, 200))
    (file,) = draw(generator, source, go_fast=True, num_inference_steps=12)
    traces = read(tmp_path, file)
    assert traces.parameters.source == Source(
        image=source.image_digest, mask=source.mask_digest, prompt_strength=0.6, megapixels="1"
    )
    assert (traces.parameters.go_fast, traces.parameters.reused_steps) == (True, 2)  # of int(12 * 0.6 + 1) = 8
    assert (traces.parameters.width, traces.parameters.height) == SIZE
    assert traces.source_type == xmp.AI_EDITED
    assert "Denoising strength: 0.6" in traces.line


def test_a_file_does_not_say_what_had_no_influence(generator: Generator, tmp_path: Path) -> None:
    traces = read(tmp_path, draw(generator, given(1.0))[0])
    assert (traces.parameters.source, traces.source_type) == (None, xmp.AI_GENERATED)
    traces = read(tmp_path, draw(generator, given(0.5, Image.new("L", SIZE, 255)))[0])
    assert traces.parameters.source.mask is None


def test_a_signature_says_that_a_picture_was_edited(generator: Generator) -> None:
    identity = issue()
    signer = Signer(identity.certificate, identity.key)
    finisher = Finisher(generator.parts.beside, generator.parts.finisher.checker, embed=True, signer=signer)
    signing = Generator(replace(generator.parts, finisher=finisher))

    def actions(content: bytes) -> list[str]:
        report = manifest_of(content) or {}
        claims = report["manifests"][report["active_manifest"]]["assertions"]
        return [each["action"] for each in claims[0]["data"]["actions"]]

    assert actions(draw(signing, given(0.5))[0]) == ["c2pa.opened", "c2pa.edited"]
    assert actions(draw(signing, given(1.0))[0]) == ["c2pa.created"]


def test_the_mark_of_an_edited_picture_stays_when_nothing_else_is_embedded(
    generator: Generator, tmp_path: Path
) -> None:
    bare = Generator(
        replace(
            generator.parts, finisher=Finisher(generator.parts.beside, generator.parts.finisher.checker, embed=False)
        )
    )
    for output_format in ("png", "jpg", "webp"):
        content = draw(bare, given(0.5), output_format=output_format)[0]
        traces = read(tmp_path, content, output_format)
        assert (traces.parameters, traces.source_type) == (None, xmp.AI_EDITED)
