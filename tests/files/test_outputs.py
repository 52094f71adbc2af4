"""Files and the directories they lie in."""

import base64
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from PIL import Image, ImageChops, ImageStat

from flux_lora.errors import OutputError
from flux_lora.files import outputs, provenance
from flux_lora.files.record import Environment, Parameters, Software
from tests.conftest import ROOT

SOFTWARE = Software(flux_lora="0.1.0", torch="2", diffusers="0", transformers="5", pillow="13")
PICTURE = Image.effect_mandelbrot((128, 96), (-2, -1.5, 1, 1.5), 50).convert("RGB")


def parameters(output_format: str = "webp", quality: int | None = 80, prompt: str = "a tomato") -> Parameters:
    return Parameters(
        prompt=prompt,
        seed=7,
        width=PICTURE.width,
        height=PICTURE.height,
        model="schnell",
        num_inference_steps=4,
        guidance_scale=None,
        output_format=output_format,
        output_quality=quality,
        environment=Environment(base="0", device="cpu", dtype="float32", software=SOFTWARE),
    )


def encoded(path: Path, output_format: str, quality: int | None) -> Image.Image:
    outputs.write(outputs.encode(PICTURE, parameters(output_format, quality), embed=False), path)
    with Image.open(path) as image:
        image.load()
    return image


def error(image: Image.Image) -> float:
    return sum(ImageStat.Stat(ImageChops.difference(image, PICTURE)).mean)


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


# Files


@pytest.mark.parametrize("output_format", ["webp", "jpg"])
def test_quality_is_obeyed_from_0_to_100(tmp_path: Path, output_format: str) -> None:
    path = tmp_path / "x"
    errors, sizes = [], []
    for quality in (0, 40, 80, 100):
        errors.append(error(encoded(path, output_format, quality)))
        sizes.append(path.stat().st_size)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1] > 0
    assert sizes == sorted(sizes)


def test_png_is_lossless(tmp_path: Path) -> None:
    assert error(encoded(tmp_path / "x", "png", None)) == 0


@pytest.mark.parametrize("quality", [90, 95, 100])
@pytest.mark.parametrize("output_format", ["webp", "jpg", "png"])
def test_noise_is_written_at_any_quality(tmp_path: Path, output_format: str, quality: int) -> None:
    """A LoRA at a wild scale draws it. Its JPEG is larger than the room that Pillow keeps for one that it optimizes."""
    random = Random(7)
    noise = Image.frombytes("RGB", (256, 256), random.randbytes(3 * 256 * 256))
    given = parameters(output_format, None if output_format == "png" else quality)
    outputs.write(outputs.encode(noise, given, embed=True), tmp_path / "x")
    with Image.open(tmp_path / "x") as image:
        image.load()
        assert image.size == noise.size
    assert provenance.read(tmp_path / "x") == given


@pytest.mark.parametrize("method", [None, 0, 2, 4])
def test_a_webp_is_encoded_by_the_method_of_its_record(tmp_path: Path, method: int | None) -> None:
    """A record that names none is of before there was a choice, and Pillow's own default was taken."""
    fields = parameters().model_dump(mode="json")
    del fields["webp_method"]
    given = Parameters.model_validate(fields | ({} if method is None else {"webp_method": method}))
    outputs.write(outputs.encode(PICTURE, given, embed=False), tmp_path / "ours")
    PICTURE.save(tmp_path / "theirs", "WEBP", quality=80, **({} if method is None else {"method": method}))
    ours, theirs = (Image.open(tmp_path / name).tobytes() for name in ("ours", "theirs"))
    assert ours == theirs


@pytest.mark.parametrize(("output_format", "name"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_the_file_is_what_was_asked_for(tmp_path: Path, output_format: str, name: str) -> None:
    image = encoded(tmp_path / "x", output_format, 80)
    assert (image.format, image.size, image.mode) == (name, PICTURE.size, "RGB")


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("output_format", ["webp", "jpg", "png"])
def test_a_file_is_a_function_of_its_parameters(tmp_path: Path, output_format: str, embed: bool) -> None:
    for turn, name in enumerate(("0-seed7", "3-seed7")):
        with pytest.MonkeyPatch.context() as clock:
            clock.setattr(time, "time", lambda turn=turn: 1e9 + turn)
            outputs.write(outputs.encode(PICTURE, parameters(output_format), embed=embed), tmp_path / name)
    outputs.write(
        outputs.encode(PICTURE, parameters(output_format, prompt="a potato"), embed=embed), tmp_path / "other"
    )
    first, second, other = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert first == second
    assert (first == other) is not embed


def test_names_carry_index_and_seed() -> None:
    assert outputs.file_name(2, 2**63 - 1, "jpg") == "2-seed9223372036854775807.jpg"


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "0-seed7.webp").mkdir()  # the last step, the renaming, fails
    with pytest.raises(OutputError, match=r"0-seed7\.webp could not be written: Is a directory"):
        outputs.write(outputs.encode(PICTURE, parameters(), embed=True), tmp_path / "0-seed7.webp")
    assert [path.name for path in tmp_path.iterdir()] == ["0-seed7.webp"]


# Directories


@pytest.fixture
def files(tmp_path: Path) -> Iterator[outputs.Outputs]:
    made = outputs.Outputs(tmp_path)
    yield made
    made.close()
    assert not list(tmp_path.iterdir())


def test_files_stay_until_the_next_prediction_starts(files: outputs.Outputs) -> None:
    first = files.start()
    (first / "0-seed7.webp").write_bytes(b"x")
    files.require([first / "0-seed7.webp"])
    second = files.start()
    assert second != first
    assert second.is_dir()
    assert not first.exists()


def test_two_servers_do_not_disturb_each_other(files: outputs.Outputs, tmp_path: Path) -> None:
    directory = files.start()
    other = outputs.Outputs(tmp_path)
    other.start()
    other.close()
    assert directory.is_dir()


def test_a_lost_file_is_an_error(files: outputs.Outputs) -> None:
    directory = files.start()
    (directory / "0-seed7.webp").touch()
    for name in ("0-seed7.webp", "1-seed8.webp"):
        with pytest.raises(OutputError, match=f"{name} was written and is gone"):
            files.require([directory / name])


def test_a_straggling_worker_leaves_nothing(files: outputs.Outputs, tmp_path: Path) -> None:
    stop = threading.Event()
    current: list[Path] = [files.start()]
    refused: list[OutputError] = []

    def work() -> None:
        index = 0
        while not stop.is_set():
            index += 1
            try:
                outputs.write(outputs.encode(PICTURE, parameters(), embed=True), current[0] / f"{index}.webp")
            except OutputError as error:
                refused.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in range(20):
        time.sleep(0.02)
        files.discard()
        assert not current[0].exists()
        current[0] = files.start()
    files.discard()
    stop.set()
    for worker in workers:
        worker.join()
    assert refused
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nothing_can_be_written_where_files_are_being_removed(
    files: outputs.Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or who writes faster than files are removed would keep the removal busy for ever."""
    directory, removals = files.start(), []
    remove = shutil.rmtree

    def checked(path: Path, **options: Any) -> None:
        removals.append(path)
        with pytest.raises(FileNotFoundError):
            (directory / "late").write_bytes(b"x")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", checked)
    files.discard()
    assert removals


class Cancelled(BaseException):
    """What Cog raises in a prediction's thread, by the same function of Python's C interface."""


def cancel(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Cancelled))


@pytest.mark.parametrize("milliseconds", [delay / 10 for delay in range(30)])
def test_cancelling_leaves_nothing_wherever_it_lands(files: outputs.Outputs, milliseconds: float) -> None:
    begun = threading.Event()

    def predict() -> None:
        with suppress(Cancelled):
            try:
                begun.set()
                directory = files.start()
                for index in range(50):
                    (directory / str(index)).write_bytes(b"x")
                while True:
                    time.sleep(0.001)
            except BaseException:
                files.discard()
                raise

    thread = threading.Thread(target=predict)
    thread.start()
    begun.wait()
    time.sleep(milliseconds / 1000)
    assert thread.ident
    cancel(thread.ident)
    thread.join()
    assert not list(files.home.iterdir())


def test_more_cancels_do_not_stop_the_removal(files: outputs.Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    more = iter(range(3))
    remove = shutil.rmtree

    def cancelled_removal(*arguments: Any, **options: Any) -> None:
        if next(more, None) is not None:
            cancel(threading.get_ident())
        remove(*arguments, **options)

    (files.start() / "0-seed7.webp").write_bytes(b"x")
    monkeypatch.setattr(shutil, "rmtree", cancelled_removal)
    with pytest.raises(Cancelled):
        files.discard()
    assert next(more, None) is None
    assert not list(files.home.iterdir())


OWNER = """
import sys, time
from pathlib import Path
from flux_lora.files.outputs import Outputs
files = Outputs(Path(sys.argv[1]))
(files.start() / "0-seed7.webp").write_bytes(b"x")
print("ready", flush=True)
time.sleep(float(sys.argv[2]))
"""


def owner(directory: Path, seconds: float) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, directory, str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize(
    "end",
    [
        lambda process: process.wait(),
        lambda process: process.terminate(),
        lambda process: process.kill(),
        lambda process: os.killpg(process.pid, signal.SIGINT),
        lambda process: os.killpg(process.pid, signal.SIGTERM),
        lambda process: os.killpg(process.pid, signal.SIGKILL),
    ],
    ids=["exit", "SIGTERM", "SIGKILL", "group SIGINT", "group SIGTERM", "group SIGKILL"],
)
def test_nothing_stays_however_the_process_ends(tmp_path: Path, end: Callable[[subprocess.Popen[bytes]], None]) -> None:
    process = owner(tmp_path, 0.1 if end.__code__.co_names == ("wait",) else 60)
    end(process)
    process.wait()
    assert process.stdout
    process.stdout.close()
    assert eventually(lambda: not list(tmp_path.iterdir()))


def test_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    dead, mine = tmp_path / "flux-lora-outputs-abcd_123", tmp_path / "flux-lora-outputs-of-my-own"
    for directory in (dead, mine):
        directory.mkdir()
        (directory / "0-seed7.webp").write_bytes(b"x")
    link = tmp_path / "flux-lora-outputs-linked12"
    link.symlink_to(mine)
    outputs.Outputs(tmp_path).close()
    assert sorted(tmp_path.iterdir()) == [link, mine]
    assert list(mine.iterdir())


def test_a_place_without_room_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"No directory for images can be made in .*/missing: No such file"):
        outputs.Outputs(tmp_path / "missing")


def test_a_home_that_was_cleaned_away_is_made_again(tmp_path: Path) -> None:
    first, second = outputs.Outputs(tmp_path), outputs.Outputs(tmp_path)
    shutil.rmtree(first.home)
    (first.start() / "picture").touch()
    outputs.Outputs(tmp_path).close()  # sweeps what has no living owner
    assert (first.home / "..").resolve() == tmp_path
    assert list(first.home.rglob("picture"))
    first.close()
    second.close()
    assert list(tmp_path.iterdir()) == []


RUNNER = """
from cog import BaseRunner, Path
from flux_lora.files.outputs import Outputs

class Predictor(BaseRunner):
    def setup(self) -> None:
        self.outputs = Outputs()

    def run(self) -> list[Path]:
        directory = self.outputs.start()
        for index in range(2):
            (directory / f"{index}.webp").write_bytes(b"image %d" % index)
        return [Path(path) for path in sorted(directory.iterdir())]
"""


@pytest.mark.parametrize("end", [lambda server: os.killpg(server.pid, signal.SIGTERM), lambda server: server.kill()])
def test_cog_reads_the_files_and_nothing_stays_when_it_ends(
    tmp_path: Path, end: Callable[[subprocess.Popen[bytes]], None]
) -> None:
    (tmp_path / "runner.py").write_text(RUNNER)
    (temporary := tmp_path / "tmp").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "COG_PREDICT_TYPE_STUB": "runner.py:Predictor",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PORT": str(port),
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(temporary),
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "cog.server.http"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

            def ready() -> bool:
                with suppress(httpx.TransportError):
                    return bool(client.get("/health-check").json()["status"] == "READY")
                return False

            def output() -> list[str]:
                while (answer := client.post("/predictions", json={"input": {}})).status_code == 409:
                    time.sleep(0.05)  # Cog answers a little before it is free again
                return list(answer.json()["output"])

            assert eventually(ready, 30)
            for _ in range(2):
                assert [base64.b64decode(uri.partition(",")[2]) for uri in output()] == [b"image 0", b"image 1"]
        assert len(list(temporary.glob("flux-lora-outputs-*/*"))) == 1
    finally:
        end(server)
        server.wait()
    assert eventually(lambda: not list(temporary.glob("flux-lora-*")))
