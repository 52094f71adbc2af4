import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flux_lora.errors import RequestError
from flux_lora.request import SIZES, Request, nearest_multiple

CONTRACT = Path(__file__).parent / "contract"
DOCUMENTED = json.loads((CONTRACT / "input_schema.json").read_text())["properties"]
BOUNDED = {name: schema for name, schema in DOCUMENTED.items() if "minimum" in schema}
CHOICES = {name: schema["enum"] for name, schema in DOCUMENTED.items() if "enum" in schema}
INTEGERS = [name for name, schema in DOCUMENTED.items() if schema["type"] == "integer"]
NUMBERS = [name for name, schema in DOCUMENTED.items() if schema["type"] == "number"]


def parse(**inputs: object) -> Request:
    return Request.parse(**{"prompt": "a croissant", **inputs})


def refusal(**inputs: object) -> str:
    with pytest.raises(RequestError) as caught:
        parse(**inputs)
    return str(caught.value)


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("bound", ["minimum", "maximum"])
def test_bounds_are_inclusive_and_named(name: str, bound: str) -> None:
    limit = BOUNDED[name][bound]
    assert getattr(parse(**{name: limit}), name) == limit
    outward = -math.inf if bound == "minimum" else math.inf
    outside = limit + int(math.copysign(1, outward)) if name in INTEGERS else math.nextafter(limit, outward)
    message = refusal(**{name: outside})
    assert message.startswith(f"{name} must be ")
    assert f" from {BOUNDED[name]['minimum']} to {BOUNDED[name]['maximum']}, not {outside}" in message


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CHOICES.items() for value in values])
def test_every_choice_is_taken(name: str, value: object) -> None:
    assert getattr(parse(**{name: value}, width=300, height=300), name) == value


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["pro", "DEV", "", 1, None, ["dev"], "\ud800"])
def test_another_choice_is_refused(name: str, value: object) -> None:
    assert refusal(**{name: value}) == f"{name} must be one of {', '.join(CHOICES[name])}, not {value!r}."


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (INTEGERS, [True, "7", b"7", 7.5, math.nan, math.inf, -math.inf, [7], 1 + 0j]),
        (NUMBERS, [True, "1", None, math.nan, math.inf, -math.inf, [1], 10**400]),
        (["prompt"], [5, None, b"text", ["text"], True]),
        (["replicate_weights"], [0, 5, b"text", False]),
        (["disable_safety_checker"], [0, 1, "true", None, 1.0]),
        (["num_outputs", "num_inference_steps", "output_quality"], [None]),
    ],
)
def test_a_wrong_type_is_refused_by_name(names: list[str], values: list[object]) -> None:
    for name in names:
        for value in values:
            assert refusal(**{name: value}).startswith(f"{name} must be ")


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_may_arrive_as_a_float(name: str) -> None:
    value = DOCUMENTED[name].get("maximum", 7)
    taken = getattr(parse(**{name: float(value)}), name)
    assert taken == value
    assert type(taken) is int


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_arrive_as_an_integer(name: str) -> None:
    assert type(getattr(parse(**{name: 1}), name)) is float


def test_optional_inputs_may_be_none() -> None:
    request = parse(width=None, height=None, seed=None, replicate_weights=None)
    assert (request.width, request.height, request.replicate_weights) == (None, None, None)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t\x7f", "é😀\U0010ffff\ufffe", "x" * 100_000])
def test_any_valid_text_is_a_prompt(prompt: str) -> None:
    assert parse(prompt=prompt).prompt == prompt


@pytest.mark.parametrize("name", ["prompt", "replicate_weights"])
@pytest.mark.parametrize("code", [0, 0xD800, 0xDBFF, 0xDC00, 0xDFFF])
@pytest.mark.parametrize("index", [0, 1, 99_999])
def test_nul_and_lone_surrogates_are_refused(name: str, code: int, index: int) -> None:
    text = "x" * index + chr(code) + "y"
    assert refusal(**{name: text}).startswith(f"{name} holds {chr(code)!r} at index {index},")


def test_empty_replicate_weights_are_left_out() -> None:
    assert parse(replicate_weights="").replicate_weights is None


def test_a_missing_prompt_is_named() -> None:
    with pytest.raises(RequestError, match=r"^prompt is required\.$"):
        Request.parse()


def test_all_problems_are_named_at_once_and_long_values_are_cut() -> None:
    message = refusal(width=255, model="x" * 1000, seed="7")
    assert all(f"{name} must be " in message for name in ("width", "model", "seed"))
    assert len(message) < 300


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_output", "Did you mean num_outputs?"),
        ("lora_weights", "Did you mean replicate_weights?"),
        ("Seed", "Did you mean seed?"),
        ("cls", "The inputs are prompt, aspect_ratio, "),
        ("\ud800", "The inputs are prompt, "),
    ],
)
def test_an_unknown_input_is_refused_by_name(name: str, hint: str) -> None:
    assert f"{name!r} is not an input. {hint}" in refusal(**{name: 1})


@pytest.mark.parametrize(
    ("given_seed", "seed"),
    [
        (0, 0),
        (-0.0, 0),
        (7, 7),
        (7.0, 7),
        (2**63 - 1, 2**63 - 1),
        (2**63, 0),
        (2**64 - 1, 2**63 - 1),
        (1e23, 99_999_999_999_999_991_611_392 - 10_842 * 9_223_372_036_854_775_808),
        (10**23, 100_000_000_000_000_000_000_000 - 10_842 * 9_223_372_036_854_775_808),
    ],
)
def test_seeds_are_taken_modulo_2_to_63(given_seed: object, seed: object) -> None:
    assert parse(seed=given_seed).seed == seed


def test_integers_too_long_to_write_out_are_handled() -> None:
    assert parse(seed=2**20_000 + 5).seed == 5
    assert refusal(width=2**20_000) == "width must be a whole number from 256 to 1440, not an int too long to show."


@pytest.mark.parametrize("inputs", [{}, {"seed": None}, {"seed": -1}, {"seed": -5.0}, {"seed": -(10**23)}])
def test_a_random_seed_is_drawn_from_32_bits(inputs: dict[str, Any]) -> None:
    seeds = {parse(**inputs).seed for _ in range(100)}
    assert len(seeds) > 90
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert max(seeds) >= 2**16


def test_image_k_has_seed_plus_k_and_wraps() -> None:
    assert parse(seed=2**63 - 2, num_outputs=4).seeds == (2**63 - 2, 2**63 - 1, 0, 1)


def test_sizes_are_those_of_the_contract() -> None:
    row = next(
        line for line in (CONTRACT / "README.md").read_text().splitlines() if line.startswith("| `aspect_ratio`")
    )
    sizes = {ratio: (int(width), int(height)) for ratio, width, height in re.findall(r"(\d+:\d+) (\d+)×(\d+)", row)}
    assert sizes == SIZES
    assert [*sizes, "custom"] == CHOICES["aspect_ratio"]
    for ratio, size in sizes.items():
        assert parse(aspect_ratio=ratio, width=256, height=256).size == size


@pytest.mark.parametrize(
    ("side", "pixels"), [(1000, 1008), (263, 256), (264, 272), (1433, 1440), (1432, 1440), (1431, 1424), (1440, 1440)]
)
def test_custom_sides_are_rounded(side: int, pixels: int) -> None:
    assert parse(aspect_ratio="custom", width=side, height=256).size == (pixels, 256)
    assert parse(aspect_ratio="custom", width=256, height=float(side)).size == (256, pixels)


@given(st.integers(256, 1440))
def test_rounding_takes_the_nearest_multiple_and_the_upper_of_two(side: int) -> None:
    nearest = min(range(0, 2000, 16), key=lambda multiple: (abs(multiple - side), -multiple))
    assert nearest_multiple(side) == nearest
    assert 256 <= nearest <= 1440


@pytest.mark.parametrize(
    ("sides", "missing"),
    [({}, "width and height"), ({"width": 512}, "height"), ({"height": 512}, "width")],
)
def test_custom_without_a_side_names_it(sides: dict[str, int], missing: str) -> None:
    assert refusal(aspect_ratio="custom", **sides).endswith(f": give {missing} too.")


def test_inputs_without_effect_are_noted() -> None:
    assert parse(model="dev", guidance_scale=2).notes == ()
    assert parse(model="schnell", num_inference_steps=4).notes == ()
    assert parse(aspect_ratio="custom", width=300, height=300).notes == ()
    size, guidance = parse(model="schnell", num_inference_steps=4, guidance_scale=2, height=300).notes
    assert size.startswith("width and height are ignored")
    assert guidance.startswith("guidance_scale is ignored")


@pytest.mark.parametrize(("model", "tokens"), [("dev", 512), ("schnell", 256)])
def test_each_model_reads_its_number_of_tokens(model: str, tokens: int) -> None:
    assert parse(model=model).max_text_tokens == tokens


def test_a_request_is_frozen_and_survives_a_round_trip() -> None:
    request = parse(seed=1e23, width=300.0, replicate_weights="", lora_scale=1)
    assert Request.parse(**json.loads(json.dumps(request.model_dump()))) == request
    with pytest.raises(ValidationError, match="frozen"):
        request.seed = 1  # type: ignore[misc]  # mypy knows it too


def test_schnell_with_the_default_of_dev_says_that_four_steps_are_enough() -> None:
    assert any("try num_inference_steps=4" in note for note in Request.parse(prompt="a", model="schnell").notes)
    assert not Request.parse(prompt="a", model="schnell", num_inference_steps=4).notes
    assert not Request.parse(prompt="a").notes


def test_one_fine_tune_is_asked_for() -> None:
    assert parse().adapters == ((None, 1.0),)
    assert parse(replicate_weights="owner/name", lora_scale=0.5).adapters == (("owner/name", 0.5),)


def test_further_fine_tunes_are_no_documented_input() -> None:
    request = parse(lora_scale=0.5)
    wider = request.with_more(("loras/style.safetensors", 0.8)).with_more(("owner/name", -1.0), (None, 0.1))
    assert wider.adapters == ((None, 0.5), ("loras/style.safetensors", 0.8), ("owner/name", -1.0), (None, 0.1))
    assert request.adapters == ((None, 0.5),)
    assert wider != request
    assert wider.model_dump() == request.model_dump()
    for name in ("_more", "more", "adapters"):
        assert f"{name!r} is not an input" in refusal(**{name: ()})
