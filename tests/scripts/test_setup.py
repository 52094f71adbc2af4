"""The decisions of scripts/setup, made by the script's own functions; the whole installation is a slow test."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pip
import pytest

from flux_lora.commands import PROJECT

BASH = shutil.which("bash") or "bash"
TORCH = re.findall(r"torch==[0-9.]+", (PROJECT / "cog.yaml").read_text())[0]
SERVING = "requirements.txt requirements-cog.txt"
SERVICE = f"{SERVING} requirements-service.txt"
DEV = f"{SERVICE} requirements-dev.txt"
LOCKS = f"install --no-deps --require-hashes {' '.join(f'--requirement={file}' for file in SERVING.split())}"
WORKING = f'exec "{sys.executable}" "$@"'
WITHOUT_VENV = f'case "$*" in *ensurepip*) exit 1;; esac; {WORKING}'
TOO_OLD = "exit 1"

no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA GPU")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a CPU build of its own")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What scripts/setup reads."""
    shutil.copytree(PROJECT / "scripts", tmp_path / "scripts")
    for name in (*DEV.split(), "cog.yaml"):
        shutil.copy(PROJECT / name, tmp_path)
    return tmp_path


@pytest.fixture
def programs(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """Writes shell scripts under the names of programs, and gives their folder."""
    folder = tmp_path / "programs"
    folder.mkdir()

    def write(scripts: dict[str, str]) -> Path:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        return folder

    return write


def call(project: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BASH, "-c", f"source scripts/setup; requirements=({SERVING}); {command}"],
        cwd=project,
        env={name: value for name, value in os.environ.items() if name != "PYTHON"} | environment,
        capture_output=True,
        text=True,
    )


@linux
@no_gpu
@pytest.mark.parametrize(
    ("scripts", "expected"),
    [
        ({"nvidia-smi": "exit 127"}, f"{TORCH}+cpu"),
        ({"nvidia-smi": "echo 'No devices found.'"}, f"{TORCH}+cpu"),
        ({"nvidia-smi": "echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'"}, TORCH),
        ({"nvidia-smi": "exit 127", "uname": "echo Darwin"}, TORCH),
    ],
)
def test_only_an_nvidia_gpu_brings_cuda(
    project: Path, programs: Callable[[dict[str, str]], Path], scripts: dict[str, str], expected: str
) -> None:
    path = f"{programs(scripts)}:{os.environ['PATH']}"
    assert call(project, "choose_torch", PATH=path).stdout == f"{expected}\n"


@pytest.mark.parametrize(
    ("scripts", "chosen"),
    [
        ({"python3.13": WORKING, "python3.11": WORKING}, "python3.13"),
        ({"python3.13": "exit 127", "python3.12": TOO_OLD, "python3.11": WORKING}, "python3.11"),
        ({"python3.12": WITHOUT_VENV, "python3": WORKING}, "python3"),
    ],
)
def test_takes_the_first_python_that_can_make_an_environment(
    project: Path, programs: Callable[[dict[str, str]], Path], scripts: dict[str, str], chosen: str
) -> None:
    folder = programs(scripts)
    assert call(project, "find_python", PATH=str(folder)).stdout == f"{folder}/{chosen}\n"


@pytest.mark.parametrize(
    ("scripts", "environment", "expected"),
    [
        ({"python3": TOO_OLD}, {}, "Python 3.11, 3.12 or 3.13 is needed and none was found"),
        ({"python3.12": WITHOUT_VENV}, {}, "python3.12 lacks the venv module"),
        ({"python3": WORKING}, {"PYTHON": "/no/python"}, "PYTHON=/no/python is not a working Python"),
    ],
)
def test_says_what_is_missing_when_no_python_will_do(
    project: Path,
    programs: Callable[[dict[str, str]], Path],
    scripts: dict[str, str],
    environment: dict[str, str],
    expected: str,
) -> None:
    done = call(project, "find_python", PATH=str(programs(scripts)), **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(expected)


def installed(project: Path, requirements: str) -> None:
    """Stamp an environment as that of these requirements."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=project, check=True)
    call(project, f"requirements=({requirements}); describe >.venv/installed")


@pytest.mark.parametrize("requirements", [SERVING, SERVICE, DEV])
def test_nothing_happens_when_all_is_installed(project: Path, requirements: str) -> None:
    installed(project, requirements)
    before = (project / ".venv" / "installed").stat().st_mtime_ns
    options: dict[str, list[list[str]]] = {
        SERVING: [[]],
        SERVICE: [[], ["--service"]],
        DEV: [[], ["--service"], ["--dev"]],
    }
    for option in options[requirements]:
        done = subprocess.run(["scripts/setup", *option], cwd=project, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (project / ".venv" / "installed").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change",
    [
        "echo tqdm==4.0.0 >>requirements.txt",
        "echo cog==0.23.2 >>requirements-cog.txt",
        "sed -i.bak 's/torch==[0-9.]*/torch==2.11.0/' cog.yaml",
        "choose_torch() { echo torch==2.13.0+other; }",
        "ln -sf /no/python .venv/bin/python",
        "rm .venv/installed",
        "requirements+=(requirements-service.txt)",
        "requirements+=(requirements-service.txt requirements-dev.txt)",
        "PYTHON=/no/python",
    ],
)
def test_a_change_of_what_it_depends_on_installs_again(project: Path, change: str) -> None:
    installed(project, SERVING)
    assert call(project, "is_current").returncode == 0
    assert call(project, f"{change}; is_current").returncode == 1


@pytest.mark.parametrize(
    ("torch", "asked"),
    [
        (f"{TORCH}+cpu", [f"install --no-deps {TORCH}+cpu", LOCKS]),
        (TORCH, [LOCKS, f"install {TORCH}"]),
    ],
)
def test_the_locks_are_installed_as_they_are_and_only_cuda_brings_more(
    project: Path, torch: str, asked: list[str]
) -> None:
    installed(project, SERVING)
    done = call(project, f'pip() {{ echo "$*"; }}; choose_torch() {{ echo {torch}; }}; install')
    assert (done.returncode, done.stdout.splitlines()) == (0, asked)


def test_without_the_cpu_build_it_fails_and_takes_no_other(project: Path) -> None:
    installed(project, SERVING)
    only_pip = project / "only_pip"
    only_pip.mkdir()
    (only_pip / "pip").symlink_to(Path(pip.__file__).parent)
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(only_pip), "PIP_CONFIG_FILE": os.devnull}
    done = call(project, f"choose_torch() {{ echo {TORCH}+cpu; }}; install", PYTHONPATH=str(only_pip), **nowhere)
    assert done.returncode == 1
    assert f"No matching distribution found for {TORCH}+cpu" in done.stderr
    assert f"{TORCH}+cpu, PyTorch without CUDA, is not to be had" in done.stderr
    assert f"{TORCH} " not in (project / ".venv" / "setup.log").read_text()


@pytest.mark.parametrize(
    ("torch", "requirements", "told"),
    [
        (
            f"{TORCH}+cpu",
            SERVING,
            "about 320 MB, less what pip has kept from before, and unpacks it in .venv: about 1.4",
        ),
        (f"{TORCH}+cpu", f"{SERVING} requirements-dev.txt", "about 630 MB"),
        (TORCH, SERVING, "about 2870 MB, less what pip has kept from before, and unpacks it in .venv: at least 5.7"),
    ],
)
@linux
def test_what_is_fetched_is_told_before(project: Path, torch: str, requirements: str, told: str) -> None:
    done = call(project, f"choose_torch() {{ echo {torch}; }}; requirements=({requirements}); announce")
    assert told in done.stderr


def test_how_far_it_is_is_told_while_it_fetches(project: Path, programs: Callable[[dict[str, str]], Path]) -> None:
    (project / ".venv").mkdir()
    slow_pip = 'head -c 3000000 /dev/zero >"$TMPDIR/wheel"; sleep 1.5; echo fetched'
    (project / ".venv/bin").symlink_to(programs({"python": slow_pip}))
    done = call(project, "sleep() { command sleep 0.1; }; pip install torch==2.13.0+cpu; cat $log; ls -A .venv")
    assert "  3 of about 190 MB\n" in done.stderr
    assert "fetched" in done.stdout
    assert "downloads" not in done.stdout


@pytest.mark.slow
def test_two_at_once_make_one_working_environment(project: Path) -> None:
    both = [subprocess.Popen(["scripts/setup"], cwd=project, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sum("Set up in" in text for text in errors) == 1
    (told,) = {found[1] for text in errors if (found := re.search(r"unpacks it in .venv: about ([0-9.]+) GB", text))}
    size = sum(file.lstat().st_size for file in (project / ".venv").rglob("*") if not file.is_symlink())
    assert abs(size / 1e9 - float(told)) < 0.3
    subprocess.run([".venv/bin/python", "-m", "pip", "check"], cwd=project, check=True)
    code = "import cog, diffusers, torch, transformers; print(torch.__version__)"
    version = subprocess.run([".venv/bin/python", "-c", code], cwd=project, check=True, capture_output=True, text=True)
    assert f"torch=={version.stdout.strip()}" == call(project, "choose_torch").stdout.strip()
