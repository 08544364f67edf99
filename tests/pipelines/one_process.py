"""The oracle of the distributed build: the same stages, one after the other, in this process, without Ray."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cluster import stream
from pipelines.build import BuildResult, build
from pipelines.config import load_config
from tests.pipelines.build_corpus import IN_PROCESS, SMALL_UNITS


def build_in_one_process(
    monkeypatch: pytest.MonkeyPatch, sources: Sequence[str], root: str, *settings: str, fresh: bool = False
) -> BuildResult:
    """A build of small units whose stages run in this process; reading is tried again without a pause."""
    monkeypatch.setattr(stream, "READ_BACKOFF_S", 0.0)
    return build(sources, root, load_config(None, [*SMALL_UNITS, IN_PROCESS, *settings]), fresh=fresh)
