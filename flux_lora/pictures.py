"""The image and the mask that a request brings along: fetched, checked, decoded, and scaled to what is drawn."""

import hashlib

from PIL import Image

from flux_lora.drawing.opening import fitted_size, read_image, read_mask
from flux_lora.drawing.source import Given, SourceImage
from flux_lora.errors import RequestError, SourceError
from flux_lora.ledger import Log
from flux_lora.request import Request
from flux_lora.sources import Sources

MAX_BYTES = 32 * 10**6
"""Of an image's file, and of a mask's."""


class Pictures:
    """Reads what requests name as ``image`` and ``mask``; of nobody's files anything is kept.

    Args:
        sources: the way to addresses, guarded.
    """

    def __init__(self, sources: Sources) -> None:
        """Take what fetches."""
        self._sources = sources

    def read(self, request: Request, log: Log) -> Given | None:
        """Fetch, check, decode and scale them; None: the request starts from noise.

        Args:
            request: what is asked.
            log: receives a line for whatever is scaled.

        Raises:
            RequestError: a file cannot be had, or is no picture that can be used.
        """
        files = self.files(request)
        if "image" not in files:
            return None
        image = read_image(files["image"], "image")
        size = fitted_size(image.size, quarter=request.megapixels == "0.25")
        mask = read_mask(files["mask"]) if "mask" in files else None
        if mask and mask.size != image.size:
            log(f"mask: scaled from {_text(mask.size)} to the image's {_text(image.size)}")
        if size != image.size:
            log(f"image: scaled from {_text(image.size)} to {_text(size)}")
        digests = {name: hashlib.sha256(file).hexdigest() for name, file in files.items()}
        return Given(
            source=SourceImage(
                pixels=image.resize(size, Image.Resampling.LANCZOS),
                mask=mask and mask.resize(size, Image.Resampling.NEAREST),
                strength=request.prompt_strength,
            ),
            image_digest=digests["image"],
            mask_digest=digests.get("mask"),
            image_file=files["image"],
        )

    def files(self, request: Request) -> dict[str, bytes]:
        """Fetch the files that a request names, by the names of their inputs.

        Raises:
            RequestError: one cannot be had.
        """
        named = {"image": request.image, "mask": request.mask}
        return {name: self._file(name, source) for name, source in named.items() if source}

    def _file(self, name: str, source: str) -> bytes:
        try:
            return self._sources.read(source, MAX_BYTES)
        except SourceError as error:
            raise RequestError(f"{name} cannot be read: {error}.") from None


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
