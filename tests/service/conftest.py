"""One replica in this process, and a server before it, for the tests of a whole session."""

from collections.abc import Iterator

import pytest

from tests.conftest import MINI
from tests.service.local import LocalReplica, local_front, serving


@pytest.fixture(scope="session")
def replica() -> Iterator[LocalReplica]:
    made = LocalReplica("local", MINI)
    yield made
    made.studio.close()


@pytest.fixture(scope="module")
def address(replica: LocalReplica) -> Iterator[str]:
    """Of a server that is open to all."""
    with serving(local_front([replica])) as url:
        yield url
