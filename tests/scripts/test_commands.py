"""Which weights a command uses: what the user put there, or it is said why not."""

from pathlib import Path

import pytest

from flux_lora import commands
from flux_lora.errors import WeightsError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with the miniature, and a command called from elsewhere."""
    (tmp_path / "weights/mini").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(commands, "PROJECT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("added", "environment", "expected"),
    [
        ([], {}, "weights/mini"),
        ([], {"FLUX_WEIGHTS": ""}, "weights/mini"),
        ([".gitkeep"], {}, "weights/mini"),
        (["dev"], {}, "weights"),
        (["schnell", "lora.safetensors"], {}, "weights"),
        ([], {"FLUX_DOWNLOAD": "1"}, "weights"),
        (["lora.safetensors"], {"FLUX_DOWNLOAD": "dev"}, "weights"),
        ([], {"FLUX_WEIGHTS": "elsewhere"}, "here/elsewhere"),
    ],
)
def test_the_miniature_draws_only_while_nothing_was_named_or_put_there(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    added: list[str],
    environment: dict[str, str],
    expected: str,
) -> None:
    for name in added:
        (project / "weights" / name).mkdir()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert commands.drawing_settings().weights == project / expected
    assert ("drawing with weights/mini" in capsys.readouterr().err) == (expected == "weights/mini")


@pytest.mark.parametrize("added", ["lora.safetensors", "my-style.safetensors", "loras", "safety_checker", "Dev"])
def test_what_was_put_beside_no_base_model_is_not_passed_over(project: Path, added: str) -> None:
    (project / "weights" / added).mkdir()
    with pytest.raises(
        WeightsError, match=rf"holds {added} and no base model.*download_weights dev.*FLUX_WEIGHTS=.*mini"
    ):
        commands.drawing_settings()


def test_another_process_reads_the_same_paths(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "here/my.safetensors").touch()
    monkeypatch.setenv("COG_WEIGHTS", "my.safetensors")
    monkeypatch.setenv("FLUX_CACHE", "cache")
    environment = commands.environment_for(commands.drawing_settings())
    assert environment["FLUX_WEIGHTS"] == str(project / "weights/mini")
    assert environment["COG_WEIGHTS"] == str(project / "here/my.safetensors")
    assert environment["FLUX_CACHE"] == str(project / "here/cache")
