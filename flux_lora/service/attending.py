"""Waiting for a prediction as long as its caller does."""

import asyncio

from fastapi import Request as HttpRequest

from flux_lora.service.front import Front
from flux_lora.service.predictions import Prediction


async def attended(front: Front, prediction: Prediction, http: HttpRequest, seconds: float | None) -> bool:
    """Wait for the end, at most some seconds; a caller who hangs up ends it."""
    waiting = asyncio.ensure_future(prediction.wait(seconds))
    leaving = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait([waiting, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            front.predictions.cancel(prediction)
            await waiting
        return waiting.result()
    except asyncio.CancelledError:
        front.predictions.cancel(prediction)
        raise
    finally:
        leaving.cancel()
        waiting.cancel()


async def _gone(http: HttpRequest) -> None:
    """Return when the caller has hung up."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
