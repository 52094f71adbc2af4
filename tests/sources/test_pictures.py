"""The image and mask of a request, fetched: by whom, how much at most, and what stays of them."""

import base64
import hashlib
import io
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux_lora.errors import RequestError, SourceError
from flux_lora.inputs import EXTENDED
from flux_lora.pictures import MAX_BYTES, Pictures
from flux_lora.request import Request
from flux_lora.sources import Sources
from tests.sources.internet import Exchange, Internet, answer, broken, in_turn, redirect

URL = "https://files.example.com/photo.jpg"
OTHER = "https://storage.example.com/mask.png?signature=secret"


def png(width: int = 64, height: int = 32, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(target, "PNG")
    return target.getvalue()


PHOTO, MASK = png(640, 320), png(640, 320, "L")


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def ask(**inputs: Any) -> Request:
    return Request.parse(EXTENDED, prompt="a tomato", **inputs)


def nothing(_: str) -> None:
    pass


def test_addresses_and_data_uris_give_the_same_picture(sources: Sources, internet: Internet) -> None:
    internet.serve(URL, redirect("https://cdn.example.com/photo"))
    internet.serve("https://cdn.example.com/photo", PHOTO)
    internet.serve(OTHER.split("?")[0], MASK)
    pictures = Pictures(sources)
    fetched = pictures.read(ask(image=URL, mask=OTHER, prompt_strength=0.4), nothing)
    inline = pictures.read(ask(image=uri(PHOTO), mask=uri(MASK), prompt_strength=0.4), nothing)
    assert fetched
    assert inline
    assert fetched == inline
    assert fetched.image_digest == hashlib.sha256(PHOTO).hexdigest()
    assert fetched.mask_digest == hashlib.sha256(MASK).hexdigest()
    assert fetched.image_file == PHOTO
    assert fetched.source.strength == 0.4
    assert fetched.source.pixels.tobytes() == Image.open(io.BytesIO(PHOTO)).tobytes()
    assert fetched.source.mask
    expected = np.where(np.asarray(Image.open(io.BytesIO(MASK))) >= 128, 255, 0)
    assert np.array_equal(np.asarray(fetched.source.mask), expected)


def test_base64_may_be_in_lines(sources: Sources) -> None:
    assert sources.read("data:image/png;base64," + base64.encodebytes(PHOTO).decode(), MAX_BYTES) == PHOTO


def test_without_an_image_there_is_none(sources: Sources, internet: Internet) -> None:
    assert Pictures(sources).read(ask(), nothing) is None
    assert internet.asked == []


def test_what_is_scaled_is_said(sources: Sources) -> None:
    lines: list[str] = []
    request = ask(image=uri(png(3000, 2000)), mask=uri(png(30, 20)), prompt_strength=0.4)
    given = Pictures(sources).read(request, lines.append)
    assert given
    assert given.source.pixels.size == (1440, 960)
    assert given.source.mask
    assert given.source.mask.size == (1440, 960)
    assert set(np.unique(np.asarray(given.source.mask))) <= {0, 255}
    assert lines == ["mask: scaled from 30×20 to the image's 3000×2000", "image: scaled from 3000×2000 to 1440×960"]
    smaller = Pictures(sources).read(ask(image=uri(png(3000, 2000)), megapixels="0.25"), nothing)
    assert smaller
    assert smaller.source.pixels.size == (624, 416)


def test_nothing_of_it_stays_on_the_disk(sources: Sources, internet: Internet, tmp_path: Path) -> None:
    internet.serve(URL, PHOTO)
    Pictures(sources).read(ask(image=URL, mask=uri(MASK)), nothing)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 100] == []
    Pictures(sources).read(ask(image=URL), nothing)
    assert len(internet.paths("files.example.com")) == 2


def test_a_broken_connection_is_tried_again(sources: Sources, internet: Internet) -> None:
    internet.serve(URL, in_turn(broken(PHOTO, after=1000), answer(503), answer(200, PHOTO)))
    assert sources.read(URL, MAX_BYTES) == PHOTO
    internet.serve(URL, in_turn(answer(206, PHOTO)))
    with pytest.raises(SourceError, match="unexpected answer 206"):
        sources.read(URL, MAX_BYTES)


def endless(exchange: Exchange) -> None:
    exchange.wire.protocol_version = "HTTP/1.0"
    exchange.wire.send_response(200)
    exchange.wire.end_headers()
    for _ in range(100):
        exchange.wire.wfile.write(b"x" * 1_000_000)


def dripping(exchange: Exchange) -> None:
    exchange.head(200, content_length="9999")
    for _ in range(50):
        time.sleep(0.1)
        exchange.wire.wfile.write(b"x")


def too_long(exchange: Exchange) -> None:
    exchange.head(200, content_length=str(MAX_BYTES + 1))
    exchange.wire.wfile.write(b"x" * 1000)


BAD = {
    "private": ("https://inside.example.com/a.png", None, "leads to an address that is not public"),
    "loopback": ("https://127.0.0.1/a.png", None, "is not the name of a public host"),
    "localhost": ("https://localhost/a.png", None, "is not the name of a public host"),
    "metadata": ("https://169.254.169.254/latest", None, "is not the name of a public host"),
    "redirect to a private host": (URL, redirect("https://inside.example.com/a.png"), "not public"),
    "redirect to http": (URL, redirect("http://files.example.com/a.png"), "only https:// addresses are fetched"),
    "redirect to a file": (URL, redirect("file:///etc/passwd"), "only https:// addresses are fetched"),
    "http": ("http://files.example.com/a.png", None, "only https:// addresses are fetched, and this is http://"),
    "ftp": ("ftp://files.example.com/a.png", None, "only https:// addresses are fetched"),
    "file": ("file:///etc/passwd", None, "only https:// addresses are fetched"),
    "another port": ("https://files.example.com:8443/a.png", None, "port 8443 is refused"),
    "a password": ("https://me:secret@files.example.com/a.png", None, "a user name or password"),
    "nowhere": ("https://files.example.com/none.png", None, "has no such file (404)"),
    "forbidden": (URL, answer(403), "refuses access (403)"),
    "error page": (URL, answer(200, b"<html>", content_type="text/html; charset=utf-8"), "sent a web page"),
    "error page of no type": (URL, answer(200, b"<!doctype html><html>no"), "image is a web page"),
    "too large by its length": (URL, too_long, "larger than the limit of 32,000,000 bytes"),
    "too large": (URL, endless, "larger than the limit of 32,000,000 bytes"),
    "compressed": (URL, answer(200, b"x", content_encoding="gzip"), "compressed"),
    "too slow": (URL, dripping, "does not answer, or too slowly"),
    "a path": ("photo.jpg", None, "it must be a data: URI or an https:// address"),
    "a path on the server": ("/etc/passwd", None, "it must be a data: URI or an https:// address"),
    "a path of the weights": ("lora.safetensors", None, "it must be a data: URI or an https:// address"),
    "empty data": ("data:image/png;base64,", None, "image is empty"),
    "no data": ("data:image/png;base64", None, "it has no comma before its data"),
    "wrong base64": ("data:image/png;base64,iVBOR*w0", None, "its base64 is damaged"),
    "text that is no address": ("hello\x07", None, "it holds characters that cannot be printed"),
    "too large data": ("data:;base64," + "A" * 42_666_672, None, "larger than the limit of 32,000,000 bytes"),
    "data that is text": ("data:text/plain,hello", None, "image is not a picture"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_bad_is_refused_in_words_of_its_own(
    case: str, make_sources: Callable[..., Sources], internet: Internet
) -> None:
    source, route, said = BAD[case]
    internet.names["inside.example.com"] = ["10.0.0.1"]
    if route:
        internet.serve(source, route)
    pictures = Pictures(make_sources(requests={"request_seconds": 1.0}))
    for inputs, name in (({"image": source}, "image"), ({"image": uri(PHOTO), "mask": source}, "mask")):
        with pytest.raises(RequestError) as caught:
            pictures.read(ask(**inputs), nothing)
        message = str(caught.value)
        assert said.replace("image ", f"{name} ") in message
        assert message.startswith(f"{name} ")
        assert message.endswith(".")
        assert "secret" not in message
        assert len(message) < 300
    assert "10.0.0.1" not in internet.connected
    assert "127.0.0.1" not in internet.connected


def test_the_operators_tokens_stay_at_home(make_sources: Callable[..., Sources], internet: Internet) -> None:
    url = internet.serve("https://huggingface.co/owner/name/resolve/main/photo.png", PHOTO)
    Pictures(make_sources()).read(ask(image=url), nothing)
    assert "authorization" not in internet.asked[-1].headers
    Pictures(make_sources(requests={"request_tokens": True})).read(ask(image=url), nothing)
    assert internet.asked[-1].headers["authorization"].startswith("Bearer ")


def test_a_large_file_costs_a_few_times_its_size(sources: Sources) -> None:
    text = "data:;base64," + base64.b64encode(b"x" * 30_000_000).decode()
    request = ask(image=text)
    tracemalloc.start()
    with pytest.raises(RequestError, match="is not a picture"):
        Pictures(sources).read(request, nothing)
    assert tracemalloc.get_traced_memory()[1] < 3 * 30e6
    tracemalloc.stop()
