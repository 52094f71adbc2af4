"""The operator's environment: what is mistyped, what is missing, and what is allowed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flux_lora import rules
from flux_lora.errors import RequestError, SettingsError
from flux_lora.request import Request
from flux_lora.settings import Settings
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("FLUX_SAFETY_TRESHOLD", "FLUX_SAFETY_THRESHOLD"),
        ("FLUX_SAFTY_THRESHOLD", "FLUX_SAFETY_THRESHOLD"),
        ("flux_safety_treshold", "FLUX_SAFETY_THRESHOLD"),
        ("FLUX_EMBED_PARAMETRS", "FLUX_EMBED_PARAMETERS"),
        ("FLUX_EMBEDPARAMETERS", "FLUX_EMBED_PARAMETERS"),
        ("FLUX_DISABLE_SAFETY_CHECKER", "FLUX_ALLOW_DISABLE_SAFETY_CHECKER"),
        ("FLUX_ALLOW_DISABLE_SAFTEY", "FLUX_ALLOW_DISABLE_SAFETY_CHECKER"),
    ],
)
def test_a_mistyped_name_that_could_cost_safety_or_privacy_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, nearest: str
) -> None:
    monkeypatch.setenv(name, "0")
    with pytest.raises(SettingsError) as stopped:
        Settings.from_environment()
    assert f"{name!r} is no setting" in str(stopped.value)
    assert f"Did you mean {nearest}?" in str(stopped.value)


def test_any_other_name_is_said_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FLUX_WEIGHT": "x", "FLUX_URI": "local:///", "FLUX_EMPTY": "", "flux_device": "cpu"}.items():
        monkeypatch.setenv(name, value)
    assert Settings.from_environment().device == "cpu"
    assert Settings.notes() == [
        "The environment variable 'FLUX_URI' is no setting, and so ignored.",
        "The environment variable 'FLUX_WEIGHT' is no setting, and so ignored. Did you mean FLUX_WEIGHTS?",
    ]


REMEDY = "where caches would be kept: name folders in FLUX_CACHE and FLUX_ADAPTER_CACHE."


@pytest.mark.parametrize("folders", [True, False])
def test_without_a_home_caches_have_to_be_named(folders: bool, tmp_path: Path) -> None:
    """As in a container that runs as some number: no HOME, no entry in passwd."""
    code = """
import os, pathlib
def home():
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = home  # what pathlib does then
from flux_lora.settings import Settings
from flux_lora.errors import SettingsError
try:
    print(Settings.from_environment().cache)
except SettingsError as error:
    print(error)
"""
    named = {"FLUX_CACHE": str(tmp_path / "a"), "FLUX_ADAPTER_CACHE": str(tmp_path / "b")} if folders else {}
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **named}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (str(tmp_path / "a") if folders else f"There is no home directory, {REMEDY}")


def test_a_prompt_beyond_the_limit_is_refused_with_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_environment()
    rules.check(Request.parse(prompt="a" * 100_000), settings)
    with pytest.raises(RequestError, match=r"prompt has 100,001 characters, and this server reads at most 100,000"):
        rules.check(Request.parse(prompt="é" * 100_001), settings)
    monkeypatch.setenv("FLUX_MAX_PROMPT", "5")
    with pytest.raises(RequestError, match="at most 5"):
        rules.check(Request.parse(prompt="a tomato"), Settings.from_environment())


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_limit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FLUX_MAX_PROMPT", value)
    with pytest.raises(SettingsError, match="FLUX_MAX_PROMPT"):
        Settings.from_environment()


def test_the_operator_may_forbid_switching_the_safety_checker_off(monkeypatch: pytest.MonkeyPatch) -> None:
    off = Request.parse(prompt="a", disable_safety_checker=True)
    rules.check(off, Settings.from_environment())
    monkeypatch.setenv("FLUX_ALLOW_DISABLE_SAFETY_CHECKER", "0")
    settings = Settings.from_environment()
    rules.check(Request.parse(prompt="a"), settings)
    with pytest.raises(RequestError, match="disable_safety_checker is not allowed on this server"):
        rules.check(off, settings)
