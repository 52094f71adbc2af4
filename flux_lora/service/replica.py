"""A replica: a generator in an actor of Ray Serve's, and how the front reaches all of them."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from flux_lora.assembly import assemble
from flux_lora.service.dispatcher import LostError
from flux_lora.service.drawing import Studio
from flux_lora.service.jobs import Event, Job, Started, Usage
from flux_lora.service.logs import Log
from flux_lora.service.previews import Previews
from flux_lora.settings import Settings

GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
"""What Ray raises where a replica is no more."""

BATCH_SECONDS = 0.1
"""That an event may wait for others: each transfer between processes takes a millisecond or two of both."""

COUNT_SECONDS = 5.0
"""How old the number of replicas may be: Ray takes 25 ms of this process, and as much of its own, to say it."""

CHANGING_COUNT_SECONDS = 1.0
"""The same while there is none, or one has died lately."""

CHANGE_SECONDS = 60.0
"""That replacing one takes, most often."""


class Drawing:
    """Holds a generator, and draws one job after the other."""

    def __init__(self, settings: Settings, log: Log) -> None:
        """Load everything.

        Raises:
            FluxLoraError: set-up is impossible.
        """
        self._name = name = serve.get_replica_context().replica_id.unique_id
        self._studio = Studio(
            lambda line: assemble(settings, settings.cog_weights, line),
            lambda text, job: log(text, replica=name, request=job),
            Previews(),
        )

    @serve.multiplexed(max_num_models_per_replica=1)  # type: ignore[untyped-decorator]  # Ray's decorator is untyped
    async def hold(self, group: str) -> str:
        """Let Ray know which group's weights are here from now on; drawing brings them."""
        return group

    async def draw(self, job: Job) -> AsyncGenerator[list[Event | Usage], None]:
        """Draw a job; its events come in batches, from `Started` to its end."""
        yield [Started(self._name)]
        await self.hold(job.group)
        try:
            async with aclosing(self._studio.batches(job, BATCH_SECONDS)) as batches:
                async for batch in batches:
                    yield batch
        except Exception:
            # A GPU that has failed once does not recover in this process. Ray starts another one when this one ends.
            if not await self._healthy():
                os.kill(os.getpid(), signal.SIGKILL)
            raise

    async def check_health(self) -> None:
        """Ray asks from time to time, and replaces a replica whose device fails."""
        if not await self._healthy():
            raise RuntimeError("the device does not compute any more")

    async def _healthy(self) -> bool:
        return await asyncio.to_thread(self._studio.generator.healthy)


class RayFleet:
    """All replicas of a deployment."""

    def __init__(self, handle: "DeploymentHandle[Any]") -> None:
        """Take Ray's handle of the deployment."""
        self._handle = handle.options(stream=True)
        self._count = 0
        self._counted = 0.0
        self._counting: asyncio.Task[None] | None = None
        self._last_death = float("-inf")

    async def draw(self, job: Job, *, choose: bool) -> AsyncGenerator[Event | Usage, None]:
        """Wait until a replica is free, and have it draw a job. Closing the iterator ends either.

        Args:
            job: to draw.
            choose: whether one that holds the job's weights is preferred, and for a second waited for.

        Returns:
            `Started` when it begins, then what happens; the last event is its end.

        Raises:
            LostError: the replica died.
        """
        handle = self._handle.options(multiplexed_model_id=job.group) if choose else self._handle
        response = handle.draw.remote(job)
        batches = cast("DeploymentResponseGenerator[list[Event | Usage]]", response)  # as stream=True has it
        try:
            async for batch in batches:
                for event in batch:
                    yield event
        except GONE as error:
            self._last_death = time.monotonic()
            raise LostError from error
        finally:
            # Nothing happens when it has ended.
            batches.cancel()  # type: ignore[no-untyped-call]  # Ray's method is untyped

    def size(self) -> int:
        """How many are ready to draw, or draw; asked of Ray now and then."""
        now = time.monotonic()
        changing = not self._count or now - self._last_death < CHANGE_SECONDS
        old = CHANGING_COUNT_SECONDS if changing else COUNT_SECONDS
        if self._counting is None and now - self._counted > old:
            self._counting = asyncio.get_running_loop().create_task(self._ask())
        return self._count

    async def _ask(self) -> None:
        try:
            status = await asyncio.to_thread(serve.status)
            deployment = status.applications[self._handle.app_name].deployments[self._handle.deployment_name]
            self._count = sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")
        except (KeyError, RayActorError):  # Ray's controller is being restarted
            pass
        finally:
            self._counted, self._counting = time.monotonic(), None
