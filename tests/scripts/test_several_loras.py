"""``scripts/predict`` with several LoRAs: asked for, and found again for a picture that was drawn with them."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flux_lora.commands.predict import main
from flux_lora.files import provenance
from flux_lora.storage import sha256_of
from tests.conftest import MINI

SMALL = [
    *("-i", "aspect_ratio=custom", "-i", "width=256", "-i", "height=256", "-i", "num_inference_steps=1"),
    *("-i", "disable_safety_checker=true", "-i", "seed=7", "-i", "prompt=a tomato"),
]
AGAIN = ["--from", "outputs/0001-seed7.webp", "-i", "disable_safety_checker=true"]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A picture of three LoRAs: the fine-tune's, one of weights/loras/, and one that lies anywhere."""
    monkeypatch.setenv("FLUX_WEIGHTS", str(weights))
    monkeypatch.setenv("FLUX_ADAPTER_CACHE", str(tmp_path / "cache"))
    tensors = load_file(MINI / "lora.safetensors")
    (weights / "loras").mkdir()
    files = [weights / "loras/ink.safetensors", tmp_path / "anywhere.safetensors"]
    for number, file in enumerate(files):
        few = {key: -tensor for key, tensor in tensors.items() if f"transformer_blocks.{number}." in key}
        save_file(few, file, {"modelspec.title": file.stem})
    first = ["--lora", "lora.safetensors", "0.7"]
    loras = ["--lora", "loras/ink.safetensors", "0.5", "--lora", "anywhere.safetensors", "-0.3"]
    assert main([*SMALL, *first, *loras]) == 0
    record = provenance.read(Path("outputs/0001-seed7.webp"))
    scales = {lora.digest: lora.scale for lora in record.loras}
    every = [weights / "lora.safetensors", *files]
    assert scales == dict(zip(map(sha256_of, every), (0.7, 0.5, -0.3), strict=True))
    return every


def test_a_picture_of_several_is_drawn_again(drawn: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(AGAIN) == 1
    error = capsys.readouterr().err
    assert f"drawn with 3 LoRAs, of which SHA-256 {sha256_of(drawn[2])} ('anywhere') is not at hand" in error
    assert sha256_of(drawn[1]) not in error
    assert main([*AGAIN, "--lora", "anywhere.safetensors"]) == 0
    shutil.move(drawn[2], drawn[1].parent)
    assert main(AGAIN) == 0
    assert capsys.readouterr().err.count("byte for byte") == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora", "anywhere.safetensors", "--lora", "other.safetensors"], "is none of the picture's LoRAs"),
        (["--lora", "anywhere.safetensors", "0.5"], "takes no scale with --from"),
        (["--lora", "anywhere.safetensors", "-i", "lora_scale=0.5"], "the picture has 3 LoRAs, each with its own"),
    ],
)
@pytest.mark.usefixtures("drawn")
def test_what_a_picture_of_several_cannot_be_asked_for(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(load_file(MINI / "lora.safetensors"), "other.safetensors", {"modelspec.title": "another"})
    assert main([*AGAIN, *more]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("scale", [["3"], ["much"], ["1", "2"]])
def test_a_scale_that_cannot_be_is_refused(scale: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--lora", "a.safetensors", "--lora", "b.safetensors", *scale]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"--lora takes a scale from -1 to 2, not '{' '.join(scale)}'" in line


def test_the_scale_of_the_first_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--lora", "a.safetensors", "0.5", "-i", "lora_scale=0.7"]) == 1
    assert "behind --lora or as lora_scale, not both" in capsys.readouterr().err


def test_others_take_the_place_of_a_pictures_own(drawn: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    save_file(load_file(MINI / "lora.safetensors"), "other.safetensors", {"modelspec.title": "another"})
    assert main([*AGAIN, "--lora", "other.safetensors"]) == 0
    assert "not the same: loras" in capsys.readouterr().err
    (lora,) = provenance.read(Path("outputs/0002-seed7.webp")).loras
    assert lora.digest == sha256_of(Path("other.safetensors"))
    assert lora.scale in (0.7, 0.5, -0.3)
    assert len(drawn) == 3
