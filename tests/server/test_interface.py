"""Both interfaces over HTTP: every bound and choice, and what bad input gets."""

import json
from typing import Any

import pytest

from flux_lora.files.record import Parameters
from tests.interfaces import DOORS, Door
from tests.server.conftest import CLIENT, SMALL, Server, content, open_image

SIZES = {
    "1:1": (1024, 1024), "16:9": (1344, 768), "21:9": (1536, 640), "3:2": (1216, 832), "2:3": (832, 1216),
    "4:5": (896, 1088), "5:4": (1088, 896), "3:4": (896, 1152), "4:3": (1152, 896), "9:16": (768, 1344),
    "9:21": (640, 1536),
}  # fmt: skip
FORMATS = {"webp": ("image/webp", "WEBP"), "jpg": ("image/jpeg", "JPEG"), "png": ("image/png", "PNG")}
BOUNDS = [
    (door, name, schema[bound])
    for door in DOORS
    for name, schema in door.inputs.items()
    for bound in ("minimum", "maximum")
    if bound in schema
]
OUTSIDE = [
    (door, name, schema[bound] + (step if schema["type"] == "integer" else step / 1000))
    for door in DOORS
    for name, schema in door.inputs.items()
    for bound, step in (("minimum", -1), ("maximum", 1))
    if bound in schema
]
CHOICES = [
    (name, value)
    for name, schema in DOORS[1].inputs.items()
    for value in schema.get("enum", [True, False] if schema["type"] == "boolean" else [])
    if name not in ("aspect_ratio", "output_format")  # below
]


@pytest.fixture
def at(request: pytest.FixtureRequest) -> Server:
    """The server of a door."""
    served: Server = request.getfixturevalue({"documented": "server", "extended": "extended"}[request.param.name])
    return served


@pytest.mark.parametrize(("at", "door"), zip(DOORS, DOORS, strict=True), indirect=["at"])
def test_the_served_schema_is_that_of_the_door(at: Server, door: Door) -> None:
    """Also while the other door of the same project is served."""
    document = CLIENT.get(f"{at.url}/openapi.json").json()
    assert document == json.loads(door.openapi.read_text())


@pytest.mark.parametrize(("at", "name", "value"), BOUNDS, indirect=["at"])
def test_both_bounds_are_drawn(at: Server, name: str, value: float) -> None:
    inputs = {"prompt": "a tomato", "seed": 7, **SMALL, "num_inference_steps": 1, name: value}
    images = [open_image(data) for data in at.draw(**inputs)]
    assert len(images) == inputs.get("num_outputs", 1)
    assert {image.size for image in images} == {(inputs["width"], inputs["height"])}


@pytest.mark.parametrize(("at", "name", "value"), OUTSIDE, indirect=["at"])
def test_beyond_a_bound_is_refused_by_name(at: Server, name: str, value: float) -> None:
    refused(at, {"prompt": "a tomato", name: value}, name)


@pytest.mark.parametrize(("name", "value"), CHOICES)
def test_every_other_choice_is_drawn(extended: Server, name: str, value: object) -> None:
    answer = extended.predict(prompt="a tomato", seed=7, **SMALL, **{name: value})
    assert answer["status"] == "succeeded"


@pytest.mark.parametrize("ratio", SIZES)
def test_every_aspect_ratio_has_exactly_its_size(server: Server, ratio: str) -> None:
    (data,) = server.draw(prompt="a tomato", aspect_ratio=ratio, num_inference_steps=1, output_format="jpg")
    assert open_image(data).size == SIZES[ratio]


@pytest.mark.parametrize(
    ("asked", "drawn"), [((1000, 263), (1008, 256)), ((1433, 1440), (1440, 1440)), ((264, 300), (272, 304))]
)
def test_custom_sizes_are_the_nearest_multiple_of_16(
    server: Server, asked: tuple[int, int], drawn: tuple[int, int]
) -> None:
    inputs = {"aspect_ratio": "custom", "width": asked[0], "height": asked[1], "num_inference_steps": 1}
    assert open_image(server.draw(prompt="a tomato", **inputs)[0]).size == drawn


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_every_format_of_every_model(server: Server, name: str, model: str) -> None:
    answer = server.predict(prompt="a tomato", model=model, output_format=name, **SMALL)
    (uri,) = answer["output"]
    mime, kind = FORMATS[name]
    assert uri.startswith(f"data:{mime};base64,")
    assert open_image(content(uri)).format == kind


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", None), ("prompt", 5), ("prompt", ["a"]), ("aspect_ratio", "1:2"), ("model", "pro"),
        ("output_format", "gif"), ("seed", "seven"), ("seed", 7.5), ("seed", None), ("num_outputs", "2"),
        ("num_outputs", 1.5), ("lora_scale", "strong"), ("disable_safety_checker", "no"), ("replicate_weights", 3),
    ],
)  # fmt: skip
def test_wrong_types_and_choices_are_refused_by_name(server: Server, name: str, value: object) -> None:
    refused(server, {"prompt": "a tomato", name: value}, name)


def test_a_missing_prompt_is_refused_by_name(server: Server) -> None:
    refused(server, {"seed": 7}, "prompt")


def refused(server: Server, inputs: dict[str, object], name: str) -> None:
    response = server.post(json.dumps({"input": inputs}))
    assert response.status_code == 422, response.text
    assert any(name in problem["loc"] for problem in response.json()["detail"])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_numbers_that_are_none_are_refused(server: Server, number: str) -> None:
    """By Cog, as JSON that is none: it names the place in the text, and the field only where the JSON could be read."""
    body = f'{{"input": {{"prompt": "a tomato", "guidance_scale": {number}}}}}'
    response = server.post(body)
    assert response.status_code in (400, 422)
    assert "guidance_scale" in response.text or "line 1" in response.text


def test_a_lone_surrogate_is_refused(server: Server) -> None:
    body = r'{"input": {"prompt": "a \ud800 tomato"}}'
    response = server.post(body)
    assert response.status_code in (400, 422)


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"prompt": "a \0 tomato"}, ["prompt", "\\x00"]),
        ({"prompt": "a", "aspect_ratio": "custom"}, ["width and height"]),
        ({"prompt": "a", "aspect_ratio": "custom", "width": 512}, ["height"]),
        ({"prompt": "a", "aspect_ratio": "custom", "height": 512}, ["width"]),
    ],
)
def test_what_only_the_model_can_refuse_fails_by_name(
    server: Server, inputs: dict[str, object], named: list[str]
) -> None:
    answer = server.predict(**inputs)
    assert answer["status"] == "failed"
    assert all(word in answer["error"] for word in named)
    assert "Traceback" not in answer["error"]


@pytest.mark.parametrize(("seed", "drawn"), [(7, 7), (7.0, 7), (0, 0), (10**23, int(1e23) % 2**63), (2**63 + 5, 5)])
def test_a_seed_is_what_log_metric_and_file_say(server: Server, tmp_path: Any, seed: float, drawn: int) -> None:
    answer = server.predict(prompt="a tomato", seed=seed, **SMALL)
    assert answer["metrics"]["seed"] == drawn
    assert f"seed: {drawn}\n" in answer["logs"]
    assert parameters_of(content(answer["output"][0]), tmp_path).seed == drawn


@pytest.mark.parametrize("given", [{}, {"seed": -1}])
def test_no_seed_is_a_random_one_below_two_to_32(server: Server, given: dict[str, int]) -> None:
    seeds = {server.predict(prompt="a", **given, **SMALL)["metrics"]["seed"] for _ in range(2)}
    assert len(seeds) == 2
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_prompt_of_100000_characters_is_drawn_and_the_cut_is_logged(server: Server, tmp_path: Any) -> None:
    prompt = "a tomato on blue " * 5883
    answer = server.predict(prompt=prompt[:100_000], seed=7, output_format="jpg", **SMALL)
    assert answer["status"] == "succeeded"
    assert "T5 reads 512 tokens; cut off are the prompt's last 9" in answer["logs"]
    assert parameters_of(content(answer["output"][0]), tmp_path).prompt == prompt[:100_000]


def test_the_metrics_are_complete(server: Server) -> None:
    metrics = server.predict(prompt="a tomato", seed=7, num_outputs=2, **SMALL)["metrics"]
    assert metrics["images"] == 2
    assert metrics["megapixels"] == pytest.approx(2 * 256 * 256 / 1e6)
    assert metrics["withheld_seeds"] == []
    for stage in ("adapter", "text", "denoise", "decode", "safety", "save"):
        assert metrics[f"{stage}_seconds"] >= 0
    assert metrics["denoise_seconds"] > 0


def parameters_of(data: bytes, folder: Any) -> Parameters:
    from flux_lora.files import provenance

    path = folder / "picture"
    path.write_bytes(data)
    return provenance.read(path)
