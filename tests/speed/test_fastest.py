"""What is measured once for each device and software version, and then kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flux_lora.errors import SettingsError
from flux_lora.speed import fastest

CPU = torch.device("cpu")
TIMES: dict[str, float | None] = {"native": 3.0, "cudnn": None, "flash": 2.0, "sage": 2.5}


def choose(
    folder: Path, measure: Callable[[str], float | None] = TIMES.__getitem__, names: Any = TIMES, tokens: int = 64
) -> tuple[str, bool]:
    return fastest.choose_fastest("kernel", tuple(names), {"tokens": tokens}, CPU, folder, measure)


def test_the_fastest_usable_one_is_measured_once_and_kept(tmp_path: Path) -> None:
    folder, measured = tmp_path / "cache", []

    def measure(name: str) -> float | None:
        measured.append(name)
        return TIMES[name]

    assert choose(folder, measure) == ("flash", True)
    assert measured == list(TIMES)
    assert choose(folder, measure) == ("flash", False)
    assert choose(folder, measure, tokens=65)[1]
    assert choose(folder, measure, names=("native", "sage")) == ("sage", True)


@pytest.mark.parametrize("content", ["", "{", '{"choice": "not a candidate"}', "[]"])
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: str) -> None:
    choose(tmp_path)
    (file,) = tmp_path.glob("kernel-*.json")
    file.write_text(content)
    assert choose(tmp_path) == ("flash", True)
    assert json.loads(file.read_text())["choice"] == "flash"


def test_another_version_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(tmp_path)
    monkeypatch.setattr(fastest, "version", lambda _: "0.0")
    assert choose(tmp_path)[1]


def test_without_a_place_to_keep_it_the_choice_is_still_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert choose(tmp_path / "file" / "cache") == ("flash", True)


def test_when_nothing_can_be_used_the_first_is_taken(tmp_path: Path) -> None:
    assert choose(tmp_path, lambda _: None) == ("native", True)


def test_a_choice_that_others_may_have_made_is_refused(tmp_path: Path) -> None:
    choose(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(SettingsError, match=f"^FLUX_CACHE: others may write to {tmp_path}"):
        choose(tmp_path)
