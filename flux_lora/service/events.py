"""What happens to a prediction, as server-sent events; the page follows them."""

import base64
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Depends, HTTPException
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse

from flux_lora.service import cog, streams
from flux_lora.service.front import Front, owner_of
from flux_lora.service.jobs import Event, Line, Started, Step, Waiting
from flux_lora.service.predictions import Prediction

DESCRIPTION = (
    "Events from the first on: `waiting` (position), `started`, `line` (text), `step` (image, images, step, steps, and "
    "preview, a data: URI, for a prediction that was posted with `Prefer: previews`), and at last `end` (the "
    "prediction, its pictures as addresses). Whoever stops reading does not end the drawing."
)


def router(front: Front) -> APIRouter:
    """``/predictions/{id}/events``."""
    routes = APIRouter(tags=["predictions"])

    @routes.get(
        "/predictions/{prediction_id}/events",
        summary="Follow it",
        description=DESCRIPTION,
        response_class=StreamingResponse,
        responses={200: {"content": {streams.TYPE: {}}}},
    )
    async def follow(prediction_id: str, http: HttpRequest, owner: str = Depends(owner_of)) -> StreamingResponse:
        prediction = front.predictions.get(prediction_id, owner)
        if prediction is None:
            raise HTTPException(404, f"There is no prediction {prediction_id[:64]!r}, or no more.")
        events = streams.kept_alive(_events(prediction, http))
        return StreamingResponse(events, media_type=streams.TYPE, headers=streams.HEADERS)

    return routes


async def _events(prediction: Prediction, http: HttpRequest) -> AsyncIterator[bytes]:
    async for event in prediction.follow():
        if told := _told(event):
            yield streams.event(*told)
    yield streams.event("end", cog.describe(prediction, http, addresses=True))


def _told(event: Event) -> tuple[str, dict[str, Any]] | None:
    match event:
        case Waiting(position):
            return "waiting", {"position": position}
        case Started():
            return "started", {}
        case Line(text):
            return "line", {"text": text}
        case Step(image, images, step, steps, preview):
            shown = f"data:image/webp;base64,{base64.b64encode(preview).decode()}" if preview else None
            return "step", {"image": image, "images": images, "step": step, "steps": steps, "preview": shown}
    return None
