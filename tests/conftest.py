"""What many tests share: the repository's miniature, and copies of it to change; and in which order they run."""

import os
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

# Without a GPU Triton's programs are interpreted. It reads this when it is imported, by whichever test is the first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# In the tests' own process: to begin two others that compile takes as long as what there is to compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

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


LONGEST = (
    "tests/server",
    "tests/server/test_speed.py",
    "tests/training/test_miniature.py",
    "tests/service/test_service.py",
    "tests/memory/test_placement.py",
    "tests/service/test_page.py",
    "tests/test_cuda.py",
    "tests/test_source_images.py",
    "tests/test_benchmarks.py",
    "tests/scripts/test_serve.py",
    "tests/scripts/test_predict.py",
    "tests/test_generator.py",
    "tests/training/test_stages.py",
    "tests/speed/test_projections.py",
    "tests/speed/test_compilation.py",
)
"""What takes longest is begun first, so that several processes end together."""


def work_unit(test: str) -> str:
    """What one process runs, because it shares what is set up: a file, and most of those before one Cog server."""
    file = test.partition("::")[0]
    return "tests/server" if file.startswith("tests/server/") and file not in LONGEST else file


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        rank = {unit: place for place, unit in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(work_unit(item.nodeid), len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class InUnits(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            return work_unit(nodeid)

    return InUnits(config, log)
