"""The form of OpenAI's edits: its fields, an image, and a mask whose transparent part is drawn anew."""

import asyncio
import base64
import io

from fastapi import Request as HttpRequest
from PIL import Image
from starlette.datastructures import UploadFile

from flux_lora.drawing.opening import FORMATS, MAX_PIXELS, UNREADABLE
from flux_lora.errors import RequestError
from flux_lora.pictures import MAX_BYTES
from flux_lora.service.openai_inputs import EditRequest, Source

FILES = ("image", "image[]", "mask")
"""The names that OpenAI's clients send files by; the second when there are several."""


async def read_form(http: HttpRequest) -> tuple[EditRequest, Source]:
    """Read the form of an edit.

    Raises:
        RequestError: its files cannot be used.
        ValidationError: its fields cannot.
    """
    async with http.form(max_files=4, max_fields=64) as form:
        files = {name: form.getlist(name) for name in FILES}
        fields = {name: value for name, value in form.multi_items() if name not in FILES}
        images, masks = files["image"] + files["image[]"], files["mask"]
        if len(images) != 1:
            raise RequestError(f"image must be one file, not {len(images)}.")
        image = await _content(images[0], "image")
        mask = await _content(masks[0], "mask") if masks else None
    body = EditRequest.model_validate(fields)
    transparent = await asyncio.to_thread(_transparent, image if mask is None else mask)
    if transparent is None and mask is not None:
        transparent = mask  # black and white, as our own masks are
    return body, Source(_data(image), _data(transparent) if transparent else None)


async def _content(file: UploadFile | str, name: str) -> bytes:
    if isinstance(file, str):
        raise RequestError(f"{name} must be a file.")
    if (file.size or 0) > MAX_BYTES:
        raise RequestError(f"{name} has more than {MAX_BYTES // 10**6} MB.")
    return await file.read()


def _transparent(data: bytes) -> bytes | None:
    """Where a picture is wholly transparent, as a PNG that is white there and black elsewhere; None: nowhere."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS or not image.has_transparency_data:
                return None
            alpha = image.convert("RGBA").getchannel("A")
    except (*UNREADABLE, Image.DecompressionBombError):
        return None  # what draws it says what is wrong with it
    if alpha.getextrema()[0]:
        return None
    file = io.BytesIO()
    alpha.point(lambda value: 0 if value else 255).save(file, "png")
    return file.getvalue()


def _data(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"
