"""Metadata in files: what other programs see, and what comes back."""

import json
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from PIL import ExifTags, Image

from flux_lora.errors import OutputError
from flux_lora.files import outputs, provenance
from flux_lora.files.record import Environment, Lora, Parameters, Software

SOFTWARE = Software(flux_lora="0.1.0", torch="2.13.0", diffusers="0.42.1", transformers="5.23.0", pillow="13.0.0")
ENVIRONMENT = Environment(base="5f" * 32, device="cpu", dtype="float32", software=SOFTWARE)
PARAMETERS = Parameters(
    prompt="ein Croissant <auf> \"Rot\" & 'Blau'",
    seed=2**63 - 1,
    width=48,
    height=32,
    model="dev",
    num_inference_steps=28,
    guidance_scale=3.5,
    lora=Lora(digest="a1" * 32, scale=-0.1),
    output_format="webp",
    output_quality=80,
    environment=ENVIRONMENT,
)

FORMATS = ("webp", "jpg", "png")
PROMPTS = {
    "empty": "",
    "plain": PARAMETERS.prompt,
    "not XML": "".join(map(chr, range(1, 32))) + "\x7f\x85\u2028\ufffe\uffff ]]> &#0; &amp; <!--",
    "emoji": "🥐👩🏽‍🚀🏳️‍🌈 𝒳",
    "right to left": "שלום \u202eمرحبا\u202c",
    "one segment": "a" * 31_000,
    "two segments": "a" * 33_000,
    "long": "".join(random.Random(7).choices('ab é日🥐\n\t"\\&<', k=100_000)),
}


@dataclass(frozen=True)
class Exiftool:
    """The metadata reader that most of the field relies on, and an implementation that is not Pillow's."""

    program: str

    def read(self, path: Path) -> dict[str, str]:
        command = [self.program, "-json", "-G1", "-struct", "-charset", "filename=utf8", path]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(printed)[0]

    def write(self, path: Path, *changes: str) -> None:
        subprocess.run([self.program, "-q", "-overwrite_original", *changes, path], check=True)


@pytest.fixture(scope="module")
def exiftool() -> Exiftool:
    if not (program := shutil.which("exiftool")):
        pytest.skip("exiftool is not installed (package libimage-exiftool-perl)")
    return Exiftool(program)


def written(tmp_path: Path, output_format: str, prompt: str = PARAMETERS.prompt, *, embed: bool = True) -> Path:
    quality = None if output_format == "png" else 80
    changes = {"prompt": prompt, "output_format": output_format, "output_quality": quality}
    parameters = PARAMETERS.model_copy(update=changes)
    path = tmp_path / f"0.{output_format}"
    outputs.write(outputs.encode(Image.new("RGB", (48, 32), "red"), parameters, embed=embed), path)
    return path


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


LINE = (
    f"{PARAMETERS.prompt}\nSteps: 28, Distilled CFG Scale: 3.5, Seed: 9223372036854775807, Size: 48x32, "
    "Model: FLUX.1 dev, LoRA: a1a1a1a1a1a1 at -0.1, Version: flux-lora 0.1.0"
)


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("output_format", FORMATS)
def test_pillow_shows_them(tmp_path: Path, output_format: str, embed: bool) -> None:
    with Image.open(written(tmp_path, output_format, embed=embed)) as image:
        properties = image.getxmp()["xmpmeta"]["RDF"]["Description"]
        exif = image.getexif()
        comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
        texts = image.text if output_format == "png" else {}
    assert properties["DigitalSourceType"] == provenance.AI_GENERATED
    if not embed:
        assert (set(exif), set(texts) - {"XML:com.adobe.xmp"}) == (set(), set())
    elif output_format == "png":
        assert (texts["Description"], texts["parameters"]) == (PARAMETERS.prompt, LINE)
    else:
        assert (exif[ExifTags.Base.ImageDescription], comment[8:].decode("utf-16-be")) == (PARAMETERS.prompt, LINE)


@pytest.mark.parametrize("output_format", FORMATS)
def test_viewers_show_them(tmp_path: Path, exiftool: Exiftool, output_format: str) -> None:
    shown = exiftool.read(written(tmp_path, output_format))
    prompt, software, comment = (
        ("PNG:Description", "PNG:Software", "PNG:Parameters")
        if output_format == "png"
        else ("IFD0:ImageDescription", "IFD0:Software", "ExifIFD:UserComment")
    )
    assert shown["XMP-iptcExt:DigitalSourceType"] == provenance.AI_GENERATED
    assert shown["XMP-dc:Description"] == PARAMETERS.prompt
    assert shown["XMP-xmp:CreatorTool"] == shown[software] == "flux-lora 0.1.0"
    assert shown[prompt] == PARAMETERS.prompt
    assert shown[comment].replace("\r\n", "\n") == LINE
    assert json.loads(shown["XMP-fluxlora:Parameters"])["seed"] == PARAMETERS.seed
    assert "ExifTool:Warning" not in shown


@pytest.mark.parametrize("name", ["emoji", "two segments", "long"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_viewers_show_any_prompt_whole(tmp_path: Path, exiftool: Exiftool, output_format: str, name: str) -> None:
    shown = exiftool.read(written(tmp_path, output_format, PROMPTS[name]))
    assert shown["XMP-dc:Description"] == PROMPTS[name]
    assert "ExifTool:Warning" not in shown


def test_a_long_prompt_needs_extended_xmp_in_jpeg_alone(tmp_path: Path) -> None:
    for name, parts in [("one segment", 0), ("two segments", 2), ("long", 9)]:
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
def test_viewers_show_the_ai_mark_alone(tmp_path: Path, exiftool: Exiftool, output_format: str) -> None:
    shown = exiftool.read(written(tmp_path, output_format, embed=False))
    assert {name for name in shown if name.startswith(("XMP", "ExifIFD", "IFD"))} == {"XMP-iptcExt:DigitalSourceType"}
    assert not shown.keys() & {"PNG:Description", "PNG:Software", "PNG:Parameters"}


@pytest.mark.parametrize("prompt", ["plain", "long"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_parameters_survive_another_program(
    tmp_path: Path, exiftool: Exiftool, output_format: str, prompt: str
) -> None:
    path = written(tmp_path, output_format, PROMPTS[prompt])
    exiftool.write(path, "-XMP:Rating=5", "-XMP-dc:Creator=me")
    assert provenance.read(path).prompt == PROMPTS[prompt]
    exiftool.write(path, "-api", "Compact=Shorthand", "-XMP:Rating=4")  # simple properties as attributes
    assert provenance.read(path).prompt == PROMPTS[prompt]


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_bare_image_holds_no_parameters(tmp_path: Path, output_format: str) -> None:
    path = tmp_path / f"bare.{output_format}"
    Image.new("RGB", (16, 16)).save(path)
    with pytest.raises(OutputError, match=rf"bare\.{output_format}: It holds no parameters"):
        provenance.read(path)


def xmp(properties: str, before: str = "") -> bytes:
    return (
        f'{before}<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{provenance.NAMESPACES["rdf"]}" '
        f'xmlns:fluxlora="{provenance.NAMESPACES["fluxlora"]}"><rdf:Description>{properties}</rdf:Description>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


def record(**changes: object) -> bytes:
    changed = json.loads(PARAMETERS.to_json()) | changes
    return xmp(f"<fluxlora:Parameters>{escape(json.dumps(changed))}</fluxlora:Parameters>")


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (record(record=2), "damaged, or a newer version of flux-lora wrote them .*record"),
        (record(seed="seven"), "damaged, or a newer version .*seed"),
        (record(surprise=1), "damaged, or a newer version .*surprise"),
        (record(guidance_scale=float("nan")), "damaged, or a newer version"),
        (xmp("<fluxlora:Parameters>{</fluxlora:Parameters>"), "damaged, or a newer version"),
        (record()[:-9], "XMP metadata is damaged"),
        (xmp("<fluxlora:Parameters>&b;</fluxlora:Parameters>", BOMB), "XMP metadata is damaged"),
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
