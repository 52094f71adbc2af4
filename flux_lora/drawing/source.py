"""The picture that a request starts from, as what draws takes it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

from flux_lora.drawing.inpainting import is_white
from flux_lora.drawing.schedule import steps_run
from flux_lora.request import Request


@dataclass(frozen=True)
class SourceImage:
    """The picture that a request starts from, oriented and scaled to the size that is drawn."""

    pixels: Image.Image
    """RGB, exactly the size of the result."""
    mask: Image.Image | None
    """Mode "L" or "1", of the same size: what is drawn anew is white (128 and above); None: all of it."""
    strength: float
    """Share of the noise schedule that is run, 0…1: 1 forgets the picture."""


@dataclass(frozen=True)
class Given:
    """A source image, and the files that it was read from."""

    source: SourceImage
    image_digest: str
    """SHA-256 of the image's file as it arrived."""
    mask_digest: str | None
    """The same of the mask's; None: there is no mask."""
    image_file: bytes
    """The image's file as it arrived, whose content credentials go into the new one."""

    def seen(self, steps: int) -> "Given | None":
        """What of it can change the picture that is drawn in ``steps`` steps of a schedule; None: nothing.

        A mask that is white throughout keeps nothing; and where all steps are run, they begin with noise alone.
        """
        mask = self.source.mask
        if mask is None or is_white(mask):
            if steps_run(steps, self.source.strength) == steps:
                return None
            return replace(self, source=replace(self.source, mask=None), mask_digest=None)
        return self


class Pictures(Protocol):
    """Reads the image and mask that a request names."""

    def read(self, request: Request, log: Callable[[str], None]) -> Given | None:
        """Fetch, check, decode and scale them; None: the request starts from noise.

        Args:
            request: what is asked.
            log: receives one readable line at a time.

        Raises:
            FluxLoraError: a file cannot be had, or is no picture that can be used.
        """
