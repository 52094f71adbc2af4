"""Whether it is ready, and what was counted."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from flux_lora.service.front import Front
from flux_lora.service.metrics import MEDIA_TYPE


def router(front: Front) -> APIRouter:
    """``/health`` (200, or 503 while nothing can be drawn), Cog's ``/health-check``, and ``/metrics``."""
    routes = APIRouter(tags=["operating"])

    @routes.get("/health", summary="Whether pictures can be drawn", responses={503: {"description": "Not now"}})
    async def health() -> JSONResponse:
        state = front.backend.state()
        status = "ready" if state.replicas else "starting"
        content = {"status": status, "replicas": state.replicas, "waiting": state.waiting, "running": state.running}
        return JSONResponse(content, status_code=200 if state.replicas else 503)

    @routes.get("/health-check", summary="The same in Cog's words, always 200")
    async def health_check() -> dict[str, str]:
        state = front.backend.state()
        return {"status": "READY" if state.replicas else "STARTING"}

    @routes.get("/metrics", summary="Counters, in Prometheus's text form")
    async def metrics() -> Response:
        return Response(front.metrics.text(front.backend.state()), media_type=MEDIA_TYPE)

    return routes
