"""The package as pip installs it: what is in it, what it shows, and what it costs to import."""

import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version
from PIL import Image

import flux_lora
from flux_lora import errors
from flux_lora.files import own_code
from flux_lora.inputs import EXTENDED
from tests.conftest import MINI, ROOT

_FOUND = re.search(r"::\n\n(.*?)\n\n(?=\S)", flux_lora.__doc__, re.DOTALL)
assert _FOUND
EXAMPLE = textwrap.dedent(_FOUND[1])
"""The one in the package's own documentation."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel alone is installed."""
    folder = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder


def run(code: str, package: Path, **environment: str) -> str:
    """What Python prints, where this package comes first and the project's folder is not at hand."""
    variables = {"PYTHONPATH": str(package), "PATH": "/usr/bin", "HOME": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=package, env=variables | environment, check=True, capture_output=True, text=True)
    return done.stdout


def test_the_wheel_holds_the_package_and_its_licence_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flux_lora").rglob("*.py")}
    page = {f"flux_lora/service/page/{name}" for name in ("index.html", "page.css", "page.js")}
    assert {name for name in names if ".dist-info/" not in name} == sources | page | {"flux_lora/py.typed"}
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    fields = dict(re.findall(r"^([\w-]+): (.*)$", metadata, re.MULTILINE))
    assert fields["Name"] == "flux-lora"
    assert fields["Version"] == flux_lora.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert set(fields["Requires-Python"].split(",")) == {">=3.11", "<3.14"}


def test_an_installed_package_names_the_same_code_as_the_checkout(installed: Path) -> None:
    printed = run("from flux_lora.files import own_code; print(own_code.__file__, own_code.DIGEST)", installed)
    file, digest = printed.split()
    assert Path(file).is_relative_to(installed)
    assert digest == own_code.DIGEST


def test_five_lines_of_python_draw(installed: Path) -> None:
    assert len([line for line in EXAMPLE.splitlines() if line]) == 5
    small = 'seed=7, aspect_ratio="custom", width=256, height=256, num_inference_steps=1'
    code = EXAMPLE.replace("seed=7", small)
    assert code != EXAMPLE
    assert "seed 7" in run(code, installed, FLUX_WEIGHTS=str(MINI), FLUX_DEVICE="cpu").splitlines()
    assert Image.open(installed / "0-seed7.webp").size == (256, 256)


def test_importing_it_is_light() -> None:
    code = "import sys, flux_lora; dir(flux_lora); print(*sorted(sys.modules))"
    modules = run(code, ROOT).split()
    assert "flux_lora" in modules
    assert {name.partition(".")[0] for name in modules}.isdisjoint(
        {"torch", "pydantic", "diffusers", "transformers", "PIL"}
    )
    light = run("import sys; from flux_lora import Request, Settings, FluxLoraError; print(*sys.modules)", ROOT).split()
    assert {"torch", "diffusers", "transformers", "PIL"}.isdisjoint(light)


def test_all_that_it_shows_is_there() -> None:
    for name in flux_lora.__all__:
        found = getattr(flux_lora, name)
        assert found is EXTENDED or found.__name__ == name
    assert set(flux_lora.__all__) <= set(dir(flux_lora))
    assert flux_lora.__all__ == sorted(flux_lora.__all__, key=lambda name: (not name.isupper(), name))  # as ruff does
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        flux_lora.nonsense  # noqa: B018 - asking is what is tested


def test_all_errors_are_shown() -> None:
    ours = {name for name, found in vars(errors).items() if isinstance(found, type)}
    assert ours == {name for name in flux_lora.__all__ if name.endswith("Error")}


def test_the_version_is_the_first_of_the_changelog() -> None:
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    name, date = headings[0]
    if Version(flux_lora.__version__).is_devrelease:
        assert (name, date) == ("Unreleased", "")
        assert Version(headings[1][0]) < Version(flux_lora.__version__)
    else:
        assert name == flux_lora.__version__
        assert date
    released = [Version(name) for name, _ in headings if name != "Unreleased"]
    assert released == sorted(released, reverse=True)
