"""What one prediction does to the next: nothing. Over HTTP, with the bytes of the files as witnesses."""

import http.server
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import MINI
from tests.server.conftest import CLIENT, SMALL, Server, content, open_image, serving, wait_for

LONG = {"prompt": "a long one", "seed": 1, "num_inference_steps": 50, "num_outputs": 4, "aspect_ratio": "21:9"}
WITNESS: dict[str, Any] = {"prompt": "a witness", "seed": 7, **SMALL, "num_inference_steps": 1}


def test_four_images_are_four_single_ones(server: Server) -> None:
    """For every format: byte for byte, metadata included."""
    for name in ("webp", "jpg", "png"):
        inputs = {"prompt": "a tomato", "output_format": name, **SMALL}
        together = server.draw(seed=40, num_outputs=4, **inputs)
        alone = [server.draw(seed=40 + k, **inputs)[0] for k in range(4)]
        assert together == alone
        assert len(set(together)) == 4


def test_scale_model_and_prompt_all_reach_the_picture(server: Server) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"lora_scale": 0},
        {"lora_scale": 0.5},
        {"lora_scale": -1},
        {"model": "schnell"},
    ]
    variants += [{"guidance_scale": 1}, {"prompt": "another"}, {"seed": 8}, {"num_inference_steps": 3}]
    pixels = [open_image(server.draw(**WITNESS | {"output_format": "png"} | v)[0]).tobytes() for v in variants]
    assert len(set(pixels)) == len(variants)


def test_a_changed_scale_takes_effect_at_once_and_changes_back(server: Server) -> None:
    first = {scale: server.draw(**WITNESS, lora_scale=scale) for scale in (1, 0, 0.3, 2)}
    for scale in (0.3, 1, 2, 0):
        assert server.draw(**WITNESS, lora_scale=scale) == first[scale]


@pytest.fixture(scope="module")
def equipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server of its own weights directory, and that directory, to put LoRAs into."""
    folder = tmp_path_factory.mktemp("equipped")
    weights = Path(shutil.copytree(MINI, folder / "weights"))
    (folder / "server").mkdir()
    server = serving(folder / "server", FLUX_WEIGHTS=str(weights), FLUX_ALLOW_DISABLE_SAFETY_CHECKER="0")
    with server as running:
        yield running, weights


def test_a_lora_of_the_weights_directory_is_used_for_one_request(equipped: tuple[Server, Path]) -> None:
    server, weights = equipped
    tensors = {name: tensor * 2 for name, tensor in load_file(weights / "lora.safetensors").items()}
    save_file(tensors, weights / "other.safetensors")
    bundled = server.draw(**WITNESS)
    other = server.draw(**WITNESS, replicate_weights="other.safetensors")
    assert other != bundled
    assert server.draw(**WITNESS) == bundled
    assert server.draw(**WITNESS, replicate_weights="other.safetensors") == other


def test_what_the_operator_forbids_is_refused_by_name(equipped: tuple[Server, Path]) -> None:
    server, _ = equipped
    answer = server.predict(**WITNESS, disable_safety_checker=True)
    assert answer["status"] == "failed"
    assert "disable_safety_checker is not allowed on this server" in answer["error"]


Tensors = dict[str, torch.Tensor]


def _nan(tensors: Tensors) -> Tensors:
    first = next(iter(tensors))
    return tensors | {first: torch.full_like(tensors[first], float("nan"))}


BAD_TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "wrong-shapes": lambda tensors: {name: torch.zeros(8, 8) for name in tensors},
    "nan": _nan,
    "unknown-keys": lambda tensors: tensors | {"what.is.this": torch.zeros(1)},
    "of-sdxl": lambda _: {
        f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_{part}.weight": torch.zeros(shape)
        for part, shape in (("down", (4, 640)), ("up", (640, 4)))
    },
}


@pytest.mark.parametrize("case", ["missing", "truncated", "text", *BAD_TENSORS])
def test_a_bad_lora_fails_its_own_request_only(equipped: tuple[Server, Path], case: str) -> None:
    server, weights = equipped
    before = server.draw(**WITNESS)
    good, path = weights / "lora.safetensors", weights / f"{case}.safetensors"
    if case == "truncated":
        path.write_bytes(good.read_bytes()[:-10])
    elif case == "text":
        path.write_text("<html>not here</html>")
    elif case in BAD_TENSORS:
        save_file(BAD_TENSORS[case](load_file(good)), path)
    answer = server.predict(**WITNESS, replicate_weights=path.name)
    assert answer["status"] == "failed"
    assert path.name in answer["error"]
    assert "Traceback" not in answer["error"]
    assert server.draw(**WITNESS) == before


def test_a_second_request_gets_409_and_the_first_is_not_disturbed(server: Server) -> None:
    alone = server.draw(**WITNESS, num_outputs=2)
    longer = WITNESS | {"num_inference_steps": 10, "num_outputs": 2}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(server.draw, **longer)
        statuses = []
        while not first.done():
            statuses.append(
                CLIENT.post(f"{server.url}/predictions", json={"input": {"prompt": "no"} | SMALL}).status_code
            )
            time.sleep(0.02)
        assert 409 in statuses
    assert first.result() == server.draw(**longer)
    assert server.draw(**WITNESS, num_outputs=2) == alone


@pytest.mark.parametrize("delay", [0.05, 0.6, 1.5])
def test_a_cancelled_prediction_leaves_nothing_behind(server: Server, delay: float) -> None:
    before = server.draw(**WITNESS)
    wait_for(lambda: CLIENT.get(f"{server.url}/health-check").json()["status"] == "READY", 20)  # Cog answers first
    started = CLIENT.put(
        f"{server.url}/predictions/cancelled-{delay}",
        json={"input": LONG | {"lora_scale": 0.1 + delay}},
        headers={"Prefer": "respond-async"},
    )
    assert started.status_code == 202
    time.sleep(delay)
    assert CLIENT.post(f"{server.url}/predictions/cancelled-{delay}/cancel").status_code == 200
    wait_for(lambda: CLIENT.get(f"{server.url}/health-check").json()["status"] == "READY", 20)
    wait_for(lambda: not server.leftovers(), 10)
    assert server.draw(**WITNESS) == before


def test_files_go_when_the_next_prediction_starts(server: Server) -> None:
    server.draw(**WITNESS, num_outputs=4)
    assert len(server.leftovers()) == 4
    server.draw(**WITNESS)
    assert len(server.leftovers()) == 1


class Uploads(http.server.BaseHTTPRequestHandler):
    received: list[tuple[str, bytes]]

    def do_PUT(self) -> None:
        if "0-seed" in self.path:
            time.sleep(1.5)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.path, body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that withholds all pictures that it checks, and uploads the others."""
    Uploads.received = []
    receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Uploads)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    options = "--upload-url", f"http://127.0.0.1:{receiver.server_port}/files/"
    try:
        with serving(tmp_path_factory.mktemp("strict"), *options, FLUX_SAFETY_THRESHOLD="0") as running:
            yield running
    finally:
        receiver.shutdown()


def test_withheld_images_are_named(strict: Server) -> None:
    answer = strict.predict(**WITNESS, num_outputs=2)
    assert answer["status"] == "failed"
    assert "7, 8" in answer["error"]
    assert "another" in answer["error"]
    assert answer["metrics"]["withheld_seeds"] == [7, 8]
    assert strict.leftovers() == []
    assert Uploads.received == []


def test_uploads_outlast_a_slow_receiver(strict: Server, server: Server) -> None:
    unchecked = WITNESS | {"num_outputs": 3, "disable_safety_checker": True}
    answer = strict.predict(**unchecked)
    assert answer["status"] == "succeeded"
    expected = {f"{k}-seed{7 + k}.webp": data for k, data in enumerate(server.draw(**unchecked))}
    uploaded = {path.rsplit("/", 1)[1]: data for path, data in Uploads.received}
    assert uploaded == expected
    named = [uri.rsplit("/", 1)[1] for uri in answer["output"]]
    assert named != sorted(expected)  # the first is taken slowly: Cog lists them as the uploads end
    assert sorted(named) == sorted(expected)


def test_the_output_is_a_list_of_uris_in_the_order_of_the_seeds(server: Server) -> None:
    answer = server.predict(**WITNESS, num_outputs=3)
    assert [content(uri) for uri in answer["output"]] == [server.draw(**WITNESS | {"seed": 7 + k})[0] for k in range(3)]
