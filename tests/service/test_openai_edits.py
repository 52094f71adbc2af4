"""OpenAI's image edits, asked by its own client, with a real generator behind."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image, ImageDraw

from flux_lora.inputs import EXTENDED
from flux_lora.request import Request
from tests.service.local import LocalReplica, local_front, serving

FEW = {"seed": 7, "steps": 4}


@pytest.fixture(scope="module")
def client(replica: LocalReplica) -> Iterator[openai.OpenAI]:
    with serving(local_front([replica], interface=EXTENDED)) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (256, 256), "white")
    ImageDraw.Draw(image).ellipse((60, 60, 200, 200), fill="tomato")
    return image


def holed() -> Image.Image:
    """White where it stays and transparent on the left half: as a mask of ours all of it would be drawn anew."""
    image = picture("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 128, 256))
    return image


def left() -> Image.Image:
    mask = Image.new("L", (256, 256))
    mask.paste(255, (0, 0, 128, 256))
    return mask


def data(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def drawn(replica: LocalReplica, **inputs: Any) -> bytes:
    request = Request.parse(EXTENDED, prompt="a tomato", seed=7, num_inference_steps=4, output_format="png", **inputs)
    (path,) = replica.studio.generator.draw(request)
    return path.read_bytes()


def content(answer: Any) -> bytes:
    return base64.b64decode(answer.data[0].b64_json)


def pixels(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).convert("RGB").tobytes()


def test_an_edit_is_what_the_generator_draws(client: openai.OpenAI, replica: LocalReplica) -> None:
    image = png(picture())
    answer = client.images.edit(image=image, prompt="a tomato", extra_body=FEW | {"strength": 0.5})
    assert content(answer) == drawn(replica, image=data(image), prompt_strength=0.5)
    assert answer.size == "256x256"


def test_what_is_transparent_in_the_mask_is_drawn_anew(client: openai.OpenAI, replica: LocalReplica) -> None:
    image = png(picture())
    expected = drawn(replica, image=data(image), mask=data(png(left())))
    answer = client.images.edit(image=image, mask=png(holed()), prompt="a tomato", extra_body=FEW)
    assert pixels(content(answer)) == pixels(expected)
    kept = Image.open(io.BytesIO(content(answer))).convert("RGB").crop((128, 0, 256, 256))
    assert kept.tobytes() == picture().crop((128, 0, 256, 256)).tobytes()
    answer = client.images.edit(image=image, mask=png(left()), prompt="a tomato", extra_body=FEW)
    assert pixels(content(answer)) == pixels(expected)


def test_an_image_may_be_its_own_mask(client: openai.OpenAI) -> None:
    answer = client.images.edit(image=[png(holed())], prompt="a tomato", extra_body=FEW)
    kept = Image.open(io.BytesIO(content(answer))).convert("RGB").crop((128, 0, 256, 256))
    assert kept.tobytes() == picture().crop((128, 0, 256, 256)).tobytes()


def test_an_edit_streams(client: openai.OpenAI) -> None:
    stream = client.images.edit(
        image=png(picture().resize((512, 768))), prompt="a tomato", stream=True, partial_images=2,
        extra_body={"seed": 7, "steps": 40},
    )  # fmt: skip
    *partial, last = list(stream)
    assert {event.type for event in partial} == {"image_edit.partial_image"}
    assert partial[0].size == "64x96"
    assert (last.type, last.size) == ("image_edit.completed", "512x768")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"image": b"%PDF-1.7"}, "image", "is a PDF"),
        ({"image": [b"a", b"b"]}, "image", "image must be one file, not 2"),
        ({"n": 9}, "n", "n must be a whole number from 1 to 4, not 9"),
        ({"extra_body": {"strength": 2}}, "strength", "strength must be a number from 0 to 1"),
        ({"extra_body": {"sead": 7}}, "sead", "sead is not a field"),
    ],
)
def test_a_bad_edit_is_refused(client: openai.OpenAI, fields: dict[str, Any], param: str | None, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(**{"image": png(picture()), "prompt": "a tomato"} | fields)
    assert said in refused.value.message
    assert refused.value.param == param


def test_without_the_extended_interface_there_are_no_edits(address: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="--extended"):
        client.images.edit(image=png(picture()), prompt="a tomato")


def test_the_document_has_the_interface_that_is_served(client: openai.OpenAI, address: str) -> None:
    for url, has in ((str(client.base_url).removesuffix("/v1/"), True), (address, False)):
        inputs = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]["Input"]["properties"]
        assert ("image" in inputs) == has
