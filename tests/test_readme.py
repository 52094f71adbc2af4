"""The README: short, its links lead somewhere, its example draws."""

import re
import subprocess
import sys
from pathlib import Path

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


def test_its_example_draws(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace("seed=7", "seed=7, num_inference_steps=1").replace('"weights/mini"', f'"{ROOT}/weights/mini"')
    code += "print(files[0].stat().st_size)"
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": "/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) > 100
