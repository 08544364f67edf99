"""The cluster of several nodes that the tests of jobs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.ray_nodes import RayNodes


@pytest.fixture(scope="session")
def ray_nodes(s3: str) -> Iterator[RayNodes]:
    """A head without slots for work; tests say which nodes they want (`only`). All see the local S3 server and its keys."""
    nodes = RayNodes()
    try:
        yield nodes
    finally:
        nodes.close()
