"""A minute of ``scripts/bench soak`` on the server that the other tests use; all of it takes an hour."""

from collections.abc import Callable

import psutil
import pytest

from benchmarks import soak
from tests.conftest import MINI
from tests.server.conftest import Server


@pytest.fixture
def target(server: Server) -> soak.Target:
    port = int(server.url.rpartition(":")[2])
    (listening,) = (
        each.pid
        for each in psutil.net_connections("tcp")
        if each.laddr.port == port and each.status == "LISTEN" and each.pid
    )
    worker = max(psutil.Process(listening).children(), key=lambda each: each.memory_info().rss)
    return soak.Target(server.url, server.temporary, worker)


@pytest.mark.parametrize(
    "stage",
    [
        lambda target, piece: soak.fuzz(target, 8, seed=piece),
        lambda target, piece: soak.hostile_sources(target, MINI / "lora.safetensors", 6, seed=piece),
        lambda target, piece: soak.cancels(target, 2, seed=piece),
    ],
    ids=["fuzz", "hostile sources", "cancels"],
)
def test_nothing_that_one_request_does_hurts_the_next(
    target: soak.Target, stage: Callable[[soak.Target, int], None]
) -> None:
    soak.flat(target, lambda piece: stage(target, piece), pieces=4)


def test_what_grows_is_said(target: soak.Target) -> None:
    def leave_files(piece: int) -> None:
        for k in range(5):
            (target.temporary / f"{piece}-{k}").touch()

    with pytest.raises(soak.SoakError, match="files grow"):
        soak.flat(target, leave_files, pieces=8)
    for path in target.temporary.glob("[0-9]-[0-9]"):
        path.unlink()
