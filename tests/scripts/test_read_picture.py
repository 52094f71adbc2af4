"""``scripts/read_picture`` as a user calls it, but for the shell that sets up its environment."""

import io
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from flux_lora.commands.read_picture import main
from flux_lora.files import outputs, signing
from flux_lora.files.record import Lora, Parameters
from tests.conftest import ROOT
from tests.files.certificates import issue
from tests.files.pictures import FORMATS, PARAMETERS, written


def shown(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert main([str(each) for each in arguments]) == code
    return capsys.readouterr().out


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_record_is_shown_readably(capsys: pytest.CaptureFixture[str], tmp_path: Path, output_format: str) -> None:
    text = shown(capsys, written(tmp_path, output_format))
    for fact in (
        PARAMETERS.prompt,
        "FLUX.1 dev, 28 steps, guidance 3.5",
        str(PARAMETERS.seed),
        f"my style, No. 1, scale -0.1, SHA-256 {'a1' * 32}",
        "made by a model",
        "signature none",
        "flux-lora 0.1.0 on cpu in float32",
    ):
        assert fact in text


@pytest.mark.parametrize("name", ["version-1.webp", "version-1.jpg"])
def test_old_pictures_are_shown(capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = shown(capsys, ROOT / "tests/files/fixtures" / name)
    assert "a tomato, it's <red> & round" in text
    assert "without a name, scale 0.7" in text


@pytest.mark.parametrize("output_format", FORMATS)
def test_json_is_the_record(capsys: pytest.CaptureFixture[str], tmp_path: Path, output_format: str) -> None:
    prompt = "& " * 50_000
    (line,) = shown(capsys, "--json", written(tmp_path, output_format, prompt)).splitlines()
    assert json.loads(line)["prompt"] == prompt
    assert Parameters.from_json(line).seed == PARAMETERS.seed


def stripped(path: Path, **kept: object) -> Path:
    """The picture as a chat program passes it on: encoded anew."""
    with Image.open(path) as image:
        file = io.BytesIO()
        image.save(file, image.format, **kept)
    path.write_bytes(file.getvalue())
    return path


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_picture_that_lost_everything_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, output_format: str
) -> None:
    text = shown(capsys, stripped(written(tmp_path, output_format)), code=1)
    assert "a program on its way removed its metadata. Nothing is left but the pixels." in text
    assert "48×32" in text


@pytest.mark.parametrize("output_format", ["webp", "jpg"])
def test_a_picture_that_kept_its_exif_shows_the_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, output_format: str
) -> None:
    path = written(tmp_path, output_format)
    with Image.open(path) as image:
        exif = image.info["exif"]
    text = shown(capsys, stripped(path, exif=exif), code=1)
    assert "Nothing is left but the text for other programs." in text
    assert PARAMETERS.prompt in text
    assert "Steps: 28, Sampler: Euler" in text


@pytest.mark.parametrize("output_format", FORMATS)
def test_parameters_that_were_kept_out_leave_the_mark(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, output_format: str
) -> None:
    text = shown(capsys, written(tmp_path, output_format, embed=False), code=1)
    assert "Nothing is left but the mark." in text
    assert "made by a model" in text


def altered(content: bytes) -> bytes:
    """The same picture with another prompt; a PNG, whose chunks have checksums, with one more chunk."""
    if not content.startswith(b"\x89PNG"):
        return content.replace(b"Croissant", b"Baguettes")
    chunk = b"tEXtComment\0mine"
    return content[:-12] + (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) + content[-12:]


@pytest.mark.parametrize("output_format", FORMATS)
def test_signatures_are_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path, output_format: str) -> None:
    identity = issue()
    signer = signing.Signer(identity.certificate, identity.key)
    quality = None if output_format == "png" else 80
    parameters = PARAMETERS.model_copy(update={"output_format": output_format, "output_quality": quality})
    picture = Image.effect_noise((48, 32), 50).convert("RGB")
    path = tmp_path / "x"
    content = outputs.encode(picture, parameters, embed=True, signer=signer)
    path.write_bytes(content)
    assert "intact, by Test signer, Tests; whether to trust" in shown(capsys, path)
    path.write_bytes(altered(content))
    assert "broken: " in shown(capsys, path)
    path.write_bytes(outputs.encode(picture, parameters, embed=False, signer=signer))
    assert "Nothing is left but the mark and the signature." in shown(capsys, path, code=1)


def test_text_of_strangers_moves_no_cursor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    loras = (Lora(digest="a1" * 32, scale=1, name="\x1b[31mred"),)
    text = shown(capsys, written(tmp_path, "webp", "one\n\x1b[2Jtwo \u202eowt\r👩🏽‍🚀", loras=loras))
    assert "one\n            \\x1b[2Jtwo \\u202eowt\\r👩🏽‍🚀" in text
    assert "\\x1b[31mred" in text
    assert not {"\x1b", "\u202e", "\r"} & set(text)


def test_several_files_are_shown_and_a_bad_one_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good, bad = written(tmp_path, "png"), tmp_path / "bad.webp"
    bad.write_text("hello")
    assert main([str(bad), str(good), str(tmp_path / "missing.png")]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("FLUX.1 dev") == 1
    assert [line.startswith("error: ") for line in printed.err.splitlines()] == [True, True]


@pytest.mark.parametrize("at", range(0, 1200, 40))
def test_damaged_metadata_is_an_answer_too(capsys: pytest.CaptureFixture[str], tmp_path: Path, at: int) -> None:
    path = written(tmp_path, "webp")
    content = bytearray(path.read_bytes())
    content[100 + at] ^= 0xFF
    path.write_bytes(content)
    main([str(path)])
    printed = capsys.readouterr()
    assert printed.out or printed.err.startswith("error: ")


def test_it_is_quick_and_quiet(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests/files/fixtures/version-1.webp", tmp_path)
    code = "import sys; from flux_lora.commands.read_picture import main\nmain(['version-1.webp'])\n"
    code += "sys.exit('torch' in sys.modules or 'c2pa' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    assert done.stderr == b""
