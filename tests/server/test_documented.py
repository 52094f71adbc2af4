"""The examples of docs/inputs.md, run as they stand but for the address, and for fewer and smaller steps."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flux_lora.commands import draw
from tests.conftest import ROOT
from tests.server.conftest import Server, open_image

SECTION = (ROOT / "docs/inputs.md").read_text().partition("## Over HTTP")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
ADDRESS = "http://127.0.0.1:5000"
QUICK = '"seed": 7, "num_inference_steps": 1'


@pytest.mark.parametrize("example", EXAMPLES, ids=["httpx", "replicate"])
def test_an_example_draws(server: Server, tmp_path: Path, example: str) -> None:
    assert ADDRESS in example
    assert '"seed": 7' in example
    code = example.replace(ADDRESS, server.url).replace('"seed": 7', QUICK)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    (picture,) = tmp_path.iterdir()
    assert picture.name == "tomato-0.webp"
    assert open_image(picture.read_bytes()).size == (1024, 1024)


def test_the_command_draws(server: Server, tmp_path: Path) -> None:
    (command,) = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
    name, *arguments = shlex.split(command.replace(ADDRESS, server.url))
    assert (ROOT / name).is_file()
    assert draw.main([*arguments, "-i", "num_inference_steps=1", "-o", str(tmp_path)]) == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_cog_server_refuses_reaches_replicates_client_as_its_error(server: Server, tmp_path: Path) -> None:
    example = EXAMPLES[1].replace(ADDRESS, server.url).replace('"seed": 7', '"num_outputs": 9')
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert "ReplicateError" in done.stderr
    assert "422" in done.stderr


def test_replicates_client_by_itself_finds_no_cog_server(server: Server, tmp_path: Path) -> None:
    example = EXAMPLES[1].replace(ADDRESS, server.url).replace(", transport=ToCog()", "")
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert "404" in done.stderr
