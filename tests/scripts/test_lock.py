"""What scripts/lock wrote: complete, with hashes, and in step with pyproject.toml, cog.yaml and the code."""

import ast
import itertools
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SERVING, COG, SERVICE, DEV = (f"requirements{suffix}.txt" for suffix in ("", "-cog", "-service", "-dev"))
INSTALLED = {"": (SERVING, COG), "--service": (SERVING, COG, SERVICE), "--dev": (SERVING, COG, SERVICE, DEV)}
"""By the option of scripts/setup."""
BY_MACHINE = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
"""PyTorch and what its CUDA build brings, Triton among it."""

ENVIRONMENTS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": system,
        "platform_machine": machine,
    }
    for python, (system, machine) in itertools.product(
        ("3.11", "3.12", "3.13"), (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
    )
]


@dataclass(frozen=True)
class Entry:
    requirement: Requirement
    hashes: list[str]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        (pin,) = self.requirement.specifier
        assert pin.operator == "=="
        return pin.version


def lines_of(file: str) -> list[str]:
    """A file's requirements with their options, as pip and Cog read them."""
    text = (ROOT / file).read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def entries_of(file: str) -> dict[str, Entry]:
    entries = {}
    for line in lines_of(file):
        requirement, *hashes = re.split(r"\s+--hash=", line)
        entry = Entry(Requirement(requirement), hashes)
        assert entry.name not in entries, f"{entry.name} has two versions"
        entries[entry.name] = entry
    return entries


LOCKED = {file: entries_of(file) for file in INSTALLED["--dev"]}
ALL = {name: entry for entries in LOCKED.values() for name, entry in entries.items()}


def wanted(option: str) -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    direct = [*PROJECT["project"]["dependencies"], *extras["cog"]]
    if option == "--service":
        direct += extras["service"]
    if option == "--dev":
        direct += [*itertools.chain.from_iterable(extras.values()), *PROJECT["dependency-groups"]["dev"]]
    return [Requirement(text) for text in direct]


def holds(marker: Marker | None, environment: dict[str, str]) -> bool:
    return marker is None or marker.evaluate({"extra": "", **environment})


def test_every_file_that_may_be_installed_has_its_sha256() -> None:
    for entry in ALL.values():
        assert entry.hashes
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in entry.hashes)


def test_no_index_or_address_is_named() -> None:
    for file in LOCKED:
        assert not re.search(r"://|--(?!hash=sha256:)", "\n".join(lines_of(file)))


def test_a_package_is_in_one_file_only() -> None:
    assert sum(len(entries) for entries in LOCKED.values()) == len(ALL)


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda at: "-".join(list(at.values())[::2]))
def test_the_locks_satisfy_the_project(environment: dict[str, str]) -> None:
    for option, files in INSTALLED.items():
        for requirement in wanted(option):
            if requirement.name == "torch" or not holds(requirement.marker, environment):
                continue
            locked = next(
                LOCKED[file][name] for file in files if (name := canonicalize_name(requirement.name)) in LOCKED[file]
            )
            assert holds(locked.requirement.marker, environment)
            assert requirement.specifier.contains(locked.version), f"{requirement}, but {locked.version} is locked"


def needed(requirements: list[Requirement]) -> dict[str, list[Requirement]]:
    """All that these requirements bring here, by name, with what is asked of each; PyTorch's CUDA packages apart."""
    here = {name: str(value) for name, value in default_environment().items()}
    found: dict[str, list[Requirement]] = {}
    waiting = [(requirement, "") for requirement in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if not holds(requirement.marker, {**here, "extra": extra}) or re.fullmatch(r"nvidia-.*|cuda-.*", name):
            continue
        found.setdefault(name, []).append(requirement)
        for wanted_extra in ("", *requirement.extras):
            if (name, wanted_extra) not in seen:
                seen.add((name, wanted_extra))
                waiting += [(Requirement(text), wanted_extra) for text in metadata.requires(name) or []]
    return found


@pytest.mark.parametrize(("option", "files"), INSTALLED.items())
def test_the_locks_hold_what_is_needed_here_and_nothing_else(option: str, files: tuple[str, ...]) -> None:
    """Since pip installs them with --no-deps, what is missing would be missing from the environment."""
    here = {name: str(value) for name, value in default_environment().items()}
    locked = {name: entry for file in files for name, entry in LOCKED[file].items()}
    closure = needed(wanted(option))
    apart = {"torch"} if option == "--dev" else {"torch", "triton"}
    assert closure.keys() - apart == {name for name, entry in locked.items() if holds(entry.requirement.marker, here)}
    for name in closure.keys() - apart:
        for requirement in closure[name]:
            assert requirement.specifier.contains(locked[name].version, prereleases=True), requirement


def test_pytorch_and_its_cuda_packages_are_apart() -> None:
    assert [name for name in ALL if BY_MACHINE.fullmatch(name)] == ["triton"]
    assert "triton" in LOCKED[DEV]
    assert str(ALL["triton"].requirement.marker) == 'sys_platform == "linux"'


def test_cog_yaml_names_the_same_versions() -> None:
    build = yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]
    assert LOCKED[COG].keys() == {"cog", "coglet"}
    assert build["sdk_version"] == ALL["cog"].version
    (command,) = build["run"]
    torch, coglet = (Requirement(word) for word in command.split() if "==" in word)
    assert torch.name == "torch"
    assert next(r for r in wanted("") if r.name == "torch").specifier.contains(next(iter(torch.specifier)).version)
    assert coglet == Requirement(f"coglet=={ALL['coglet'].version}")


def test_cog_passes_every_line_on_with_its_hashes() -> None:
    """Cog rewrites a line in which it finds any of these; Cog and coglet it takes out, with a warning."""
    rewritten = re.compile(r"[a-zA-Z0-9\-_]+==[^ ]+|--find-links=\S+|-f\s+\S+|--extra-index-url=\S+")
    assert rewritten.search("numpy==2.4.6 --hash=sha256:00")
    assert [line for line in lines_of(SERVING) if rewritten.search(line)] == []
    assert LOCKED[SERVING].keys().isdisjoint({"cog", "coglet"})


def imported(*folders: str) -> Iterator[str]:
    """The distributions from which the code in these folders imports."""
    distributions = metadata.packages_distributions()
    for file in (file for folder in folders for file in ROOT.glob(folder)):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                yield from (canonicalize_name(name) for name in distributions.get(module.split(".")[0], [])[:1])


def test_the_package_names_exactly_what_it_imports() -> None:
    project = PROJECT["project"]
    named = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    extra = itertools.chain.from_iterable(project["optional-dependencies"].values())
    optional = {canonicalize_name(Requirement(text).name) for text in extra}
    assert set(imported("flux_lora/**/*.py")) - optional - {"flux-lora", "triton"} == named
    assert set(imported("predict.py")) - {"flux-lora"} == {"cog"}


def test_the_development_group_names_what_the_rest_imports() -> None:
    named = {canonicalize_name(requirement.name) for requirement in wanted("--dev")}
    assert (
        set(imported("tests/**/*.py", "training/**/*.py", "benchmarks/**/*.py")) - named - {"flux-lora", "pip"} == set()
    )


@pytest.mark.slow
def test_locking_once_more_changes_nothing(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "cog.yaml", SERVING, COG, DEV):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([tmp_path / "scripts" / "lock"], check=True)
    for name in (SERVING, COG, DEV):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()
