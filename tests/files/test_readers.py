"""What the programs that people use read in our files: each by itself, or by the patterns that it reads with."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import piexif
import piexif.helper
import pytest
import sd_parsers
from PIL import Image

from flux_lora.files import provenance, xmp
from flux_lora.files.record import Lora
from tests.files.pictures import FORMATS, LINE, PARAMETERS, PROMPTS, written

LORAS = (
    Lora(digest="a1" * 32, scale=0.7, name="tomato", data_digest="c3" * 32),
    Lora(digest="b2" * 32, scale=-0.5, name="tomato", data_digest="d4" * 32),
    Lora(digest="c3" * 32, scale=1, name="«"),
)
HASHES = {"lora:tomato": "a1a1a1a1a1", "lora:tomato-b2b2b2b2b2-1": "b2b2b2b2b2", "lora:lora-c3c3c3c3c3": "c3c3c3c3c3"}


def program(name: str, package: str) -> str:
    """Where a program of Debian's is; a machine without it skips the test, but for one that claims to have all."""
    if found := shutil.which(name):
        return found
    reason = f"{name} is not installed (package {package})"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True)
class Exiftool:
    """The metadata reader that most of the field relies on, and an implementation that is not Pillow's."""

    path: str

    def read(self, path: Path) -> dict[str, Any]:
        command = [self.path, "-json", "-G1", "-struct", "-charset", "filename=utf8", str(path)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return dict(json.loads(printed)[0])

    def write(self, path: Path, *changes: str) -> None:
        subprocess.run([self.path, "-q", "-overwrite_original", *changes, path], check=True)


@pytest.fixture(scope="module")
def exiftool() -> Exiftool:
    return Exiftool(program("exiftool", "libimage-exiftool-perl"))


@pytest.fixture(scope="module")
def exiv2() -> str:
    return program("exiv2", "exiv2")


@pytest.mark.parametrize("output_format", FORMATS)
def test_viewers_show_them(tmp_path: Path, exiftool: Exiftool, output_format: str) -> None:
    shown = exiftool.read(written(tmp_path, output_format))
    prompt, software, comment = (
        ("PNG:Description", "PNG:Software", "PNG:Parameters")
        if output_format == "png"
        else ("IFD0:ImageDescription", "IFD0:Software", "ExifIFD:UserComment")
    )
    assert shown["XMP-iptcExt:DigitalSourceType"] == xmp.AI_GENERATED
    assert shown["XMP-dc:Description"] == PARAMETERS.prompt
    assert shown["XMP-xmp:CreatorTool"] == shown[software] == "flux-lora 0.1.0"
    assert shown[prompt] == PARAMETERS.prompt
    assert shown[comment].replace("\r\n", "\n") == LINE
    assert json.loads(shown["XMP-fluxlora:Parameters"])["seed"] == PARAMETERS.seed
    assert "ExifTool:Warning" not in shown


@pytest.mark.parametrize("name", ["emoji", "one segment", "deflated", "long"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_viewers_show_any_prompt_up_to_4000_characters(
    tmp_path: Path, exiftool: Exiftool, output_format: str, name: str
) -> None:
    shown = exiftool.read(written(tmp_path, output_format, PROMPTS[name]))
    prompt = PROMPTS[name]
    assert shown["XMP-dc:Description"] == (prompt if len(prompt) <= 4000 else f"{prompt[:3999]}…")
    assert "ExifTool:Warning" not in shown


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


@pytest.mark.parametrize("output_format", ["webp", "jpg"])
def test_exiv2_reads_text_instead_of_numbers(tmp_path: Path, exiv2: str, output_format: str) -> None:
    path = written(tmp_path, output_format)
    command = [exiv2, "-g", "Exif", "-Pkyt", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert re.search(r"UserComment +Undefined +charset=Unicode ", done.stdout)
    for text in (PARAMETERS.prompt, "Negative prompt:", LINE.splitlines()[-1]):
        assert text in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("output_format", FORMATS)
def test_exiv2_reads_mark_and_record(tmp_path: Path, exiv2: str, output_format: str) -> None:
    path = written(tmp_path, output_format)
    done = subprocess.run([exiv2, "-PXkv", path], check=True, capture_output=True, text=True)
    properties = dict(re.findall(r"^Xmp\.(\S+) +(.*)$", done.stdout, re.MULTILINE))
    assert properties["iptcExt.DigitalSourceType"] == xmp.AI_GENERATED
    assert properties["dc.description"].endswith(PARAMETERS.prompt)
    assert json.loads(properties["fluxlora.Parameters"])["seed"] == PARAMETERS.seed
    assert done.stderr == ""


@pytest.mark.parametrize("prompt", ["empty", "plain", "emoji", "right to left", "long"])
@pytest.mark.parametrize("output_format", ["webp", "jpg"])
def test_piexif_reads_the_comment_as_web_uis_do(tmp_path: Path, output_format: str, prompt: str) -> None:
    tags = piexif.load(str(written(tmp_path, output_format, PROMPTS[prompt])))
    comment = piexif.helper.UserComment.load(tags["Exif"][piexif.ExifIFD.UserComment])
    assert comment.endswith(f"\nNegative prompt: \n{LINE.splitlines()[-1]}")
    assert comment.startswith(PROMPTS[prompt][:3999])
    assert tags["0th"][piexif.ImageIFD.Software] == b"flux-lora 0.1.0"


OPENED: list[Image.Image] = []
"""Images that stay: sd-parsers remembers the last one by its ``id()``, which another may get once it is gone."""


def parsed(path: Path) -> Any:
    """What sd-parsers reads of a file."""
    OPENED.append(Image.open(path))
    return sd_parsers.ParserManager().parse(OPENED[-1])


@pytest.mark.parametrize("prompt", ["empty", "plain", "emoji", "not XML"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_sd_parsers_reads_all_of_it(tmp_path: Path, output_format: str, prompt: str) -> None:
    found = parsed(written(tmp_path, output_format, PROMPTS[prompt], loras=LORAS))
    (sampler,) = found.samplers
    assert found.generator == sd_parsers.data.Generators.AUTOMATIC1111
    assert [each.value for each in sampler.prompts] == ([PROMPTS[prompt].strip()] if PROMPTS[prompt] else [])
    assert sampler.negative_prompts == []
    assert (sampler.name, sampler.model.name) == ("Euler", "FLUX.1 dev")
    assert sampler.parameters == {
        "scheduler": "Simple",
        "cfg_scale": "1",
        "seed": str(PARAMETERS.seed),
        "steps": "28",
    }
    assert found.metadata["Distilled CFG Scale"] == "3.5"
    assert found.metadata["Hashes"] == HASHES


HOSTILE = "a tomato\nNegative prompt: blue\nSteps: 1, Sampler: none, CFG scale: 9, Seed: 0, Size: 1x1\nMore"


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_prompt_that_looks_like_parameters_is_still_a_prompt(tmp_path: Path, output_format: str) -> None:
    path = written(tmp_path, output_format, HOSTILE)
    (sampler,) = parsed(path).samplers
    assert (sampler.parameters["seed"], sampler.parameters["steps"]) == (str(PARAMETERS.seed), "28")
    assert sampler.prompts[0].value.endswith("More")
    assert provenance.read(path).prompt == HOSTILE


# Programs that cannot be installed here, by the patterns in their source (of 2026-11)


def line_of(path: Path) -> str:
    found = provenance.traces(path).line
    assert found
    return found


@pytest.mark.parametrize("prompt", ["empty", "plain", "emoji"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_a1111_and_forge_paste_it(tmp_path: Path, output_format: str, prompt: str) -> None:
    """``modules/infotext_utils.py``: the last line holds at least three parameters, the others are prompts."""
    *others, last = line_of(written(tmp_path, output_format, PROMPTS[prompt], loras=LORAS)).strip().split("\n")
    parameter = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    found = dict(parameter.findall(last))
    assert others[-1].strip() == "Negative prompt:"
    assert "\n".join(others[:-1]) == PROMPTS[prompt]
    assert found["Steps"] == "28"
    assert found["Sampler"] == "Euler"
    assert found["Schedule type"] == "Simple"
    assert found["CFG scale"] == "1"
    assert found["Distilled CFG Scale"] == "3.5"
    assert found["Seed"] == str(PARAMETERS.seed)
    assert found["Size"] == "48x32"
    hashes = dict(pair.split(": ") for pair in json.loads(found["Lora hashes"]).split(", "))
    assert hashes == {
        "tomato": "c3c3c3c3c3c3",
        "tomato-b2b2b2b2b2-1": "d4d4d4d4d4d4",
        "lora-c3c3c3c3c3": "c3c3c3c3c3",
    }


@pytest.mark.parametrize("prompt", ["empty", "plain", HOSTILE])
def test_comfyui_imports_the_png(tmp_path: Path, prompt: str) -> None:
    """``src/scripts/pnginfo.ts``: the last lines that begin so, whatever the prompt holds; PNG alone, as UTF-8."""
    prompt = PROMPTS.get(prompt, prompt)
    path = written(tmp_path, "png", prompt, loras=LORAS)
    line = line_of(path)
    steps = line.rindex("\nSteps:")
    negative = line.rindex("\nNegative prompt:", 0, steps)
    assert line[negative + 18 : steps].strip() == ""
    assert len(line[:negative]) >= len(prompt)
    option = re.compile(r'\s*([^:]+:\s*([^"\{].*?|".*?"|\{.*?\}))\s*(?:,|$)')
    options = dict(found[0].split(":", 1) for found in option.findall(line[steps:].split("\n")[1]))
    assert options["Seed"].strip() == str(PARAMETERS.seed)
    assert options["CFG scale"].strip() == "1"
    assert options["Sampler"].strip() == "Euler"


def test_png_text_beyond_ascii_is_utf_8(tmp_path: Path) -> None:
    content = written(tmp_path, "png", "brûlée").read_bytes()
    assert content.count("brûlée".encode()) >= 4
    assert "brûlée".encode("latin-1") not in content


@pytest.mark.parametrize("output_format", FORMATS)
def test_civitai_links_the_loras(tmp_path: Path, output_format: str) -> None:
    """``src/utils/metadata/automatic.metadata.ts``: the first line that begins with ``Steps: ``, and its hashes."""
    lines = line_of(written(tmp_path, output_format, HOSTILE, loras=LORAS)).split("\n")
    details = next(line for line in lines if line.startswith("Steps: "))
    assert details == lines[-1]
    found = re.search(r", Hashes:\s*({[^}]+})", details)
    assert found
    assert json.loads(found[1]) == HASHES
    assert re.search(r'Lora hashes: "tomato: c3c3c3c3c3c3, ', details)


@pytest.mark.parametrize("prompt", ["empty", "plain", "emoji"])
def test_invokeai_recalls_from_the_png(tmp_path: Path, prompt: str) -> None:
    """``extract_metadata_from_image.py``: JSON in one text of the PNG; it looks nowhere else."""
    with Image.open(written(tmp_path, "png", PROMPTS[prompt])) as image:
        found = json.loads(image.info["invokeai_metadata"])
    assert (found["positive_prompt"], found["negative_prompt"]) == (PROMPTS[prompt], "")
    assert (found["steps"], found["guidance"], found["width"], found["height"]) == (28, 3.5, 48, 32)
    assert found["seed"] == PARAMETERS.seed


@pytest.mark.parametrize("output_format", FORMATS)
def test_sd_next_reads_the_comment(tmp_path: Path, output_format: str) -> None:
    """``modules/infotext.py``: one text, in which the prompt ends where the first parameter begins."""
    line = line_of(written(tmp_path, output_format, loras=LORAS)).replace("\nSteps:", " Steps:")
    prompt, _, rest = line.partition("Negative prompt: ")
    parameter = re.compile(r'\s*([\w ]+):\s*("(?:\\"[^,]|\\"|\\|[^\"])+"|[^,]*)(?:,|$)')
    found = dict(parameter.findall(rest.strip()))
    assert prompt.strip() == PARAMETERS.prompt
    assert (found["Steps"], found["Seed"], found["CFG scale"]) == ("28", str(PARAMETERS.seed), "1")


@pytest.mark.parametrize("output_format", FORMATS)
def test_schnell_has_no_guidance_to_tell_of(tmp_path: Path, output_format: str) -> None:
    line = line_of(written(tmp_path, output_format, model="schnell", guidance_scale=None, loras=()))
    assert "Distilled" not in line
    assert "hashes" not in line.lower()
    assert "CFG scale: 1, Seed" in line


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_long_prompt_is_whole_in_the_record_alone(tmp_path: Path, output_format: str) -> None:
    short, long = (written(tmp_path, output_format, "& " * half).stat().st_size for half in (2_000, 50_000))
    assert long < short
