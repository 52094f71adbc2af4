"""``scripts/service`` before it starts anything, and the config of ``deploy/``."""

import signal
from collections.abc import Iterator
from importlib import import_module

import pytest
import yaml
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from flux_lora.commands import service
from flux_lora.service.cluster import reason
from tests.conftest import MINI, ROOT
from tests.server.conftest import free_port


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """The command's handlers are for its own process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        (["--host", "0.0.0.0"], {}, "Name keys for its callers in FLUX_API_KEYS, or say --open"),
        (["--host", "192.0.2.1"], {}, "cannot be listened on"),
        ([], {"FLUX_API_KEYS": "short"}, "FLUX_API_KEYS holds a key that could be guessed"),
        ([], {"FLUX_API_KEY": "a-key-of-sixteen-letters"}, "Did you mean FLUX_API_KEYS?"),
        ([], {"FLUX_DEVICE": "cuda:1"}, "choose with CUDA_VISIBLE_DEVICES"),
        ([], {"FLUX_REPLICAS": "0"}, "FLUX_REPLICAS=0"),
        ([], {"RAY_ADDRESS": "127.0.0.1:1"}, "no Ray cluster answers there"),
        ([], {"RAY_ADDRESS": "nonsense"}, "name a cluster as HOST:PORT"),
        ([], {"RAY_ADDRESS": "http://127.0.0.1:8265"}, "name a cluster as HOST:PORT"),
    ],
)
def test_it_refuses_to_start(
    options: list[str],
    environment: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"FLUX_WEIGHTS": str(MINI), **environment}.items():
        monkeypatch.setenv(name, value)
    assert service.main(["--port", str(free_port()), *options]) == 1
    assert said in capsys.readouterr().err


def test_of_what_ray_says_our_own_sentence_is_shown() -> None:
    message = (
        'The deployment failed to start 2 times in a row.\n  File "replica.py", line 1\nRuntimeError: Traceback:\n'
        "flux_lora.errors.WeightsError: weights holds no base model. Fetch one.\n"
    )
    assert reason(message) == "weights holds no base model. Fetch one."
    assert reason("not enough CPUs") == "not enough CPUs"


def test_the_serve_config_is_one_that_ray_takes() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    module, _, name = application.import_path.partition(":")
    build = getattr(import_module(module), name)
    assert isinstance(build(application.args | {"open": True}), Application)
