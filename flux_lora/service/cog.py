"""Cog's HTTP API, and under ``/v1`` the same as the registry's client speaks it."""

import asyncio
import base64
import re
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Depends, Header, HTTPException
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

import flux_lora
from flux_lora.errors import RequestError
from flux_lora.inputs import Interface
from flux_lora.request import Request
from flux_lora.service import checks, files
from flux_lora.service.attending import attended
from flux_lora.service.front import Front, owner_of
from flux_lora.service.jobs import BusyError
from flux_lora.service.predictions import Prediction, TakenError
from flux_lora.service.webhooks import Webhook

LONGEST_WAIT = 60
"""Seconds that ``Prefer: wait`` under ``/v1`` waits; the client asks again after that."""

SHOWN_INPUT = 2048
"""Characters of an input that are repeated in an answer; what is longer is a file."""

Owner = Depends(owner_of)
Prefer = Header(default="", description="`respond-async`, `wait` or `wait=SECONDS`; `previews` beside")
CancelAfter = Header(default="", description="Seconds that it may take, waiting included, as `90`, `90s` or `5m`")


class PredictionRequest(BaseModel):
    """What is posted; fields that the registry's clients send beside are accepted and mean nothing here."""

    model_config = ConfigDict(extra="ignore")

    input: dict[str, Any] = Field(default_factory=dict)
    id: str | None = Field(default=None, description="The prediction's id: letters, digits, - and _")
    webhook: str | None = Field(default=None, description="A public https address that is told what happens")
    webhook_events_filter: list[str] | None = Field(
        default=None, description="Which of start, output, logs and completed; by default all"
    )


class PredictionResponse(BaseModel):
    """A prediction, as it stands."""

    id: str
    model: str
    version: str
    status: str = Field(description="starting, processing, succeeded, failed or canceled")
    input: dict[str, Any]
    output: list[str] | None = Field(description="The pictures: data: URIs, or addresses of this server under https")
    error: str | None
    logs: str
    metrics: dict[str, Any]
    created_at: str
    started_at: str | None
    completed_at: str | None
    urls: dict[str, str]


def describe(prediction: Prediction, http: HttpRequest, *, addresses: bool = False) -> dict[str, Any]:
    """A prediction as JSON.

    Args:
        prediction: as it stands.
        http: who asks; addresses begin with the name that this server was asked by.
        addresses: whether pictures are given as addresses of this server, instead of in the answer itself.
    """
    done = prediction.status == "succeeded"
    pictures = prediction.pictures
    return {
        "id": prediction.id,
        "model": f"flux-lora/{prediction.request.model}",
        "version": flux_lora.__version__,
        "status": prediction.status,
        "input": {name: _shown(value) for name, value in prediction.inputs.items()},
        "output": [
            files.address(http, prediction, p) if addresses else data_uri(p.media_type, p.content) for p in pictures
        ]
        if done
        else None,
        "error": prediction.error,
        "logs": "".join(f"{line}\n" for line in prediction.lines),
        "metrics": prediction.metrics,
        "created_at": prediction.created.isoformat(),
        "started_at": prediction.started and prediction.started.isoformat(),
        "completed_at": prediction.completed and prediction.completed.isoformat(),
        "urls": {
            "get": str(http.url_for("v1_get", prediction_id=prediction.id)),
            "cancel": str(http.url_for("v1_cancel", prediction_id=prediction.id)),
        },
    }


def data_uri(media_type: str, content: bytes) -> str:
    """A file as an address that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def router(front: Front) -> APIRouter:
    """Cog's paths, and the registry's under ``/v1``."""
    routes = APIRouter(tags=["predictions"])
    answers: dict[int | str, dict[str, Any]] = {
        202: {"model": PredictionResponse, "description": "Accepted: ask for it by its id"},
        422: {"description": "An input that cannot be drawn"},
        503: {"description": "The queue is full; Retry-After says when to try again"},
    }

    async def begin(
        body: PredictionRequest, owner: str, http: HttpRequest, cancel_after: str, prediction_id: str | None = None
    ) -> Prediction:
        prediction_id = prediction_id or body.id
        try:
            seconds = _seconds(cancel_after)
            if prediction_id is not None:
                checks.check_id(prediction_id)
            webhook = await _webhook(body, front)
            inputs, notes = _known(body.input, front.interface)
            request = Request.parse(front.interface, **inputs)
        except RequestError as error:
            raise HTTPException(422, [{"loc": ["body", "input"], "msg": str(error), "type": "value_error"}]) from None
        try:
            prediction = front.predictions.start(
                request,
                owner,
                prediction_id=prediction_id,
                inputs=body.input,
                seconds=seconds,
                previews="previews" in http.headers.get("prefer", ""),
                notes=notes,
                request_id=http.state.request_id,
            )
        except TakenError as error:
            raise HTTPException(409, str(error)) from None
        except BusyError as error:
            raise HTTPException(503, str(error), {"Retry-After": str(error.retry_after)}) from None
        if webhook:
            webhook.follow(prediction, lambda: describe(prediction, http, addresses=http.url.scheme == "https"))
        return prediction

    def kept(prediction_id: str, owner: str) -> Prediction:
        if prediction := front.predictions.get(prediction_id, owner):
            return prediction
        raise HTTPException(404, f"There is no prediction {prediction_id[:64]!r}, or no more.")

    async def drawn(prediction: Prediction, http: HttpRequest, prefer: str) -> JSONResponse:
        """Cog's answer: the end of it, or how it stands when the caller does not want to wait."""
        wanted = _preference(prefer)
        ended = prediction.ended
        if wanted != 0:
            ended = await attended(front, prediction, http, wanted)
        return JSONResponse(describe(prediction, http), status_code=200 if ended else 202)

    @routes.post("/predictions", response_model=PredictionResponse, responses=answers, summary="Draw")
    async def predict(
        body: PredictionRequest,
        http: HttpRequest,
        owner: str = Owner,
        prefer: str = Prefer,
        cancel_after: str = CancelAfter,
    ) -> JSONResponse:
        return await drawn(await begin(body, owner, http, cancel_after), http, prefer)

    @routes.put(
        "/predictions/{prediction_id}", response_model=PredictionResponse, responses=answers, summary="Draw, once"
    )
    async def predict_once(
        prediction_id: str,
        body: PredictionRequest,
        http: HttpRequest,
        owner: str = Owner,
        prefer: str = Prefer,
        cancel_after: str = CancelAfter,
    ) -> JSONResponse:
        if running := front.predictions.get(prediction_id, owner):  # sent again, perhaps after a broken connection
            return await drawn(running, http, prefer)
        return await drawn(await begin(body, owner, http, cancel_after, prediction_id), http, prefer)

    @routes.get("/predictions/{prediction_id}", response_model=PredictionResponse, summary="How it stands")
    async def get(prediction_id: str, http: HttpRequest, owner: str = Owner) -> JSONResponse:
        return JSONResponse(describe(kept(prediction_id, owner), http))

    @routes.post("/predictions/{prediction_id}/cancel", summary="Cancel")
    async def cancel(prediction_id: str, owner: str = Owner) -> dict[str, Any]:
        front.predictions.cancel(kept(prediction_id, owner))
        return {}

    def shown(prediction: Prediction, http: HttpRequest, status: int = 200) -> JSONResponse:
        # The registry's client takes for files what begins with https: or data:, so plain http gets the latter.
        return JSONResponse(describe(prediction, http, addresses=http.url.scheme == "https"), status_code=status)

    @routes.post(
        "/v1/models/{whose}/{name}/predictions",
        status_code=201,
        response_model=PredictionResponse,
        responses=answers,
        summary="Draw; any model's name is this one",
    )
    @routes.post(
        "/v1/predictions", status_code=201, response_model=PredictionResponse, responses=answers, summary="Draw"
    )
    async def v1_predict(
        body: PredictionRequest,
        http: HttpRequest,
        owner: str = Owner,
        prefer: str = Prefer,
        cancel_after: str = CancelAfter,
    ) -> JSONResponse:
        prediction = await begin(body, owner, http, cancel_after)
        if "wait" in prefer:
            await prediction.wait(min(_preference(prefer) or LONGEST_WAIT, LONGEST_WAIT))
        return shown(prediction, http, 201)

    @routes.get("/v1/predictions", summary="The caller's predictions, the newest first")
    async def v1_list(http: HttpRequest, owner: str = Owner) -> JSONResponse:
        results = [describe(prediction, http, addresses=True) for prediction in front.predictions.all_of(owner)]
        return JSONResponse({"next": None, "previous": None, "results": results})

    @routes.get(
        "/v1/predictions/{prediction_id}", name="v1_get", response_model=PredictionResponse, summary="How it stands"
    )
    async def v1_get(prediction_id: str, http: HttpRequest, owner: str = Owner) -> JSONResponse:
        return shown(kept(prediction_id, owner), http)

    @routes.post(
        "/v1/predictions/{prediction_id}/cancel", name="v1_cancel", response_model=PredictionResponse, summary="Cancel"
    )
    async def v1_cancel(prediction_id: str, http: HttpRequest, owner: str = Owner) -> JSONResponse:
        prediction = kept(prediction_id, owner)
        front.predictions.cancel(prediction)
        await prediction.wait(1)
        return shown(prediction, http)

    return routes


async def _webhook(body: PredictionRequest, front: Front) -> Webhook | None:
    fields = {"webhook": body.webhook, "webhook_events_filter": body.webhook_events_filter}
    checks.check_fields({name: value for name, value in fields.items() if value is not None})
    if body.webhook is None:
        return None
    address = await asyncio.to_thread(checks.check_webhook, body.webhook, front.network)
    return Webhook(address, body.webhook_events_filter or checks.EVENTS, front.network)


def _known(inputs: Mapping[str, object], interface: Interface) -> tuple[dict[str, object], list[str]]:
    """The inputs that are ours, and a line for the log on what was left out: as Cog does, and the registry."""
    known = {name: value for name, value in inputs.items() if name in interface and value is not None}
    foreign = sorted(name for name in inputs if name not in interface)
    return known, [f"not an input of this model, and so ignored: {name[:60]}" for name in foreign[:8]]


def _shown(value: object) -> object:
    if isinstance(value, str) and len(value) > SHOWN_INPUT:
        return f"{value[:60]}… ({len(value):,} characters)"
    return value


def _preference(prefer: str) -> float | None:
    """Seconds to wait for the end: 0 for none, None for all that it takes."""
    if "respond-async" in prefer:
        return 0
    found = re.search(r"\bwait=(\d{1,6})\b", prefer)
    return float(found[1]) if found else None


def _seconds(text: str) -> float | None:
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,6})([smh]?)", text.strip())
    if not found or not int(found[1]):
        raise RequestError(f"Cancel-After must be a time such as 90, 90s or 5m, not {text[:20]!r}.")
    return int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
