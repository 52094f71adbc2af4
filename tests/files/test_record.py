"""The record by itself: its versions, its LoRAs, its long prompts."""

import json
import zlib
from base64 import b64encode
from pathlib import Path

import pytest

from flux_lora.errors import OutputError
from flux_lora.files import provenance
from flux_lora.files.record import Lora, Parameters, Software, Source
from tests.files.pictures import ENVIRONMENT, PARAMETERS, PROMPTS, SOFTWARE

FIXTURES = Path(__file__).parent / "fixtures"


def test_environments_say_how_they_differ() -> None:
    other = ENVIRONMENT.model_copy(
        update={"device": "NVIDIA H200", "software": SOFTWARE.model_copy(update={"torch": "2.12.1"})}
    )
    assert ENVIRONMENT.differences(other) == ["device cpu, not NVIDIA H200", "torch 2.13.0, not 2.12.1"]
    assert ENVIRONMENT.differences(ENVIRONMENT) == []
    faster = ENVIRONMENT.model_copy(update={"profile": "fast", "attention": "_native_cudnn"})
    assert ENVIRONMENT.differences(faster) == ["profile eager, not fast", "attention native, not _native_cudnn"]


def test_a_record_from_before_there_were_profiles_is_one_of_eager() -> None:
    record = json.loads(PARAMETERS.to_json())
    del record["environment"]["profile"], record["environment"]["attention"]
    assert Parameters.from_json(json.dumps(record)).environment == ENVIRONMENT


def test_installed_versions_are_the_imported_ones() -> None:
    import diffusers
    import PIL
    import torch
    import transformers

    installed = Software.installed()
    assert installed.torch.split("+")[0] == torch.__version__.split("+")[0]
    assert (installed.diffusers, installed.transformers) == (diffusers.__version__, transformers.__version__)
    assert installed.pillow == PIL.__version__


@pytest.mark.parametrize("name", ["version-1.webp", "version-1.jpg"])
def test_pictures_of_version_1_are_read(name: str) -> None:
    """Drawn with the miniature at 65e6f1c, before there could be several LoRAs."""
    read = provenance.read(FIXTURES / name)
    digest = "a8b16ec6b59bc33b79644c0ac28ea506c2d7959fabf5c3ab404964d2e3ea69ad"
    assert (read.record, read.loras, read.source, read.reused_steps) == (
        3,
        (Lora(digest=digest, scale=0.7),),
        None,
        None,
    )
    assert read.prompt == "a tomato, it's <red> & round"
    assert (read.seed, read.model, read.width, read.output_quality) == (7, "schnell", 256, 40)


def test_version_2_is_read() -> None:
    fields = json.loads(PARAMETERS.to_json())
    del fields["source"], fields["go_fast"], fields["reused_steps"]
    assert Parameters.from_json(json.dumps(fields | {"record": 2})) == PARAMETERS


@pytest.mark.parametrize("mask", [None, "b2" * 32])
def test_what_a_picture_was_drawn_from_comes_back(mask: str | None) -> None:
    source = Source(image="a1" * 32, mask=mask, prompt_strength=0.65, megapixels="0.25")
    drawn = PARAMETERS.model_copy(update={"source": source, "go_fast": True, "reused_steps": 11})
    assert Parameters.from_json(drawn.to_json()) == drawn


@pytest.mark.parametrize("digest", ["../../elsewhere", "A1" * 32, ""])
@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_digest_of_a_source_is_64_hexadecimal_digits(digest: str, name: str) -> None:
    source = {"image": "a1" * 32, "mask": None, "prompt_strength": 0.5, "megapixels": "1", name: digest}
    with pytest.raises(OutputError, match=rf"source\.{name}"):
        Parameters.from_json(json.dumps(json.loads(PARAMETERS.to_json()) | {"source": source}))


def test_version_1_without_a_lora_is_read() -> None:
    fields = json.loads(PARAMETERS.to_json())
    del fields["loras"]
    read = Parameters.from_json(json.dumps(fields | {"record": 1, "lora": None}))
    assert read == PARAMETERS.model_copy(update={"loras": ()})


@pytest.mark.parametrize("changes", [{"record": 1}, {"record": 1, "lora": None}, {"record": 4}, {"lora": None}])
def test_a_mixture_of_versions_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(OutputError, match="damaged"):
        Parameters.from_json(json.dumps(json.loads(PARAMETERS.to_json()) | changes))


def test_the_order_of_loras_makes_no_other_record() -> None:
    one, two = Lora(digest="1" * 64, scale=1), Lora(digest="2" * 64, scale=0.5)
    again, weaker = Lora(digest="1" * 64, scale=1), Lora(digest="1" * 64, scale=0.5)
    records = [
        Parameters(**dict(PARAMETERS) | {"loras": loras}).to_json()
        for loras in ((one, two, weaker), (two, weaker, again), (weaker, one, two))
    ]
    assert len(set(records)) == 1


@pytest.mark.parametrize(
    "digest", ["../../elsewhere", "A1" * 32, "a1" * 31, "a1" * 33, "\x1b[2J", "a1" * 32 + "\n", ""]
)
def test_a_digest_is_64_hexadecimal_digits_or_nothing(digest: str) -> None:
    lora = {"digest": digest, "scale": 1.0}
    with pytest.raises(OutputError, match=r"loras\.0\.digest"):
        Parameters.from_json(json.dumps(json.loads(PARAMETERS.to_json()) | {"loras": [lora]}))


@pytest.mark.parametrize("character", ["& ", "'", "<", '"', "\\", "%", "\u0001", "é", "日", "🥐", "\ufffe"])
def test_no_escape_multiplies_a_long_prompt(character: str) -> None:
    prompt = (character * 100_000)[:100_000]
    parameters = PARAMETERS.model_copy(update={"prompt": prompt})
    assert len(parameters.to_json()) < 4_000
    assert Parameters.from_json(parameters.to_json()).prompt == prompt


def test_a_prompt_that_cannot_be_compressed_grows_by_a_third_at_most() -> None:
    parameters = PARAMETERS.model_copy(update={"prompt": PROMPTS["long"]})
    assert len(parameters.to_json()) < 4 / 3 * len(PROMPTS["long"].encode()) + 2_000


def deflated(content: bytes) -> dict[str, str]:
    return {"deflated": b64encode(zlib.compress(content)).decode()}


@pytest.mark.parametrize(
    "prompt",
    [
        deflated(bytes(2**24 + 1)),
        deflated(b"\xff"),
        {"deflated": "!"},
        {"deflated": "AAAA"},
        {"deflated": deflated(b"cut off")["deflated"][:8]},
        {"deflated": 7},
        {"inflated": ""},
        {},
        7,
    ],
)
def test_a_prompt_that_is_a_bomb_or_damaged_is_refused(prompt: object) -> None:
    with pytest.raises(OutputError, match="damaged"):
        Parameters.from_json(json.dumps(json.loads(PARAMETERS.to_json()) | {"prompt": prompt}))
