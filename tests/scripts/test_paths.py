"""LoRAs by the paths that somebody at a terminal knows them by."""

import os
import shutil
from pathlib import Path

import pytest

from flux_lora.commands import paths
from flux_lora.errors import FluxLoraError, RequestError
from flux_lora.settings import Settings
from flux_lora.sources import Sources
from tests.conftest import MINI

ODD = "my lora (best)"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with LoRAs in it, and a weights directory below; one stands in it."""
    for name in (f"{ODD}/pytorch_lora_weights.safetensors", "two/a.safetensors", "two/b.safetensors"):
        _lora(tmp_path / name)
    _lora(tmp_path / "steps/checkpoint-500/x.safetensors")
    _lora(tmp_path / "weights/loras/ink.safetensors")
    _lora(tmp_path / "weights/loras/alone/x.safetensors")
    (tmp_path / ODD / "._pytorch_lora_weights.safetensors").write_bytes(b"a Mac was here")
    (tmp_path / ODD / "checkpoint-500").mkdir()
    (tmp_path / "link").symlink_to(ODD)
    (tmp_path / "linked.safetensors").symlink_to(f"{ODD}/pytorch_lora_weights.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def _lora(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(MINI / "lora.safetensors", path)


def fetch(source: str) -> Path:
    return Sources.from_settings(Settings()).fetch(paths.of_operator(source), root=None)


@pytest.mark.parametrize(
    "source", [ODD, f"{ODD}/", f"./{ODD}//", f"~/{ODD}", "link", "~/link/", "linked.safetensors", f"weights/../{ODD}"]
)
def test_the_operators_lora_has_any_local_path(home: Path, source: str) -> None:
    for named in (source, str(home / source)) if source[0] != "~" else (source,):
        assert fetch(named) == home / ODD / "pytorch_lora_weights.safetensors"


def test_the_operators_lora_is_found_from_here_and_then_in_the_weights_directory(home: Path) -> None:
    weights = home / "weights"
    assert paths.of_operator("loras/ink.safetensors", weights) == str(weights / "loras/ink.safetensors")
    _lora(home / "loras/ink.safetensors")
    assert paths.of_operator("loras/ink.safetensors", weights) == str(home / "loras/ink.safetensors")
    assert paths.of_operator("owner/name", weights) == "owner/name"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("two", "2 .safetensors files, so name one of a.safetensors, b.safetensors"),
        ("two/", "name one of"),
        ("steps", "without a .safetensors file; below it are checkpoint-500/x.safetensors"),
        ("~/no-such-folder", "there is no such file"),
        ("no-such.safetensors", "there is no such file"),
    ],
)
@pytest.mark.usefixtures("home")
def test_a_folder_without_exactly_one_lora_is_refused_by_what_is_in_it(source: str, said: str) -> None:
    with pytest.raises(FluxLoraError, match=said):
        fetch(source)


@pytest.mark.parametrize(
    ("here", "source", "expected"),
    [
        (".", "loras/ink.safetensors", "loras/ink.safetensors"),  # as documented: from the weights directory
        (".", "weights/loras/ink.safetensors", "ink.safetensors"),
        (".", "~/weights/loras/ink.safetensors", "ink.safetensors"),
        (".", "./weights//loras/../loras/ink.safetensors", "ink.safetensors"),
        ("weights/loras", "ink.safetensors", "ink.safetensors"),
        ("two", "../weights/loras/ink.safetensors", "ink.safetensors"),
        (".", "weights/loras/alone/", "alone/x.safetensors"),
        (".", "loras/alone", "alone/x.safetensors"),
    ],
)
def test_a_requests_path_from_here_leads_below_the_weights(home: Path, here: str, source: str, expected: str) -> None:
    os.chdir(home / here)
    weights = home / "weights"
    named = paths.of_request(source, weights)
    assert (weights / named).resolve() == (weights / "loras" / expected.removeprefix("loras/")).resolve()
    assert Sources.from_settings(Settings()).fetch(named, root=weights).is_file()


@pytest.mark.parametrize("source", ["two/a.safetensors", "~/two/a.safetensors", "linked.safetensors", "./two"])
def test_a_requests_path_that_leads_elsewhere_says_what_to_do(home: Path, source: str) -> None:
    with pytest.raises(RequestError, match=r"is not in .*weights\. Name it with --lora, or put it into .*loras"):
        paths.of_request(source, home / "weights")


@pytest.mark.parametrize("source", ["owner/name", "https://example.com/x.safetensors", "data:," + "A" * 9000, "two"])
def test_what_is_no_path_is_left_as_it_is(home: Path, source: str) -> None:
    (home / "owner").mkdir()
    (home / "owner/name").mkdir()
    assert paths.of_request(source, home / "weights") == source


def test_a_folder_below_the_weights_with_several_is_refused(home: Path) -> None:
    shutil.move(home / "two", home / "weights/loras/two")
    with pytest.raises(RequestError, match="name one of a.safetensors, b.safetensors"):
        paths.of_request("weights/loras/two", home / "weights")
