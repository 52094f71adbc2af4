"""Metadata in files: what other programs see, and what comes back."""

import json
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from flux_lora.errors import OutputError
from flux_lora.files import provenance, xmp
from tests.files.pictures import FORMATS, LINE, PARAMETERS, PROMPTS, written


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("output_format", FORMATS)
def test_parameters_come_back(tmp_path: Path, output_format: str, prompt: str) -> None:
    read = provenance.read(written(tmp_path, output_format, prompt))
    quality = None if output_format == "png" else 80
    assert read.model_dump() == PARAMETERS.model_dump() | {
        "prompt": prompt,
        "output_format": output_format,
        "output_quality": quality,
    }


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("output_format", FORMATS)
def test_pillow_shows_them(tmp_path: Path, output_format: str, embed: bool) -> None:
    with Image.open(written(tmp_path, output_format, embed=embed)) as image:
        properties = image.getxmp()["xmpmeta"]["RDF"]["Description"]
        exif = image.getexif()
        comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
        texts = image.text if isinstance(image, PngImageFile) else {}
    assert properties["DigitalSourceType"] == xmp.AI_GENERATED
    if not embed:
        assert (set(exif), set(texts) - {"XML:com.adobe.xmp"}) == (set(), set())
    elif output_format == "png":
        assert (texts["Description"], texts["parameters"]) == (PARAMETERS.prompt, LINE)
    else:
        assert (exif[ExifTags.Base.ImageDescription], comment[8:].decode("utf-16-be")) == (PARAMETERS.prompt, LINE)


def test_a_long_prompt_needs_extended_xmp_in_jpeg_alone(tmp_path: Path) -> None:
    for name, parts in [("one segment", 0), ("deflated", 0), ("long", 2)]:
        assert (
            written(tmp_path, "jpg", PROMPTS[name]).read_bytes().count(b"http://ns.adobe.com/xmp/extension/") == parts
        )


@pytest.mark.parametrize("output_format", FORMATS)
def test_only_the_ai_mark_stays_without_embedding(tmp_path: Path, output_format: str) -> None:
    path = written(tmp_path, output_format, "a secret", embed=False)
    for trace in ("secret", "flux-lora", "FLUX", "9223372036854775807", "5f5f5f", "2.13.0"):
        assert trace.encode() not in path.read_bytes()
    with pytest.raises(OutputError, match="holds no parameters"):
        provenance.read(path)


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_bare_image_holds_no_parameters(tmp_path: Path, output_format: str) -> None:
    path = tmp_path / f"bare.{output_format}"
    Image.new("RGB", (16, 16)).save(path)
    with pytest.raises(OutputError, match=rf"bare\.{output_format}: It holds no parameters"):
        provenance.read(path)


def packet(properties: str, before: str = "") -> bytes:
    return (
        f'{before}<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{xmp.NAMESPACES["rdf"]}" '
        f'xmlns:fluxlora="{xmp.NAMESPACES["fluxlora"]}"><rdf:Description>{properties}</rdf:Description>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


def record(**changes: object) -> bytes:
    changed = json.loads(PARAMETERS.to_json()) | changes
    return packet(f"<fluxlora:Parameters>{escape(json.dumps(changed))}</fluxlora:Parameters>")


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (record(record=3), "damaged, or a newer version of flux-lora wrote them .*record"),
        (record(seed="seven"), "damaged, or a newer version .*seed"),
        (record(surprise=1), "damaged, or a newer version .*surprise"),
        (record(guidance_scale=float("nan")), "damaged, or a newer version"),
        (packet("<fluxlora:Parameters>{</fluxlora:Parameters>"), "damaged, or a newer version"),
        (record()[:-9], "XMP metadata is damaged"),
        (packet("<fluxlora:Parameters>&b;</fluxlora:Parameters>", BOMB), "XMP metadata is damaged"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused(tmp_path: Path, packet: bytes, message: str) -> None:
    path = tmp_path / "x.webp"
    Image.new("RGB", (16, 16)).save(path, xmp=packet)
    with pytest.raises(OutputError, match=message):
        provenance.read(path)


def test_a_lost_part_of_a_long_record_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path, "jpg", PROMPTS["long"])
    whole = path.read_bytes()
    last = whole.rindex(b"http://ns.adobe.com/xmp/extension/") - 4
    length = int.from_bytes(whole[last + 2 : last + 4])
    path.write_bytes(whole[:last] + whole[last + 2 + length :])
    with pytest.raises(OutputError, match="missing or damaged"):
        provenance.read(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"GIF89a" + bytes(20)])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.webp"
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"x\.webp is not a WebP, JPEG or PNG image"):
        provenance.read(path)


def test_a_truncated_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "png")
    path.write_bytes(path.read_bytes()[:-30])
    for unreadable in (path, tmp_path / "missing.webp", tmp_path):
        with pytest.raises(OutputError, match=f"{unreadable.name} cannot be read"):
            provenance.read(unreadable)
