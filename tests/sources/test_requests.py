"""``replicate_weights`` from the internet to the picture; a failed source fails its own request only."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from flux_lora.adapters import Adapters
from flux_lora.assembly import assemble
from flux_lora.errors import AdapterError
from flux_lora.generator import Generator
from flux_lora.lora.library import AdapterLibrary
from flux_lora.request import Request
from flux_lora.settings import Settings
from tests.conftest import MINI
from tests.sources.internet import Internet, file

WITNESS = {
    "prompt": "a witness", "seed": 7, "aspect_ratio": "custom", "width": 256, "height": 256,
    "num_inference_steps": 2, "disable_safety_checker": True,
}  # fmt: skip
ADDRESS = "https://example.com/lora.safetensors"
URL = f"{ADDRESS}?token=do-not-log"


@pytest.fixture
def generator(make_sources: Any) -> Generator:
    parts = assemble(Settings(weights=MINI), log=lambda _: None).parts
    shapes = {"transformer": parts.transformers["dev"].shapes, **{n: m.shapes for n, m in parts.encoders.items()}}
    adapters = Adapters(make_sources(max_bytes=10_000_000), AdapterLibrary(shapes, 10**9), MINI)
    adapters.load_fine_tune(None, parts.log)
    return Generator(replace(parts, adapters=adapters))


def draw(generator: Generator, **inputs: Any) -> bytes:
    (path,) = generator.draw(Request.parse(**WITNESS | inputs), lambda *_: None)
    return path.read_bytes()


def test_an_address_is_the_file_behind_it(generator: Generator, internet: Internet) -> None:
    content = (MINI / "lora.safetensors").read_bytes()
    internet.serve(ADDRESS, file(content, '"1"'))
    assert draw(generator, replicate_weights=URL) == draw(generator)


@pytest.mark.parametrize(
    "content", [b"<html>please log in</html>", (MINI / "lora.safetensors").read_bytes()[:-9], b"PK\3\4" + bytes(99)]
)
def test_what_is_no_lora_fails_its_own_request_and_names_its_source(
    generator: Generator, internet: Internet, content: bytes
) -> None:
    before = draw(generator)
    internet.serve(ADDRESS, file(content, '"1"'))
    with pytest.raises(AdapterError, match=r"example\.com/lora\.safetensors") as raised:
        draw(generator, replicate_weights=URL)
    assert not any(word in str(raised.value) for word in ("do-not-log", "404"))
    assert draw(generator) == before


def test_a_lora_of_another_model_names_its_source_and_not_the_cache(generator: Generator, internet: Internet) -> None:
    content = save({"transformer_blocks.0.img_mlp.net.2.lora_A.weight": np.zeros((4, 8), np.float32)})
    internet.serve(ADDRESS, file(content, '"1"'))
    with pytest.raises(AdapterError, match=r"example\.com/lora\.safetensors.*Qwen-Image") as raised:
        draw(generator, replicate_weights=URL)
    assert "cache" not in str(raised.value)
