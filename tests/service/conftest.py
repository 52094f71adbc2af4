"""One replica in this process, and a server before it, for the tests of a whole session."""

from collections.abc import Iterator

import pytest

from flux_lora.service.previews import Previews
from flux_lora.settings import Settings
from tests.conftest import MINI
from tests.service.local import LocalReplica, local_front, serving
from tests.sources.internet import Internet


@pytest.fixture(scope="session")
def replica() -> Iterator[LocalReplica]:
    made = LocalReplica("local", Settings(weights=MINI), Previews())
    yield made
    made.studio.close()


@pytest.fixture(scope="session")
def internet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Internet]:
    with Internet(tmp_path_factory.mktemp("ca") / "ca.pem").running() as running:
        yield running


@pytest.fixture(scope="module")
def address(replica: LocalReplica) -> Iterator[str]:
    """Of a server that is open to all."""
    with serving(local_front([replica])) as url:
        yield url
