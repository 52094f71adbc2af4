"""The downloads against a local server that speaks the Hub's protocol, through huggingface_hub's own client."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from huggingface_hub import constants
from pydantic import SecretStr
from safetensors.numpy import save_file

from flux_lora.checkpoint import download
from flux_lora.commands import PROJECT, download_weights
from flux_lora.errors import WeightsError
from flux_lora.settings import Settings

DEV, SCHNELL, SAFETY = (download.REPOSITORIES[name][0] for name in ("dev", "schnell", "safety"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"

OWN = {
    "LICENSE.md": b"terms",
    "scheduler/scheduler_config.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": os.urandom(300_000),
    SHARD: os.urandom(2_000_000),
    "transformer/diffusion_pytorch_model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors", "b": SHARD.split("/")[1]}}
    ).encode(),
}
SHARED = {
    "model_index.json": b'{"_class_name": "FluxPipeline"}',
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors": os.urandom(50_000),
    "text_encoder_2/config.json": b"{}",
    "text_encoder_2/model.safetensors": os.urandom(60_000),
    "tokenizer/merges.txt": b"#version: 0.2\n",
    "tokenizer/tokenizer_config.json": b"{}",
    "tokenizer/vocab.json": b"{}",
    "tokenizer_2/tokenizer.json": b"{}",
    "tokenizer_2/tokenizer_config.json": b"{}",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": os.urandom(40_000),
}
UNUSED = {
    ".gitattributes": b"",
    "README.md": b"# FLUX.1",
    "ae.safetensors": os.urandom(1000),
    "flux1-dev.safetensors": os.urandom(1000),
    "dev_grid.jpg": b"",
    "text_encoder/pytorch_model.bin": b"",
    "tokenizer_2/spiece.model": b"",
    "vae/old/config.json": b"",
}
CHECKER = {"config.json": b"{}", "preprocessor_config.json": b"{}", "model.safetensors": os.urandom(5000)}

REPOSITORIES = {
    DEV: OWN | SHARED | UNUSED,
    SCHNELL: OWN | SHARED | UNUSED,
    SAFETY: CHECKER | {"model.onnx": b"", "optimizer.pt": b"", "pytorch_model.bin": b"", "README.md": b""},
}

Asked = namedtuple("Asked", "path range token")


class Hub(ThreadingHTTPServer):
    """The routes of the Hub that are used: a model's listing, and files, large ones redirected to another host."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[Asked] = []
        self.gate: tuple[int, str] | None = None  # status and error code of a refusal
        self.damaged = False
        self.break_off = 0  # after so many bytes of a large file, and then no more of it

    def files_asked(self) -> list[Asked]:
        return [request for request in self.asked if not request.path.startswith("/api/")]


class HubHandler(BaseHTTPRequestHandler):
    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def do_GET(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        hub.asked.append(Asked(path, self.headers["Range"], self.headers["Authorization"]))
        if listing := re.fullmatch(r"/api/models/(\S+/\S+)", path):
            siblings = [_sibling(name, content) for name, content in REPOSITORIES[listing[1]].items()]
            self._answer(200, json.dumps({"id": listing[1], "sha": COMMIT, "siblings": siblings}).encode())
        elif file := re.fullmatch(rf"/(\w[^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            content = REPOSITORIES[file[1]][file[2]]
            if hub.gate:
                status, code = hub.gate
                self._answer(status, headers={"X-Error-Code": code})
            elif file[2].endswith(".safetensors"):
                self._answer(302, headers={"Location": f"http://localhost:{hub.server_port}/cdn{path}"})
            else:
                self._answer(200, content)
        elif large := re.fullmatch(rf"/cdn/(\w[^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            self._large_file(REPOSITORIES[large[1]][large[2]])

    def _large_file(self, content: bytes) -> None:
        (start,) = map(int, re.findall(r"^bytes=(\d+)-$", self.headers["Range"] or "bytes=0-"))
        if self.hub.break_off and len(content) > self.hub.break_off:
            if start:
                return self._answer(503)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: self.hub.break_off])
            self.close_connection = True
            return None
        if self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        return self._answer(206 if start else 200, content[start:], headers)

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _sibling(name: str, content: bytes) -> dict[str, object]:
    entry = {
        "rfilename": name,
        "size": len(content),
        "blobId": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
    }
    if name.endswith(".safetensors"):
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def small_chunks_and_no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64 * 1024)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "FLUX_WEIGHTS", "FLUX_DOWNLOAD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(weights=tmp_path / "weights")


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fetches_exactly_the_files_that_are_used(hub: Hub, settings: Settings) -> None:
    download.fetch(settings, ["dev", "safety"], endpoint=hub.endpoint)
    assert files_below(settings.weights / "dev") == OWN | SHARED
    assert files_below(settings.weights / "safety_checker") == CHECKER


@pytest.mark.parametrize(
    ("before", "names", "expected"),
    [
        ([], ["schnell"], OWN | SHARED),
        ([], ["schnell", "dev"], OWN),
        (["dev"], ["schnell"], OWN),
    ],
)
def test_schnell_alone_is_complete_and_beside_dev_only_what_differs(
    hub: Hub, settings: Settings, before: list[str], names: list[str], expected: dict[str, bytes]
) -> None:
    if before:
        download.fetch(settings, before, endpoint=hub.endpoint)
    download.fetch(settings, names, endpoint=hub.endpoint)
    assert files_below(settings.weights / "schnell") == expected


def test_a_second_call_asks_for_no_file(hub: Hub, settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    download.fetch(settings, ["dev"], endpoint=hub.endpoint)
    hub.asked.clear()
    download.fetch(settings, ["dev"], endpoint=hub.endpoint)
    assert hub.asked
    assert not hub.files_asked()
    assert "already complete" in capsys.readouterr().out


def test_goes_on_where_it_was_broken_off_and_marks_the_pipeline_complete_last(hub: Hub, settings: Settings) -> None:
    hub.break_off = 1_000_000
    with pytest.raises(WeightsError, match="status 503.*the same command goes on from there"):
        download.fetch(settings, ["dev"], endpoint=hub.endpoint)
    assert not (settings.weights / "dev" / "model_index.json").exists()
    assert not (settings.weights / "dev" / SHARD).exists()
    hub.break_off = 0
    hub.asked.clear()
    download.fetch(settings, ["dev"], endpoint=hub.endpoint)
    (again,) = (request for request in hub.files_asked() if request.path.startswith("/cdn") and SHARD in request.path)
    assert 1_000_000 - 64 * 1024 <= int(again.range.removeprefix("bytes=").removesuffix("-")) <= 1_000_000
    assert files_below(settings.weights / "dev") == OWN | SHARED


def test_the_unfinished_file_of_another_version_is_dropped(hub: Hub, settings: Settings) -> None:
    stale = settings.weights / "dev" / f"{SHARD}.ffffffffffff.part"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another version")
    download.fetch(settings, ["dev"], endpoint=hub.endpoint)
    assert files_below(settings.weights / "dev") == OWN | SHARED


def test_a_truncated_file_is_fetched_again(hub: Hub, settings: Settings) -> None:
    download.fetch(settings, ["dev"], endpoint=hub.endpoint)
    file = settings.weights / "dev" / SHARD
    file.write_bytes(file.read_bytes()[:-1])
    download.fetch(settings, ["dev"], endpoint=hub.endpoint)
    assert file.read_bytes() == OWN[SHARD]


def test_a_file_that_arrives_damaged_is_refused_and_not_kept(hub: Hub, settings: Settings) -> None:
    hub.damaged = True
    with pytest.raises(WeightsError, match="model.safetensors arrived damaged"):
        download.fetch(settings, ["safety"], endpoint=hub.endpoint)
    assert "model.safetensors" not in files_below(settings.weights / "safety_checker")
    hub.damaged = False
    download.fetch(settings, ["safety"], endpoint=hub.endpoint)
    assert files_below(settings.weights / "safety_checker") == CHECKER


@pytest.mark.parametrize(
    ("token", "gate", "expected"),
    [
        (None, (401, "GatedRepo"), "licence.*HF_TOKEN is not set"),
        ("hf_abc", (403, "GatedRepo"), "licence.*your account has not accepted it"),
        ("hf_abc", (401, "InvalidToken"), "set HF_TOKEN to a valid token"),
    ],
)
def test_no_access_says_where_to_get_it(
    hub: Hub, settings: Settings, token: str | None, gate: tuple[int, str], expected: str
) -> None:
    hub.gate = gate
    settings = settings.model_copy(update={"hf_token": token and SecretStr(token)})
    with pytest.raises(WeightsError, match=expected) as refusal:
        download.fetch(settings, ["dev"], endpoint=hub.endpoint)
    assert f"{hub.endpoint}/{DEV}" in str(refusal.value)
    assert "hf_abc" not in str(refusal.value)


def test_the_token_goes_to_the_hub_and_to_no_other_host(hub: Hub, settings: Settings) -> None:
    settings = settings.model_copy(update={"hf_token": SecretStr("hf_abc")})
    download.fetch(settings, ["safety"], endpoint=hub.endpoint)
    tokens = {request.path.startswith("/cdn"): request.token for request in hub.asked}
    assert tokens == {False: "Bearer hf_abc", True: None}


def test_too_small_a_disk_is_refused_with_the_numbers_before_any_file(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.weights.mkdir()
    needed = sum(map(len, (OWN | SHARED).values()))
    monkeypatch.setattr(download, "free_bytes", lambda _: needed - 1)
    with pytest.raises(WeightsError, match=r"2\.5 MB are still to fetch .* has 2\.5 MB to spare"):
        download.fetch(settings, ["dev"], endpoint=hub.endpoint)
    assert not hub.files_asked()
    monkeypatch.setattr(download, "free_bytes", lambda _: needed)
    download.fetch(settings, ["dev"], endpoint=hub.endpoint)


def test_without_a_network_it_says_so(settings: Settings) -> None:
    with pytest.raises(WeightsError, match=r"http://127\.0\.0\.1:9 cannot be reached .* Check the network"):
        download.fetch(settings, ["dev"], endpoint="http://127.0.0.1:9")


def test_two_at_once_fetch_each_file_once(hub: Hub, settings: Settings) -> None:
    threads = [
        threading.Thread(target=download.fetch, args=(settings, ["dev"]), kwargs={"endpoint": hub.endpoint})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files_below(settings.weights / "dev") == OWN | SHARED
    assert sum(SHARD in request.path for request in hub.asked if request.path.startswith("/cdn")) == 1


def test_set_up_opens_no_connection_where_the_models_are_present(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    download.fetch(settings, ["dev", "schnell"], endpoint=hub.endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    download.fetch_base(settings)
    (settings.weights / "schnell" / SHARD).unlink()
    with pytest.raises(WeightsError, match="cannot be reached"):
        download.fetch_base(settings)


def test_set_up_fetches_what_is_missing_and_draws(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX_DOWNLOAD from nothing to a picture: the Hub has the miniature in dev's place."""
    mini = PROJECT / "weights" / "mini" / "dev"
    content = {str(path.relative_to(mini)): path.read_bytes() for path in mini.rglob("*") if path.is_file()}
    monkeypatch.setitem(REPOSITORIES, DEV, content)
    small = ("aspect_ratio=custom", "width=256", "height=256", "num_inference_steps=1", "seed=7", "prompt=a tomato")
    done = run_script(
        *(word for value in small for word in ("-i", value)),
        *("-o", str(tmp_path / "picture.webp")),
        command="predict",
        FLUX_WEIGHTS=str(tmp_path / "weights"),
        FLUX_DOWNLOAD="dev",
        HF_ENDPOINT=hub.endpoint,
    )
    assert done.returncode == 0, done.stderr
    assert "base model alone" in done.stderr
    assert (tmp_path / "picture.0.webp").stat().st_size > 1000


def run_script(
    *arguments: str, command: str = "download_weights", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"flux_lora.commands.{command}", *arguments],
        cwd=PROJECT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_the_script_fetches_into_the_weights_directory(hub: Hub, tmp_path: Path) -> None:
    done = run_script("safety", FLUX_WEIGHTS=str(tmp_path), HF_ENDPOINT=hub.endpoint)
    assert (done.returncode, files_below(tmp_path / "safety_checker")) == (0, CHECKER)
    assert f"safety: 3 files, 0.0 MB, in {tmp_path}/safety_checker" in done.stdout
    assert "100%" in done.stderr


def test_the_script_fails_with_one_sentence(hub: Hub, tmp_path: Path) -> None:
    hub.gate = (401, "GatedRepo")
    done = run_script("dev", FLUX_WEIGHTS=str(tmp_path), HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {DEV} asks you to accept its licence first")
    assert "Traceback" not in done.stderr


def test_without_arguments_the_script_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert download_weights.main([]) == 2
    assert "scripts/download_weights dev schnell safety" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from flux_lora.commands import download_weights, serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_lora_becomes_the_fine_tune_and_names_the_one_it_replaces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLUX_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("FLUX_ADAPTER_CACHE", str(tmp_path / "cache"))
    digests = []
    for value in (1, 2):
        file = tmp_path / f"{value}.safetensors"
        save_file({"lora": np.full(3, value, np.float32)}, file)
        digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
        assert download_weights.main(["--lora", str(file)]) == 0
        assert (tmp_path / "weights" / "lora.safetensors").read_bytes() == file.read_bytes()
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(digests[0])
    assert f"{digests[1]}, in place of the one with SHA-256 {digests[0]}" in second


def test_a_lora_that_cannot_be_had_leaves_the_fine_tune_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLUX_WEIGHTS", str(tmp_path))
    (tmp_path / "lora.safetensors").write_bytes(b"the fine-tune")
    assert download_weights.main(["--lora", str(tmp_path / "missing.safetensors")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert (tmp_path / "lora.safetensors").read_bytes() == b"the fine-tune"
