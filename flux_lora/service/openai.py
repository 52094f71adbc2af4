"""OpenAI's images API, as its clients speak it: generations, and the list of models."""

import base64
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from PIL import Image
from pydantic import ValidationError

from flux_lora.errors import RequestError
from flux_lora.service import attending, files, loras, openai_edits, streams
from flux_lora.service.front import Front, owner_of
from flux_lora.service.jobs import BusyError, Kind, Step
from flux_lora.service.openai_inputs import Asked, EditRequest, ImageRequest, ModelError, Source, read
from flux_lora.service.predictions import Prediction

NOTES = "X-Flux-Notes"
"""The header that says what was ignored."""

NO_RETRY = {"x-should-retry": "false"}
"""What OpenAI's clients obey: they would ask again after most failures, and we have tried again already."""

USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
"""Clients expect it; nothing is counted here."""

EDIT_FORM: dict[str, Any] = EditRequest.model_json_schema()
"""The form of an edit: its fields, and its files."""
EDIT_FORM["properties"] |= {
    "image": {"type": "string", "format": "binary", "description": "A PNG, JPEG, WebP, GIF or AVIF of at most 32 MB"},
    "mask": {"type": "string", "format": "binary", "description": "What is transparent in it is drawn anew"},
}
EDIT_FORM["required"] += ["image"]

Owner = Depends(owner_of)


class RefusalError(Exception):
    """An answer in OpenAI's form of an error."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Take what the answer holds."""
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.content, self.status, self.headers)


FAILURES: dict[Kind | None, tuple[int, str, str | None]] = {
    "request": (400, "invalid_request_error", None),
    "adapter": (400, "invalid_request_error", "lora_not_usable"),
    "withheld": (400, "image_generation_user_error", "moderation_blocked"),
    "deadline": (504, "server_error", "deadline_exceeded"),
    "server": (500, "server_error", None),
}
"""Status, type and code of what was not drawn, by whose fault it is."""


class OpenAIRoute(APIRoute):
    """Answers in OpenAI's form what FastAPI would refuse in its own."""

    def get_route_handler(self) -> Callable[[HttpRequest], Awaitable[Response]]:  # type: ignore[override]
        """FastAPI's way to be around a route."""
        handle = super().get_route_handler()

        async def answer(http: HttpRequest) -> Response:
            try:
                return await handle(http)
            except RefusalError as refusal:
                return refusal.response()
            except RequestValidationError as error:
                return _invalid(error).response()
            except HTTPException as error:
                return RefusalError(error.status_code, str(error.detail)).response()

        return answer


def router(front: Front) -> APIRouter:
    """``/v1/images`` and ``/v1/models``."""
    routes = APIRouter(tags=["OpenAI's images API"], route_class=OpenAIRoute)

    @routes.post("/v1/images/generations", summary="Draw", response_class=Response)
    async def generate(body: ImageRequest, http: HttpRequest, owner: str = Owner) -> Response:
        return await _drawn(front, _read(body, front), http, owner, "image_generation")

    @routes.post(
        "/v1/images/edits",
        summary="Draw from an image, and within a mask",
        response_class=Response,
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": EDIT_FORM}}}},
    )
    async def edit(http: HttpRequest, owner: str = Owner) -> Response:
        if "image" not in front.interface:
            raise RefusalError(404, "This server takes no images: its operator can start it with --extended.")
        try:
            body, source = await openai_edits.read_form(http)
        except ValidationError as error:
            raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from None
        except RequestError as error:
            raise RefusalError(400, str(error), param=_field(str(error))) from None
        return await _drawn(front, _read(body, front, source), http, owner, "image_edit")

    @routes.get("/v1/models", summary="The models, and the operator's LoRAs")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": _models(front)}

    @routes.get("/v1/models/{name:path}", summary="One of them")
    async def model(name: str) -> dict[str, Any]:
        for found in _models(front):
            if found["id"] == name:
                return found
        raise RefusalError(404, f"The model {name[:60]!r} does not exist here.", code="model_not_found", param="model")

    @routes.api_route("/v1/images/{path:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
    async def nothing(path: str, http: HttpRequest) -> None:
        raise RefusalError(404, f"Invalid URL ({http.method} /v1/images/{path[:60]})")

    return routes


def _read(body: ImageRequest, front: Front, source: Source | None = None) -> Asked:
    try:
        return read(body, front.models, front.weights, front.interface, source)
    except ModelError as error:
        raise RefusalError(404, str(error), code="model_not_found", param="model") from None
    except RequestError as error:
        raise RefusalError(400, str(error), param=_field(str(error))) from None


async def _drawn(front: Front, asked: Asked, http: HttpRequest, owner: str, name: str) -> Response:
    """Draw, and answer with pictures or with events whose names begin with ``name``."""
    try:
        prediction = front.predictions.start(
            asked.request,
            owner,
            previews=asked.previews > 0,
            notes=asked.notes,
            request_id=http.state.request_id,
        )
    except BusyError as busy:
        raise _busy(busy) from None
    headers = {NOTES: "; ".join(asked.notes).encode("ascii", "replace").decode()} if asked.notes else {}
    if asked.stream:
        events = _events(front, prediction, asked, name)
        return StreamingResponse(streams.kept_alive(events), headers=headers | streams.HEADERS, media_type=streams.TYPE)
    await attending.attended(front, prediction, http, None)
    if prediction.status != "succeeded":
        raise _failure(prediction)
    data = [
        ({"url": files.address(http, prediction, p)} if asked.url else {"b64_json": _base64(p.content)})
        | {"seed": p.seed}
        for p in prediction.pictures
    ]
    said = _said(asked, prediction.pictures[0].content)
    content = {"created": int(time.time()), **said, "data": data, "usage": USAGE}
    return JSONResponse(content, headers=headers)


async def _events(front: Front, prediction: Prediction, asked: Asked, name: str) -> AsyncIterator[bytes]:
    """The stream of a drawing; whoever leaves it, ends it."""
    sent: dict[int, int] = {}  # previews by image
    try:
        async for event in prediction.follow():
            if not isinstance(event, Step) or not event.preview or event.step == event.steps:
                continue
            index = sent.get(event.image, 0)
            if index < asked.previews and event.step * (asked.previews + 1) >= event.steps * (index + 1):
                sent[event.image] = index + 1
                picture = _preview(event.preview, asked.output_format)
                about = _said(asked, picture) | {"partial_image_index": index, "image_index": event.image - 1}
                yield _event(f"{name}.partial_image", picture, about)
        if prediction.status == "succeeded":
            for p in prediction.pictures:
                index = asked.request.seeds.index(p.seed)
                about = _said(asked, p.content) | {"seed": p.seed, "image_index": index, "usage": USAGE}
                yield _event(f"{name}.completed", p.content, about)
        else:
            failure = _failure(prediction).content
            yield streams.event("error", {"type": "error", **failure})
    finally:
        front.predictions.cancel(prediction)


def _event(name: str, picture: bytes, about: dict[str, Any]) -> bytes:
    data = {"type": name, "b64_json": _base64(picture), "created_at": int(time.time()), **about}
    return streams.event(name, data)


def _said(asked: Asked, picture: bytes) -> dict[str, Any]:
    """What each answer says of a picture."""
    size = "{}x{}".format(*Image.open(io.BytesIO(picture)).size)
    return {
        "background": "opaque",
        "output_format": asked.output_format,
        "quality": asked.quality,
        "size": size,
    }


def _preview(preview: bytes, output_format: str) -> bytes:
    """A preview in the format that was asked for."""
    if output_format == "webp":
        return preview
    file = io.BytesIO()
    Image.open(io.BytesIO(preview)).save(file, output_format)
    return file.getvalue()


def _models(front: Front) -> list[dict[str, Any]]:
    """The base models, and the operator's LoRAs; ``source`` is what ``lora`` and `replicate_weights` take for one."""
    found = [_model(name, front.weights / name, "black-forest-labs") for name in front.models]
    for name, path in loras.names(front.weights).items():
        source = path.relative_to(front.weights).as_posix()
        found.append(_model(name, path, "operator") | {"source": source})
    return found


def _model(name: str, path: Path, owner: str) -> dict[str, Any]:
    changed = int(path.stat().st_mtime) if path.exists() else 0
    return {"id": name, "object": "model", "created": changed, "owned_by": owner}


def _failure(prediction: Prediction) -> RefusalError:
    if prediction.status == "canceled":
        return RefusalError(409, "It was cancelled.", "server_error", "cancelled", headers=NO_RETRY)
    status, kind, code = FAILURES[prediction.kind]
    error = prediction.error or ""
    param = {"adapter": "lora", "request": _field(error)}.get(prediction.kind or "")
    return RefusalError(status, error, kind, code, param, NO_RETRY)


def _field(error: str) -> str:
    """The field that a `RequestError` is about: its message begins with it."""
    return error.split(" ", 1)[0]


def _busy(error: BusyError) -> RefusalError:
    headers = {"Retry-After": str(error.retry_after)}
    if error.of_owner:
        return RefusalError(429, str(error), "rate_limit_error", "rate_limit_exceeded", headers=headers)
    return RefusalError(503, str(error), "server_error", "server_overloaded", headers=headers)


def _invalid(error: RequestValidationError) -> RefusalError:
    """What is wrong with the fields, in one sentence for each."""
    problems, names = [], []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"][1:])
        names.append(name)
        match problem["type"]:
            case "json_invalid":
                return RefusalError(400, "The body is not JSON.")
            case "extra_forbidden":
                known = ", ".join(ImageRequest.model_fields)
                problems.append(f"{name[:60]} is not a field of this API; its fields are {known}")
            case "missing":
                problems.append(f"{name or 'a JSON object as the body'} is required")
            case _:
                shown = json.dumps(problem.get("input"), default=str)[:60]
                problems.append(f"{name or 'the body'}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, not {shown}")
    unknown = any(problem["type"] == "extra_forbidden" for problem in error.errors())
    return RefusalError(
        400, "; ".join(problems) + ".", code="unknown_parameter" if unknown else None, param=names[0] or None
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
