"""The application as Ray Serve runs it: one front, and a replica for each GPU."""

import asyncio
import socket
from collections.abc import Mapping
from typing import Any

import uvicorn
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from flux_lora.inputs import DOCUMENTED, EXTENDED
from flux_lora.request import MODELS
from flux_lora.service import access
from flux_lora.service.app import make_app
from flux_lora.service.backlog import Backlog
from flux_lora.service.cluster import DRAWING
from flux_lora.service.dispatcher import Dispatcher
from flux_lora.service.front import Front
from flux_lora.service.logs import Log
from flux_lora.service.metrics import Metrics
from flux_lora.service.predictions import Predictions
from flux_lora.service.replica import Drawing, RayFleet
from flux_lora.settings import Settings
from flux_lora.sources.guard import Network

HEALTH_SECONDS = 5
"""Between two questions of Ray's after a replica's health."""

GRACE_SECONDS = 2
"""That a replica gets to end what it does, when the service ends."""


class Ingress:
    """The front in an actor of Ray Serve's. There is one: it alone knows who waits."""

    def __init__(
        self,
        settings: Settings,
        keys: tuple[str, ...],
        local: bool,
        listen: tuple[str, int] | None,
        log: Log,
        drawing: "DeploymentHandle[Any]",
    ) -> None:
        """Take what `application` binds."""
        metrics = Metrics()
        share = settings.queue_limit_per_key if keys else settings.queue_limit  # without keys all callers are one
        backlog = Backlog(settings.queue_limit, share, settings.queue_overtaking)
        backend = Dispatcher(RayFleet(drawing), backlog, metrics, log, look_ahead=settings.max_replicas is not None)
        self._front = Front(
            predictions=Predictions(
                backend,
                deadline=settings.request_deadline,
                keep_seconds=settings.result_seconds,
                keep_bytes=settings.result_bytes,
            ),
            backend=backend,
            metrics=metrics,
            network=Network(),
            models=tuple(model for model in MODELS if (settings.weights / model).is_dir()) or MODELS,
            weights=settings.weights,
            log=log,
            interface=EXTENDED if settings.extended else DOCUMENTED,
        )
        self._keys = keys
        self._local = local
        self._listen = listen
        self._server: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve calls after the constructor, for the application to serve."""
        app = make_app(self._front, self._keys, local=self._local)
        if self._listen:
            self._server = asyncio.create_task(_serve(app, *self._listen))
        return app

    async def check_health(self) -> None:
        """Ray asks from time to time, and replaces a front that does not listen any more."""
        if self._server and self._server.done():
            raise RuntimeError("the server of the front has ended")


async def _serve(app: FastAPI, host: str, port: int) -> None:
    """Listen in this process: Ray's proxy is another one, and each request would cross between them four times."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=2048) as listener:
        await uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).serve([listener])


def application(
    settings: Settings,
    keys: tuple[str, ...],
    *,
    local: bool,
    log: Log,
    cpus: float,
    gpus: float,
    listen: tuple[str, int] | None = None,
) -> Application:
    """Bind the front and its replicas.

    Args:
        settings: the operator's.
        keys: that callers may use; empty: nobody needs one.
        local: whether it is served on loopback.
        log: where the lines of all processes go.
        cpus: cores of each replica, which Ray also makes the number of its threads.
        gpus: of each replica.
        listen: address and port on which the front itself answers; None: Ray's proxies do, on every machine.
    """
    replicas = settings.replicas or 1
    scale: dict[str, Any] = {"num_replicas": replicas}
    if settings.max_replicas is not None:
        most = max(replicas, settings.max_replicas)
        scale = {"autoscaling_config": {"min_replicas": replicas, "max_replicas": most, "target_ongoing_requests": 1}}
    drawing = serve.deployment(
        name=DRAWING,
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=GRACE_SECONDS,
        max_constructor_retry_count=2,
        # The front asks for a replica when it believes one to be free: it is worth asking again soon.
        request_router_config={"initial_backoff_s": 0.005, "backoff_multiplier": 2, "max_backoff_s": 0.05},
        **scale,
    )
    front = serve.deployment(
        name="Front",
        max_ongoing_requests=100_000,  # the backlog bounds what waits
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=GRACE_SECONDS,
    )
    replica = drawing(Drawing).bind(settings, log)
    return front(serve.ingress()(Ingress)).bind(settings, keys, local, listen, log, replica)


def build(arguments: Mapping[str, Any]) -> Application:
    """The application of a Serve config (``deploy/serve.yaml``), with the settings of the cluster's environment.

    Args:
        arguments: ``open: true`` lets everybody ask; else ``FLUX_API_KEYS`` must name keys. ``gpus`` and ``cpus`` of
            each replica, 1 each by default.
    """
    settings = Settings.from_environment()
    keys = access.keys_of(settings, "this cluster", open_to_all=bool(arguments.get("open")))
    return application(
        settings,
        keys,
        local=False,
        log=Log(json=settings.json_log),
        cpus=float(arguments.get("cpus", 1)),
        gpus=float(arguments.get("gpus", 1)),
    )
