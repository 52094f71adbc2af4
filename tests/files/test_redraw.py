"""What is said of a picture that was drawn again."""

import io
from typing import Any

import pytest
from PIL import Image

from flux_lora.errors import RequestError
from flux_lora.files import outputs, redraw
from flux_lora.files.record import Lora, Parameters
from flux_lora.request import Request
from tests.files.pictures import FORMATS, PARAMETERS

PICTURE = Image.effect_noise((48, 32), 50).convert("RGB")


def drawn(picture: Image.Image = PICTURE, **changes: Any) -> tuple[bytes, Parameters]:
    parameters = PARAMETERS.model_copy(update={"output_format": "png", "output_quality": None} | changes)
    return outputs.encode(picture, parameters, embed=True), parameters


def compared(new: tuple[bytes, Parameters | None]) -> str:
    return redraw.comparison(*drawn(), *new)


def test_the_same_file_is_the_same_byte_for_byte() -> None:
    assert compared(drawn()) == "byte for byte"


def test_what_differs_is_named() -> None:
    stronger = tuple(lora.model_copy(update={"scale": 1.5}) for lora in PARAMETERS.loras)
    assert compared(drawn(seed=8)) == "not the same: seed"
    assert compared(drawn(loras=stronger)) == "not the same: loras"
    software = PARAMETERS.environment.software.model_copy(update={"torch": "2.14.0"})
    environment = PARAMETERS.environment.model_copy(update={"software": software})
    assert compared(drawn(environment=environment)) == "not the same: torch 2.14.0, not 2.13.0"


@pytest.mark.parametrize("output_format", FORMATS)
def test_where_only_the_metadata_differs_the_pixels_are_compared(output_format: str) -> None:
    """As in files of version 1, which do not know what a LoRA is called."""
    nameless = tuple(Lora(digest=lora.digest, scale=lora.scale) for lora in PARAMETERS.loras)
    quality = None if output_format == "png" else 80
    old = drawn(loras=nameless, output_format=output_format, output_quality=quality)
    new = drawn(output_format=output_format, output_quality=quality)
    assert redraw.comparison(*old, *new).startswith("the same pixels;")


def test_other_pixels_of_equal_parameters_are_told() -> None:
    assert compared(drawn(PICTURE.transpose(Image.Transpose.ROTATE_180))) == (
        "not the same, although all parameters are equal"
    )


def test_parameters_that_were_kept_out_cannot_be_compared() -> None:
    assert "FLUX_EMBED_PARAMETERS=0" in compared((drawn(seed=8)[0], None))


@pytest.mark.parametrize("loras", [(), PARAMETERS.loras])
def test_inputs_ask_for_the_same_picture(loras: tuple[Lora, ...]) -> None:
    asked = Request.parse(**redraw.inputs_of(drawn(loras=loras, width=256, height=320)[1]))
    assert (asked.seed, asked.size, asked.num_outputs) == (PARAMETERS.seed, (256, 320), 1)
    assert asked.lora_scale == (loras[0].scale if loras else 0)


def test_more_loras_than_can_be_asked_for_are_refused() -> None:
    two = (*PARAMETERS.loras, Lora(digest="b2" * 32, scale=1))
    with pytest.raises(RequestError, match="2 LoRAs"):
        redraw.inputs_of(drawn(loras=two)[1])


def test_a_broken_picture_is_not_taken_for_the_same() -> None:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    assert redraw.comparison(file.getvalue(), PARAMETERS, *drawn()) != "byte for byte"
