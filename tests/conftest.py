"""What many tests share: the repository's miniature, and copies of it to change."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "weights" / "mini"


@pytest.fixture(autouse=True)
def _no_operator_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FLUX_") or name in ("COG_WEIGHTS", "HF_TOKEN", "CIVITAI_TOKEN", "REPLICATE_API_TOKEN"):
            monkeypatch.delenv(name)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A copy of the miniature's weights directory that a test may damage."""
    return Path(shutil.copytree(MINI, tmp_path / "weights"))
