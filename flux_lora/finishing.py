"""Latents -> decoded -> checked -> a file, on threads beside the one that draws the next image."""

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flux_lora.beside import Beside
from flux_lora.drawing import safety
from flux_lora.drawing.image import decode
from flux_lora.drawing.inpainting import paste
from flux_lora.drawing.pipeline import Pipeline
from flux_lora.drawing.source import Given
from flux_lora.files import outputs
from flux_lora.files.record import Parameters
from flux_lora.files.signing import Signer
from flux_lora.ledger import Finished, Stopwatch


@dataclass(frozen=True)
class Drawn:
    """An image as latents, and what is to become of it."""

    latents: Tensor
    """(1, C, h, w) as the VAE decodes them."""
    parameters: Parameters
    """What drew it; they give the size and the format."""
    path: Path
    """Where its file is to be."""
    check: bool
    """Whether the safety checker decides if it may leave."""
    in_strips: bool
    """Whether it is decoded in strips, which takes less memory."""
    given: Given | None = None
    """What it was drawn from, of which its mask keeps a part; None: noise alone."""


class Finisher:
    """Decodes, checks and saves images, one after the other."""

    def __init__(self, beside: Beside, checker: safety.Checker, *, embed: bool, signer: Signer | None = None) -> None:
        """Take the parts.

        Args:
            beside: the thread that images are finished on.
            checker: scores images.
            embed: whether prompt and parameters go into the files.
            signer: adds content credentials to each file; a picture that it cannot sign is not written.
        """
        self.checker = checker
        self._beside = beside
        self._encoding = Beside("encode")
        self._embed = embed
        self._signer = signer

    def submit(self, pipeline: Pipeline, image: Drawn) -> Future[Finished]:
        """Finish an image beside."""
        return self._beside.submit(self._finish, pipeline, image)

    def _finish(self, pipeline: Pipeline, image: Drawn) -> Finished:
        watch, parameters = Stopwatch(), image.parameters
        source = image.given.source if image.given else None
        with watch.timed("decode"):
            picture = decode(pipeline, image.latents, (parameters.width, parameters.height), image.in_strips)
            if source and source.mask:
                picture = paste(picture, source.pixels, source.mask)
        content = self._encoding.submit(
            outputs.encode,
            picture,
            parameters,
            embed=self._embed,
            signer=self._signer,
            source=image.given.image_file if image.given else None,
        )
        if image.check:
            with watch.timed("safety"):
                verdict = safety.judge(self.checker, picture)
            if not verdict.allowed:
                return Finished(parameters.seed, None, verdict.reason, watch.seconds)
        with watch.timed("save"):
            outputs.write(content.result(), image.path)
        return Finished(parameters.seed, image.path, "", watch.seconds)
