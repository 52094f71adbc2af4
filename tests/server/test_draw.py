"""``scripts/draw`` against a real server."""

from pathlib import Path

import pytest

from flux_lora.commands import draw
from tests.server.conftest import Server, open_image

SMALL = ["-i", "aspect_ratio=custom", "-i", "width=256", "-i", "height=256", "-i", "num_inference_steps=1"]


@pytest.mark.parametrize("output_format", ["webp", "jpg", "png"])
def test_the_pictures_are_written_and_named(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], output_format: str
) -> None:
    asked = ["-i", "prompt=a tomato", "-i", "seed=7", "-i", "num_outputs=2", "-i", f"output_format={output_format}"]
    assert draw.main([server.url, *asked, *SMALL, "-o", str(tmp_path)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.suffix for path in paths] == [f".{output_format}"] * 2
    assert all(open_image(path.read_bytes()).size == (256, 256) for path in paths)


def test_what_the_server_refuses_is_said(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw.main([server.url, "-i", "prompt=a", "-i", "num_outputs=9"]) == 1
    assert "num_outputs" in capsys.readouterr().err
    assert draw.main([server.url, "-i", "prompt=a", "-i", "aspect_ratio=custom"]) == 1
    assert "needs width and height" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "said"), [("127.0.0.1:5000", "give it as http"), ("http://127.0.0.1:9", "cannot be reached")]
)
def test_an_address_without_a_server_is_said(address: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw.main([address, "-i", "prompt=a"]) == 1
    assert said in capsys.readouterr().err
