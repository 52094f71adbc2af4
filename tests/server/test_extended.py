"""The extended interface over HTTP: files as clients send them, and what bad ones get."""

import base64
import http.server
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux_lora.commands import draw
from flux_lora.files import provenance
from tests.conftest import MINI
from tests.server.conftest import CLIENT, SMALL, Server, content, open_image
from tests.server.test_documented import ADDRESS, EXAMPLES

WITNESS = {"prompt": "a witness", "seed": 7, **SMALL}
FEW = {"prompt": "a tomato", "seed": 7, "num_inference_steps": 2, "output_format": "png"}


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


PHOTO = Image.linear_gradient("L").resize((320, 256)).convert("RGB")
LEFT = Image.new("L", (320, 256), 255)
LEFT.paste(0, (0, 0, 160, 256))


def test_an_image_decides_the_size_and_the_picture(extended: Server) -> None:
    answer = extended.predict(**FEW, image=uri(file(PHOTO)), prompt_strength=0.5, aspect_ratio="16:9")
    assert answer["status"] == "succeeded"
    picture = open_image(content(answer["output"][0]))
    assert picture.size == (320, 256)
    assert "aspect_ratio, width and height are ignored: the image decides the size" in answer["logs"]
    other = open_image(extended.draw(**FEW, image=uri(file(PHOTO.rotate(180))), prompt_strength=0.5)[0])
    assert picture.tobytes() != other.tobytes()


@pytest.mark.parametrize("kind", ["application/octet-stream", "image/jpeg"])
def test_what_a_client_calls_the_file_does_not_count(extended: Server, kind: str) -> None:
    drawn = [extended.draw(**FEW, image=uri(file(PHOTO), name)) for name in ("image/png", kind)]
    assert drawn[0] == drawn[1]


def test_what_is_black_stays_to_the_bit(extended: Server) -> None:
    inputs = {**FEW, "image": uri(file(PHOTO)), "mask": uri(file(LEFT))}
    picture = np.asarray(open_image(extended.draw(**inputs)[0]))
    original = np.asarray(PHOTO)
    assert np.array_equal(picture[:, :160], original[:, :160])
    assert not np.array_equal(picture[:, 160:], original[:, 160:])
    black = {**inputs, "mask": uri(file(Image.new("1", (10, 8))))}
    assert np.array_equal(np.asarray(open_image(extended.draw(**black)[0])), original)


def test_text_to_image_is_that_of_the_other_door_after_any_mix(extended: Server, server: Server) -> None:
    inputs = {**WITNESS, "guidance_scale": 3, "num_inference_steps": 6}
    expected = server.draw(**inputs)
    assert extended.draw(**inputs) == expected
    extended.draw(**FEW, image=uri(file(PHOTO)), mask=uri(file(LEFT)))
    extended.predict(**FEW, image=uri(b"%PDF-1.4"))
    extended.draw(**FEW, image=uri(file(PHOTO)), go_fast=True, lora_scale=3, megapixels="0.25")
    assert extended.draw(**inputs) == expected


def test_two_loras_at_once(extended: Server) -> None:
    second = {"extra_lora": uri((MINI / "lora.safetensors").read_bytes(), "application/octet-stream")}
    one = extended.draw(**WITNESS)
    two = extended.draw(**WITNESS, **second)
    assert two != one
    assert extended.draw(**WITNESS, **second, extra_lora_scale=0) == one
    png = WITNESS | {"output_format": "png"}
    half = extended.draw(**png, **second, lora_scale=0.5, extra_lora_scale=0.5)
    pixels = [np.asarray(open_image(files[0])).astype(int) for files in (half, extended.draw(**png))]
    assert np.abs(pixels[0] - pixels[1]).max() <= 2  # the same sum, rounded twice


def test_draw_sends_files(extended: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photo.jpg").write_bytes(file(PHOTO, "JPEG"))
    (tmp_path / "mask.png").write_bytes(file(LEFT))
    files = [f"{name}=@{tmp_path / path}" for name, path in (("image", "photo.jpg"), ("mask", "mask.png"))]
    asked = [word for text in (*files, "prompt=a pear", "seed=7", "num_inference_steps=2") for word in ("-i", text)]
    assert draw.main([extended.url, *asked, "-o", str(tmp_path)]) == 0
    picture = Path(capsys.readouterr().out.strip())
    assert Image.open(picture).size == (320, 256)
    source = provenance.read(picture).source
    assert source
    assert source.mask
    assert draw.main([extended.url, "-i", "prompt=a", "-i", f"image=@{tmp_path}/none.png"]) == 1
    assert "image: " in capsys.readouterr().err


def test_replicates_client_sends_files(extended: Server, tmp_path: Path) -> None:
    """With the program that docs/inputs.md shows."""
    (tmp_path / "photo.png").write_bytes(file(PHOTO))
    given = '"num_inference_steps": 1, "image": open("photo.png", "rb")'
    code = EXAMPLES[1].replace(ADDRESS, extended.url).replace('"seed": 7', given)
    code = code.replace('"owner/name", input', '"owner/name", file_encoding_strategy="base64", input')
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert Image.open(tmp_path / "tomato-0.webp").size == PHOTO.size


def test_cog_takes_no_multipart(extended: Server) -> None:
    response = CLIENT.post(f"{extended.url}/predictions", data={"prompt": "a"}, files={"image": file(PHOTO)})
    assert response.status_code == 415


class Pictures(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(file(PHOTO))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def inside() -> Iterator[str]:
    """A server that only this machine may reach; with what it was asked for, in ``Pictures.asked``."""
    Pictures.asked = []
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
    yield f"127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize("name", ["image", "mask"])
def test_an_address_inside_is_not_asked(extended: Server, inside: str, name: str) -> None:
    """Neither by us nor by Cog, which fetches what it takes for a file before the model sees it."""
    for address in (f"http://{inside}/a.png", f"https://{inside}/a.png", f"http://localhost:{inside[10:]}/a.png"):
        answer = extended.predict(**FEW, **{"image": uri(file(PHOTO)), name: address})
        assert answer["status"] == "failed"
        assert f"{name} cannot be read: " in answer["error"]
    assert Pictures.asked == []


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"mask": uri(file(LEFT))}, "mask needs image"),
        ({"image": uri(b"%PDF-1.4")}, "image is a PDF"),
        ({"image": uri(b"<svg/>", "image/svg+xml")}, "image is an SVG"),
        ({"image": uri(file(PHOTO, "JPEG")[:-300])}, "image is a damaged JPEG file"),
        ({"image": uri(file(Image.new("1", (10_000, 10_000))))}, "image has too many pixels (10000×10000)"),
        ({"image": uri(file(Image.new("1", (2000, 300))))}, "longer than 5.6 to 1"),
        ({"image": "data:,"}, "image is empty"),
        ({"image": "data:;base64,*"}, "image cannot be read: its base64 is damaged"),
        ({"image": "weights/mini/lora.safetensors"}, "image cannot be read: it must be a data: URI"),
        ({"image": uri(file(PHOTO)), "mask": uri(b"hello")}, "mask is not a picture"),
        ({"image": uri(b"x" * 33_000_000)}, "image cannot be read: it is larger than the limit of 32,000,000 bytes"),
    ],
)
def test_a_bad_file_fails_its_own_prediction(extended: Server, inputs: dict[str, str], said: str) -> None:
    answer = extended.predict(**FEW, **inputs)
    assert answer["status"] == "failed"
    assert said in answer["error"]
    assert "Traceback" not in answer["error"]
    assert extended.leftovers() == []


def test_nothing_of_a_callers_picture_stays(extended: Server) -> None:
    extended.draw(**FEW, image=uri(file(PHOTO)))
    kept = [path for path in (extended.folder / "cache").rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 1000 or path.suffix == ".safetensors" for path in kept)
