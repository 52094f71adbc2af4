import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flux_lora.errors import RequestError
from flux_lora.inputs import DOCUMENTED, EXTENDED, Interface
from flux_lora.request import SIZES, Request, nearest_multiple
from tests.interfaces import CONTRACT, DOORS, Door

SCHEMAS = DOORS[1].inputs
INTEGERS = [name for name, schema in SCHEMAS.items() if schema["type"] == "integer"]
NUMBERS = [name for name, schema in SCHEMAS.items() if schema["type"] == "number"]
TEXTS = [name for name, schema in SCHEMAS.items() if schema["type"] == "string" and "enum" not in schema]
CHOICES = [(door, name, schema["enum"]) for door in DOORS for name, schema in door.inputs.items() if "enum" in schema]
BOUNDED = [
    (door, name, (schema["minimum"], schema["maximum"]))
    for door in DOORS
    for name, schema in door.inputs.items()
    if "minimum" in schema
]


def parse(interface: Interface = DOCUMENTED, /, **inputs: object) -> Request:
    return Request.parse(interface, **{"prompt": "a croissant", **inputs})


def refusal(interface: Interface = DOCUMENTED, /, **inputs: object) -> str:
    with pytest.raises(RequestError) as caught:
        parse(interface, **inputs)
    return str(caught.value)


@pytest.mark.parametrize(("door", "name", "bounds"), BOUNDED)
@pytest.mark.parametrize("end", [0, 1])
def test_bounds_are_inclusive_and_named(door: Door, name: str, bounds: tuple[float, float], end: int) -> None:
    limit = bounds[end]
    assert getattr(parse(door.interface, **{name: limit}), name) == limit
    outward = (-math.inf, math.inf)[end]
    outside = limit + int(math.copysign(1, outward)) if name in INTEGERS else math.nextafter(limit, outward)
    message = refusal(door.interface, **{name: outside})
    assert message.startswith(f"{name} must be ")
    assert f" from {bounds[0]} to {bounds[1]}, not {outside}" in message


@pytest.mark.parametrize("door", DOORS)
def test_what_is_left_out_is_the_documented_default(door: Door) -> None:
    request = parse(door.interface)
    for name, schema in door.inputs.items():
        if name not in ("prompt", "seed"):
            assert getattr(request, name) == schema.get("default")


@pytest.mark.parametrize(("door", "name", "choices"), CHOICES)
def test_every_choice_is_taken(door: Door, name: str, choices: list[str]) -> None:
    for value in choices:
        assert getattr(parse(door.interface, **{name: value}, width=300, height=300), name) == value


@pytest.mark.parametrize(("door", "name", "choices"), CHOICES)
@pytest.mark.parametrize("value", ["pro", "DEV", "", 1, None, ["dev"], "\ud800"])
def test_another_choice_is_refused(door: Door, name: str, choices: list[str], value: object) -> None:
    assert refusal(door.interface, **{name: value}) == f"{name} must be one of {', '.join(choices)}, not {value!r}."


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (INTEGERS, [True, "7", b"7", 7.5, math.nan, math.inf, -math.inf, [7], 1 + 0j]),
        (NUMBERS, [True, "1", None, math.nan, math.inf, -math.inf, [1], 10**400]),
        (["prompt"], [5, None, b"text", ["text"], True]),
        (["replicate_weights", "extra_lora", "image", "mask"], [0, 5, b"text", False]),
        (["disable_safety_checker", "go_fast"], [0, 1, "true", None, 1.0]),
        (["num_outputs", "num_inference_steps", "output_quality"], [None]),
    ],
)
def test_a_wrong_type_is_refused_by_name(names: list[str], values: list[object]) -> None:
    for name in names:
        for value in values:
            assert refusal(EXTENDED, **{name: value}).startswith(f"{name} must be ")


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_may_arrive_as_a_float(name: str) -> None:
    value = SCHEMAS[name].get("maximum", 7)
    taken = getattr(parse(**{name: float(value)}), name)
    assert taken == value
    assert type(taken) is int


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_arrive_as_an_integer(name: str) -> None:
    assert type(getattr(parse(EXTENDED, **{name: 1}), name)) is float


def test_optional_inputs_may_be_none() -> None:
    request = parse(width=None, height=None, seed=None, replicate_weights=None)
    assert (request.width, request.height, request.replicate_weights) == (None, None, None)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t\x7f", "é😀\U0010ffff\ufffe", "x" * 100_000])
def test_any_valid_text_is_a_prompt(prompt: str) -> None:
    assert parse(prompt=prompt).prompt == prompt


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("code", [0, 0xD800, 0xDBFF, 0xDC00, 0xDFFF])
@pytest.mark.parametrize("index", [0, 1, 99_999])
def test_nul_and_lone_surrogates_are_refused(name: str, code: int, index: int) -> None:
    text = "x" * index + chr(code) + "y"
    assert refusal(EXTENDED, **{name: text}).startswith(f"{name} holds {chr(code)!r} at index {index},")


def test_empty_replicate_weights_are_left_out() -> None:
    assert parse(replicate_weights="").replicate_weights is None
    request = parse(EXTENDED, image="", mask="", extra_lora="")
    assert (request.image, request.mask, request.extra_lora) == (None, None, None)


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
    assert [*sizes, "custom"] == SCHEMAS["aspect_ratio"]["enum"]
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
    assert Request.parse(EXTENDED, **json.loads(json.dumps(request.model_dump()))) == request
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


# The extended interface


@pytest.mark.parametrize("name", sorted(EXTENDED.keys() - DOCUMENTED.keys()))
def test_what_is_extended_is_no_documented_input(name: str) -> None:
    assert refusal(**{name: None}).startswith(f"{name} is not an input of the documented interface")


@pytest.mark.parametrize("ratio", SIZES)
def test_a_quarter_of_a_megapixel_has_the_same_ratio(ratio: str) -> None:
    width, height = parse(EXTENDED, aspect_ratio=ratio, megapixels="0.25").size
    assert (2 * width, 2 * height) == parse(EXTENDED, aspect_ratio=ratio).size
    assert width % 16 == height % 16 == 0


@pytest.mark.parametrize(
    ("side", "half"), [(256, 128), (1440, 720), (1000, 496), (1008, 512), (1007, 496), (1009, 512)]
)
def test_custom_sides_are_halved(side: int, half: int) -> None:
    asked = {"aspect_ratio": "custom", "megapixels": "0.25"}
    assert parse(EXTENDED, width=side, height=1024, **asked).size == (half, 512)
    assert parse(EXTENDED, width=1024, height=side, **asked).size == (512, half)


def test_a_mask_needs_an_image() -> None:
    assert refusal(EXTENDED, mask="data:,x") == "mask needs image: give the image that it belongs to too."
    assert parse(EXTENDED, mask="data:,x", image="data:,y").mask == "data:,x"


def test_an_image_decides_the_size() -> None:
    request = parse(EXTENDED, image="data:,x", aspect_ratio="custom", width=300)
    assert request.notes == ("aspect_ratio, width and height are ignored: the image decides the size",)
    assert parse(EXTENDED, image="data:,x", prompt_strength=0.3).notes == ()


def test_what_needs_another_input_is_noted() -> None:
    notes = parse(EXTENDED, prompt_strength=0.5, extra_lora_scale=0.5).notes
    assert notes == (
        "prompt_strength is ignored: there is no image",
        "extra_lora_scale is ignored: there is no extra_lora",
    )
    assert parse(EXTENDED).notes == ()
    assert parse(EXTENDED, model="schnell", num_inference_steps=4).notes == ()
    assert parse(EXTENDED, model="schnell", num_inference_steps=4, guidance_scale=2).notes


def test_two_fine_tunes_are_asked_for() -> None:
    asked = {"replicate_weights": "owner/name", "lora_scale": 3, "extra_lora": "a.safetensors", "extra_lora_scale": -1}
    assert parse(EXTENDED, **asked).adapters == (("owner/name", 3.0), ("a.safetensors", -1.0))
    assert parse(EXTENDED, extra_lora="a.safetensors").adapters == ((None, 1.0), ("a.safetensors", 1.0))
    wider = parse(EXTENDED, extra_lora="a.safetensors").with_more(("b.safetensors", 0.5))
    assert [source for source, _ in wider.adapters] == [None, "a.safetensors", "b.safetensors"]
