"""The oracle of the distributed build: the same stages, one after the other, in this process, without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest

from cluster import stream
from cluster.session import Session
from cluster.stream import PieceResult, StreamJob
from operators.sources.pieces import Piece
from pipelines import build as build_module
from pipelines.build import BuildResult, build
from pipelines.config import load_config
from tests.pipelines.build_corpus import SMALL_UNITS

_encoders: dict[StreamJob, Any] = {}


def stream_in_turn(job: StreamJob, pieces: Sequence[Piece], *args: Any, **kwargs: Any) -> Iterator[PieceResult]:
    """`stream_pieces` without Ray."""
    for piece in pieces:
        line = _through_all_stages(job, piece).to_pylist()[0]
        yield PieceResult(Piece.from_json(json.loads(line["piece"])), json.loads(line["facts"]), line["error"])


def _through_all_stages(job: StreamJob, piece: Piece) -> pa.Table:
    key = StreamJob("", "", "", job.model_fingerprint, job.read, job.chunk, job.encode)
    if key not in _encoders:
        _encoders[key] = stream._EncodeStage(job)
    (read,) = stream._read(job, piece)
    return stream._commit(_encoders[key](stream._chunk(read, job)), job)


def tasks_in_turn(function: Any, calls: Sequence[tuple[Any, ...]], *, on_done: Any = None, **options: Any) -> list[Any]:
    """`run_tasks` without Ray."""
    results = []
    for number, call in enumerate(calls):
        results.append(function(*call))
        if on_done:
            on_done(number, results[-1])
    return results


@contextmanager
def _no_session(config: Any) -> Iterator[Session]:
    yield Session(num_cpus=3, num_gpus=0, node_cpus=3)


def install(patch: Any = setattr) -> None:
    """Let builds in this process run their stages here."""
    patch(stream, "READ_BACKOFF_S", 0.0)
    patch(build_module, "stream_pieces", stream_in_turn)
    patch(build_module, "run_tasks", tasks_in_turn)
    patch(build_module, "connect", _no_session)


def build_in_one_process(
    monkeypatch: pytest.MonkeyPatch, sources: Sequence[str], root: str, *settings: str, fresh: bool = False
) -> BuildResult:
    """A build of small units whose stages run in this process."""
    install(monkeypatch.setattr)
    return build(sources, root, load_config(None, [*SMALL_UNITS, *settings]), fresh=fresh)


if __name__ == "__main__":  # the command line of vectormill, in one process
    from pipelines.cli import main

    install()
    main()
