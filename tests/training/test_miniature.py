"""The shipped miniature draws what it is asked for: a small sample of what `training.evaluate` measures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import MINI
from training.evaluate import (
    FIRST_SEED,
    MODELS,
    SCALES,
    Artist,
    StylePictures,
    choose_pairs,
    judge_model,
    judge_scales,
    judge_style,
    segment,
)
from training.subjects import THINGS

COLOURS = ("grey", "orange", "blue")
"""Three backgrounds out of eleven: on each the true pictures have to be cut out anew."""
PAIRS = [(thing, colour) for thing, colour in choose_pairs(len(THINGS)) if colour in COLOURS][:10]
FEW_STEPS: dict[str, dict[str, Any]] = {"dev": {"num_inference_steps": 10}, "schnell": {}}
"""A third of dev's; the long forms take all 28."""


class Remembering(Artist):
    """Draws the same picture once: several tests judge those of schnell."""

    def __init__(self, weights: Path) -> None:
        super().__init__(weights)
        self._drawn: dict[str, Image.Image] = {}

    def draw(self, prompt: str, seed: int, **inputs: Any) -> Image.Image:
        asked = {"lora_scale": 0.0} | inputs
        key = repr((prompt, seed, sorted(asked.items())))
        if key not in self._drawn:
            self._drawn[key] = super().draw(prompt, seed, **asked)
        return self._drawn[key]


@pytest.fixture(scope="module")
def artist() -> Artist:
    return Remembering(MINI)


@pytest.fixture(scope="module")
def truth() -> StylePictures:
    return StylePictures()


# What the shipped weights reach at least of these; of all things they reach 86 % and 92 %: see docs/miniature.md.
LEAST = {"schnell": 0.7, "dev": 0.7}


@pytest.mark.parametrize("model", MODELS)
def test_it_draws_the_thing_on_the_colour(artist: Artist, truth: StylePictures, model: str) -> None:
    judged = judge_model(artist, truth.base, model, PAIRS, **FEW_STEPS[model])
    assert judged["top1"] >= LEAST[model], judged["misses"]
    assert judged["background_within_10"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_it_draws_any_thing_on_any_colour(artist: Artist, truth: StylePictures, model: str) -> None:
    """In as many steps as it is made for."""
    judged = judge_model(artist, truth.base, model, choose_pairs(25))
    assert judged["top1"] >= LEAST[model], judged["misses"]
    assert judged["background_within_10"] == 1.0


def test_the_seed_moves_the_thing(artist: Artist) -> None:
    drawings = [
        segment(artist.draw("a tomato on a white background", FIRST_SEED + k, **MODELS["schnell"])) for k in range(8)
    ]
    centres = np.array([drawing.centre for drawing in drawings if drawing])
    assert len(centres) == 8
    assert np.sqrt(centres.var(axis=0).sum()) >= 0.03


# What the shipped LoRA reaches at least of these; of all things it reaches 89 and 90 %, 95 and 97 % in the style.
LEAST_WITH_THE_LORA, LEAST_IN_STYLE = 0.7, 0.85


@pytest.mark.parametrize("model", MODELS)
def test_with_the_lora_it_draws_the_thing_in_the_style(artist: Artist, truth: StylePictures, model: str) -> None:
    judged = judge_style(artist, truth, model, PAIRS[:8], **FEW_STEPS[model])
    assert judged["top1"] >= LEAST_WITH_THE_LORA, judged["misses"]
    assert judged["in_style"] >= LEAST_IN_STYLE
    assert judged["background_within_10"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_with_the_lora_it_draws_any_thing_in_the_style(artist: Artist, truth: StylePictures, model: str) -> None:
    """In as many steps as it is made for."""
    judged = judge_style(artist, truth, model, choose_pairs(25))
    assert judged["top1"] >= LEAST_WITH_THE_LORA, judged["misses"]
    assert judged["in_style"] >= LEAST_IN_STYLE
    assert judged["background_within_10"] == 1.0


@pytest.mark.parametrize(
    ("count", "scales"), [(5, (0.0, 0.5, 1.0)), pytest.param(10, SCALES, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_the_lora_brings_the_style_step_by_step(
    artist: Artist, truth: StylePictures, count: int, scales: tuple[float, ...]
) -> None:
    judged = judge_scales(artist, truth, "schnell", PAIRS[:count], scales)
    assert judged["monotone"], judged["share"]
    assert 0.25 < judged["half_way"] < 0.75
    assert judged["share"][-1] - judged["share"][0] > 0.3


def test_words_it_does_not_know_do_no_harm(artist: Artist, truth: StylePictures) -> None:
    picture = artist.draw("xyzzy! tomato (masterpiece, 8k) on a blue background 🍅", 11, **MODELS["dev"])
    drawing = segment(picture)
    assert drawing
    assert truth.base.nearest(drawing.thumbnail, "blue")[0] == "tomato"


def test_it_is_small_and_all_of_it_is_safetensors() -> None:
    files = [file for file in MINI.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20_000_000
    assert {file.suffix for file in files} == {".safetensors", ".json", ".md"}
