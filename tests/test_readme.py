"""The README: short, its links lead somewhere, its example draws."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith(("https://", "http://")) or (page.parent / target).exists(), target


def test_its_commands_exist() -> None:
    for script in set(re.findall(r"scripts/\w+", README)):
        assert (ROOT / script).is_file(), script


def test_its_example_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; an installed package's, in one of its own, in test_package.py."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace("seed=7", "seed=7, num_inference_steps=1").replace('"weights/mini"', f'"{ROOT}/weights/mini"')
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - what a reader would run
    assert names["files"][0].stat().st_size > 100
