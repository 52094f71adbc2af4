"""OpenAI's images API, asked by its own client, with a real generator behind."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from flux_lora.inputs import DOCUMENTED
from flux_lora.request import Request
from flux_lora.service.openai_inputs import ImageRequest, read
from flux_lora.settings import Settings
from tests.conftest import MINI, ROOT
from tests.server.conftest import SMALL, wait_for
from tests.service.local import LocalReplica, local_front, serving

KEY = "a-key-of-sixteen-letters"
FEW = {"seed": 7, "steps": 2}
LONG: dict[str, Any] = {"prompt": "a long one", "n": 4, "size": "1536x640", "extra_body": {"seed": 1, "steps": 50}}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's weights directory, with LoRAs that requests may ask for."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("dev", "schnell"):
        (folder / name).symlink_to(MINI / name)
    shutil.copy(MINI / "lora.safetensors", folder / "lora.safetensors")
    (folder / "loras" / "people").mkdir(parents=True)
    for name in ("ink", "people/anna"):
        shutil.copy(MINI / "lora.safetensors", folder / "loras" / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def client(library: Path, replica: LocalReplica) -> Iterator[openai.OpenAI]:
    with serving(replace(local_front([replica]), weights=library), keys=(KEY,)) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def drawn(replica: LocalReplica, **inputs: Any) -> list[bytes]:
    """What the generator draws when nothing is before it."""
    request = Request.parse(prompt="a tomato", **{"output_format": "png", **inputs})
    return [path.read_bytes() for path in replica.studio.generator.draw(request)]


def contents(response: Any) -> list[bytes]:
    return [base64.b64decode(picture.b64_json) for picture in response.data]


def test_pictures_are_what_the_generator_draws(client: openai.OpenAI, replica: LocalReplica) -> None:
    response = client.images.generate(model="dev", prompt="a tomato", n=2, size="256x256", extra_body=FEW)
    expected = drawn(replica, seed=7, num_outputs=2, **SMALL)
    assert contents(response) == expected
    assert response.size == "256x256"
    assert response.output_format == "png"
    assert [picture.seed for picture in response.data] == [7, 8]  # type: ignore[union-attr]


def test_our_own_fields_come_from_extra_body(client: openai.OpenAI, replica: LocalReplica) -> None:
    ours = FEW | {"guidance": 2.5, "lora": "lora.safetensors", "lora_scale": 0.5}
    response = client.images.generate(
        model="dev", prompt="a tomato", size="256x256", output_format="jpeg", output_compression=60, extra_body=ours
    )
    expected = drawn(
        replica, seed=7, guidance_scale=2.5, replicate_weights="lora.safetensors", lora_scale=0.5, output_format="jpg",
        output_quality=60, **SMALL
    )  # fmt: skip
    assert contents(response) == expected
    assert response.output_format == "jpeg"


def test_addresses_need_the_key(client: openai.OpenAI, replica: LocalReplica) -> None:
    response = client.images.generate(
        prompt="a tomato", size="256x256", response_format="url", output_format="webp", extra_body=FEW
    )
    url = response.data[0].url  # type: ignore[index]
    assert url
    assert httpx.get(url).status_code == 401
    found = httpx.get(url, headers={"Authorization": f"Bearer {KEY}"})
    assert found.content == drawn(replica, seed=7, output_format="webp", output_quality=100, **SMALL)[0]


def test_what_has_no_effect_is_said(client: openai.OpenAI) -> None:
    answer = client.images.with_raw_response.generate(
        prompt="a tomato", size="1536x1024", background="transparent", style="vivid", user="anna", model="schnell",
        extra_body={"steps": 1, "seed": 7},
    )  # fmt: skip
    said = answer.headers["x-flux-notes"]
    assert "background is ignored" in said
    assert "style is ignored" in said
    assert "size 1536x1024 is drawn as 1216x832" in said
    assert "anna" not in said
    picture = Image.open(io.BytesIO(contents(answer.parse())[0]))
    assert picture.size == (1216, 832)


def test_models_are_listed_and_drawn_with(client: openai.OpenAI, library: Path) -> None:
    assert [model.id for model in client.models.list()] == ["dev", "schnell", "ink", "people/anna"]
    assert client.models.retrieve("people/anna").owned_by == "operator"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-2")
    # It is listed from now on, and the replica, whose weights directory is another, has none of that name.
    (library / "loras" / "new.safetensors").write_bytes(b"no LoRA")
    with pytest.raises(openai.BadRequestError, match="new.safetensors") as failed:
        client.images.generate(model="new", prompt="a tomato", size="256x256", extra_body=FEW)
    assert (failed.value.param, failed.value.code) == ("lora", "lora_not_usable")


@pytest.mark.parametrize("name", ["ink", "loras/ink.safetensors"])
def test_a_lora_is_a_model(name: str, library: Path) -> None:
    body = ImageRequest(prompt="a tomato", model=name)
    request = read(body, ("dev", "schnell"), library, DOCUMENTED).request
    assert (request.model, request.replicate_weights) == ("dev", "loras/ink.safetensors")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"n": 5}, "n", "n must be a whole number from 1 to 4, not 5"),
        ({"n": "many"}, "n", "n: input should be a valid integer"),
        ({"size": "huge"}, "size", "size must be auto, WIDTHxHEIGHT"),
        ({"size": "4096x4096"}, "size", "sides of 256 to 1440"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg'"),
        ({"output_compression": 101}, "output_compression", "from 0 to 100, not 101"),
        ({"extra_body": {"steps": 0}}, "steps", "steps must be a whole number from 1 to 50"),
        ({"extra_body": {"guidance": 11}}, "guidance", "guidance must be a number from 0 to 10"),
        ({"extra_body": {"lora_scale": 9}}, "lora_scale", "lora_scale must be"),
        ({"extra_body": {"sead": 7}}, "sead", "sead is not a field of this API; its fields are"),
        ({"extra_body": {"lora": "a.safetensors"}, "model": "ink"}, "lora", "lora and model both name a LoRA"),
        ({"stream": True, "response_format": "url"}, "response_format", "b64_json for a stream"),
        ({"partial_images": 9}, "partial_images", "less than or equal to 3"),
        ({"prompt": "bad \0 text"}, "prompt", "not valid text"),
    ],
)
def test_a_bad_field_is_refused_by_its_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**{"prompt": "a tomato"} | fields)
    assert said in refused.value.message
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_errors_have_openai_s_form_everywhere(client: openai.OpenAI) -> None:
    url, headers = str(client.base_url), {"Authorization": f"Bearer {KEY}"}
    answers = [
        httpx.post(f"{url}images/generations", content=b"{", headers=headers),
        httpx.post(f"{url}images/generations", json=[1], headers=headers),
        httpx.post(f"{url}images/generations", json={}, headers=headers),
        httpx.post(f"{url}images/variations", headers=headers),
        httpx.get(f"{url}images/generations", headers=headers),
        httpx.get(f"{url}models/none", headers=headers),
        httpx.get(f"{url}models"),
        httpx.post(f"{url}images/generations", json={"prompt": "a", "model": "dall-e-3"}, headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [400, 400, 400, 404, 404, 404, 401, 404]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError, match="There are dev, schnell, ink"):
        client.images.generate(prompt="a", model="gpt-image-2")


def begun(state: str) -> bool:
    return httpx.get(state).json()["started_at"] is not None


def test_a_full_queue_is_503_and_a_full_share_429(replica: LocalReplica) -> None:
    """The replica is busy, one waits; the second of the same key is too many for it, and then for all."""
    for limit, share, error, code in (
        (1, 16, openai.InternalServerError, "server_overloaded"),
        (64, 1, openai.RateLimitError, "rate_limit_exceeded"),
    ):
        with serving(local_front([replica], limit=limit, limit_per_owner=share)) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            body = {"input": {"prompt": "a long one", "num_inference_steps": 50, "num_outputs": 4}}
            asked = {"Prefer": "respond-async"}
            running, waiting = (httpx.post(f"{address}/predictions", json=body, headers=asked).json() for _ in "ab")
            state = f"{address}/predictions/{running['id']}"
            wait_for(partial(begun, state))
            with pytest.raises(error) as refused:
                client.images.generate(prompt="a tomato", extra_body=FEW)
            assert refused.value.code == code
            assert int(refused.value.response.headers["retry-after"]) >= 1
            for prediction in (waiting, running):
                httpx.post(f"{address}/predictions/{prediction['id']}/cancel")


def test_withheld_and_late_pictures_are_errors_that_are_not_tried_again() -> None:
    strict = LocalReplica("strict", Settings(weights=MINI, safety_threshold=0))
    with serving(local_front([strict])) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        with pytest.raises(openai.BadRequestError, match="withheld every image") as refused:
            client.images.generate(prompt="a tomato", size="256x256", extra_body=FEW)
        assert refused.value.code == "moderation_blocked"
        stream = client.images.generate(prompt="a tomato", size="256x256", stream=True, extra_body=FEW)
        with pytest.raises(openai.APIError, match="withheld every image"):
            list(stream)
    with serving(local_front([strict], deadline=0.3)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        before = len(strict.drawn)
        with pytest.raises(openai.InternalServerError, match="deadline") as late:
            client.images.generate(**LONG)
        assert late.value.status_code == 504
        assert len(strict.drawn) == before + 1
    strict.studio.close()


def test_a_stream_has_previews_and_ends_with_the_picture(client: openai.OpenAI, replica: LocalReplica) -> None:
    stream = client.images.generate(
        prompt="a tomato", stream=True, partial_images=2, extra_body={"seed": 7, "steps": 12}
    )
    *previews, last = list(stream)
    assert {event.type for event in previews} == {"image_generation.partial_image"}
    assert [event.partial_image_index for event in previews] == list(range(len(previews)))  # type: ignore[union-attr]
    assert 1 <= len(previews) <= 2
    assert last.type == "image_generation.completed"
    assert base64.b64decode(last.b64_json) == drawn(replica, seed=7, num_inference_steps=12)[0]
    assert last.usage.total_tokens == 0
    final = Image.open(io.BytesIO(base64.b64decode(last.b64_json)))
    for event in previews:
        preview = Image.open(io.BytesIO(base64.b64decode(event.b64_json)))
        assert (preview.format, f"{preview.width}x{preview.height}") == ("PNG", event.size)
        assert preview.size == (128, 128)
    assert distance(preview, final) < 0.1


def distance(picture: Image.Image, other: Image.Image) -> float:
    """Mean difference of two pictures, 0 to 1, at the size of the first."""
    values = [list(image.convert("RGB").resize(picture.size).tobytes()) for image in (picture, other)]
    difference: float = sum(abs(a - b) for a, b in zip(*values, strict=True)) / 255 / len(values[0])
    return difference


def test_a_client_that_leaves_ends_the_drawing(client: openai.OpenAI) -> None:
    listed = f"{client.base_url}predictions"

    def states() -> list[str]:
        headers = {"Authorization": f"Bearer {KEY}"}
        return [p["status"] for p in httpx.get(listed, headers=headers).json()["results"]]

    with pytest.raises(openai.APITimeoutError):
        client.images.generate(**LONG, timeout=0.5)
    wait_for(lambda: states()[0] == "canceled", 10)
    stream = client.images.generate(**LONG, stream=True, partial_images=3)
    next(iter(stream))
    stream.close()
    wait_for(lambda: states()[:2] == ["canceled", "canceled"], 10)


def test_all_of_it_is_documented(client: openai.OpenAI) -> None:
    document = httpx.get(str(client.base_url).replace("/v1/", "/openapi.json")).json()
    assert {"/v1/images/generations", "/v1/models"} <= set(document["paths"])
    fields = document["components"]["schemas"]["ImageRequest"]["properties"]
    assert {"prompt", "model", "n", "size", "seed", "lora_scale"} <= set(fields)


def test_the_documents_examples_draw(client: openai.OpenAI, replica: LocalReplica) -> None:
    text = (ROOT / "docs" / "service.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"(curl -s \S+/v1/images/.*?)```", text, re.DOTALL)
    here = str(client.base_url).removesuffix("/v1/")
    code, command = (part.replace("http://127.0.0.1:8000", here).replace("KEY", KEY) for part in (code, command))
    found: dict[str, Any] = {}
    exec(code.replace('"seed": 7', '"seed": 7, "steps": 1').replace("1024x1024", "256x256"), found)  # noqa: S102 - ours
    expected = drawn(
        replica, seed=7, replicate_weights="lora.safetensors", lora_scale=0.8, **SMALL | {"num_inference_steps": 1}
    )
    assert base64.b64decode(found["picture"]) == expected[0]
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    (picture,) = json.loads(done.stdout)["data"]
    assert Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))).format == "WEBP"
