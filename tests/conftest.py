"""What many tests share: the repository's miniature, and copies of it to change."""

import os
import shutil
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

# Without a GPU Triton's programs are interpreted. It reads this when it is imported, by whichever test is the first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "weights" / "mini"


def forget_operator_settings() -> None:
    """Whoever runs the tests may have set up a server of their own; and the tests compare bits on the CPU."""
    for name in list(os.environ):
        if name.startswith("FLUX_") or name in ("COG_WEIGHTS", "HF_TOKEN", "CIVITAI_TOKEN", "REPLICATE_API_TOKEN"):
            del os.environ[name]
    os.environ["FLUX_DEVICE"] = "cpu"


forget_operator_settings()  # before the fixtures of a whole session, which start servers


@pytest.fixture(autouse=True)
def _no_operator_settings() -> None:
    forget_operator_settings()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A copy of the miniature's weights directory that a test may damage."""
    return Path(shutil.copytree(MINI, tmp_path / "weights"))
