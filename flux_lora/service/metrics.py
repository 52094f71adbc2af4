"""What the operator counts, in Prometheus's text form."""

from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from flux_lora.ledger import STAGES
from flux_lora.service import jobs
from flux_lora.service.jobs import Failed, Finished, State, Usage

MEDIA_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Bounds of histograms."""


class Metrics:
    """Counters of one front; a registry of their own, so that two in one process are two."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("flux_lora_requests", "Requests by how they ended", ["outcome"], registry=registry)
        self._retries = Counter("flux_lora_retries", "Requests whose replica died, tried again", registry=registry)
        self._images = Counter("flux_lora_images", "Images given out", registry=registry)
        self._withheld = Counter("flux_lora_withheld", "Images that the safety checker withheld", registry=registry)
        self._merges = Counter("flux_lora_merges", "Times a transformer's adapters changed", registry=registry)
        self._waits = self._histogram("flux_lora_waiting_seconds", "Seconds in the queue")
        self._draws = self._histogram("flux_lora_drawing_seconds", "Seconds with a replica")
        self._stages = Histogram(
            "flux_lora_stage_seconds", "Seconds by stage", ["stage"], buckets=SECONDS, registry=registry
        )
        self._gpu = Gauge(
            "flux_lora_gpu_bytes", "GPU memory that a replica's process holds", ["replica"], registry=registry
        )
        self._state = {
            name: Gauge(f"flux_lora_{name}", help_text, registry=registry)
            for name, help_text in (
                ("replicas", "Replicas that are ready"),
                ("waiting", "Requests in the queue"),
                ("running", "Requests that are being drawn"),
            )
        }
        for outcome in ("succeeded", "cancelled", "refused", "request", "adapter", "withheld", "deadline", "server"):
            self._requests.labels(outcome)

    def refused(self) -> None:
        """The queue was full."""
        self._requests.labels("refused").inc()

    def retried(self) -> None:
        """A replica died, and its job waits again."""
        self._retries.inc()

    def lost(self, replica: str) -> None:
        """A replica died."""
        with suppress(KeyError):
            self._gpu.remove(replica)

    def used(self, replica: str, usage: Usage) -> None:
        """What a replica did for a job."""
        self._merges.inc(usage.merges)
        self._gpu.labels(replica).set(usage.gpu_bytes)

    def ended(self, end: jobs.End, waited: float, drew: float) -> None:
        """A job has ended, after seconds of waiting and of drawing."""
        self._waits.observe(waited)
        if drew:
            self._draws.observe(drew)
        match end:
            case Finished(metrics=metrics):
                outcome = "succeeded"
            case Failed(kind=kind, metrics=metrics):
                outcome = kind
            case _:
                outcome, metrics = "cancelled", {}
        self._requests.labels(outcome).inc()
        self._images.inc(_number(metrics.get("images")))
        withheld = metrics.get("withheld_seeds")
        self._withheld.inc(len(withheld) if isinstance(withheld, list) else 0)
        for stage in STAGES:
            if (name := f"{stage}_seconds") in metrics:
                self._stages.labels(stage).observe(_number(metrics[name]))

    def text(self, state: State) -> bytes:
        """All of it, as Prometheus reads it."""
        for name, gauge in self._state.items():
            gauge.set(getattr(state, name))
        return generate_latest(self._registry)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, buckets=SECONDS, registry=self._registry)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
