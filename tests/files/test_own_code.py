"""The digest that names the code of a picture."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

import flux_lora
from flux_lora.files import own_code


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in {"b.py": "two\n", "a/c.py": "three\n", "a.py": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_it_is_the_sha256_of_names_sizes_and_contents_in_order(package: Path) -> None:
    by_hand = b"a.py\x000\x00" + b"a/c.py\x006\x00three\n" + b"b.py\x004\x00two\n"
    assert own_code.digest_of(package) == hashlib.sha256(by_hand).hexdigest()[:16]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda package: (package / "b.py").write_text("2\n"), False),
        (lambda package: (package / "b.py").rename(package / "d.py"), False),
        (lambda package: (package / "e.py").touch(), False),
        (lambda package: (package / "b.py").write_text("") + (package / "a.py").write_text("two\n"), False),
        (lambda package: (package / "a/__pycache__").mkdir(), True),
        (lambda package: (package / "b.cpython-311.pyc").touch(), True),
        (lambda package: (package / "b.py").chmod(0o755), True),
    ],
)
def test_it_changes_with_the_sources_alone(package: Path, change: Callable[[Path], object], same: bool) -> None:
    before = own_code.digest_of(package)
    change(package)
    assert (own_code.digest_of(package) == before) == same


def test_it_is_that_of_this_package() -> None:
    assert own_code.digest_of(Path(flux_lora.__file__).parent) == own_code.DIGEST
