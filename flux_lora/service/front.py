"""What all parts of the HTTP application share, and what they have in common."""

from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request as HttpRequest

from flux_lora.inputs import DOCUMENTED, Interface
from flux_lora.service.jobs import Backend
from flux_lora.service.logs import Log
from flux_lora.service.metrics import Metrics
from flux_lora.service.predictions import Predictions
from flux_lora.sources.guard import Network


@dataclass(frozen=True)
class Front:
    """The parts of one front."""

    predictions: Predictions
    backend: Backend
    metrics: Metrics
    network: Network
    """The way to webhooks."""
    models: tuple[str, ...]
    """Which base models are served."""
    weights: Path
    """The weights directory; LoRAs of its ``loras/`` can be asked for by name."""
    log: Log
    interface: Interface = field(default_factory=lambda: DOCUMENTED)
    """Whose inputs are taken; the extended one has an image and a mask."""


async def owner_of(http: HttpRequest) -> str:
    """Whose an HTTP request is, as `Access` found out; a dependency of routes.

    A coroutine, for FastAPI calls what is none on another thread.
    """
    owner: str = http.state.owner
    return owner
