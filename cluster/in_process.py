"""Without Ray: the stages and tasks of a run one after the other in this process. The same functions, the same bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from cluster.parcels import PieceResult
from cluster.stream import EncodeStage, StreamJob, run_piece
from cluster.tasks import raise_first
from operators.chunker import ChunkConfig
from operators.cleaner import CleanConfig
from operators.sources.pieces import Piece
from operators.sources.read_config import ReadConfig


def pieces_in_turn(job: StreamJob, pieces: Sequence[Piece]) -> Iterator[PieceResult]:
    """`cluster.stream.stream_pieces` in this process: yields each piece, in order, as it is committed or has failed."""
    encode = encode_stage(job)
    for piece in pieces:
        yield run_piece(job, piece, encode)


def encode_stage(job: StreamJob) -> EncodeStage:
    """The encoder of this process, kept from run to run while model and settings stay the same."""
    what_matters = StreamJob(
        "", "", "", job.model_fingerprint, ReadConfig(), ChunkConfig(), replace(job.encode, workers=0), CleanConfig()
    )
    kept = _kept_stage(what_matters)
    if kept.batch_tokens != job.encode.batch_tokens:  # halved when a device's memory did not suffice
        forget_encoder()
        kept = _kept_stage(what_matters)
    return kept


def forget_encoder() -> None:
    """The next run loads its model anew."""
    _kept_stage.cache_clear()


@functools.lru_cache(maxsize=1)
def _kept_stage(job: StreamJob) -> EncodeStage:
    return EncodeStage(job)


def tasks_in_turn(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    *,
    shared: Sequence[Any] = (),
    on_done: Callable[[int, Any], None] | None = None,
    check: Callable[[], None] | None = None,
) -> list[Any]:
    """`cluster.tasks.run_tasks` in this process: results of function(*shared, *call) for every call, in order.

    An exception of the function is kept until all other calls have ended, then raised. `check` is called before each.
    """
    results: list[Any] = [None] * len(calls)
    failures: list[tuple[int, Exception]] = []
    for number, call in enumerate(calls):
        if check is not None:
            check()
        try:
            results[number] = function(*shared, *call)
        except Exception as error:
            failures.append((number, error))
            continue
        if on_done is not None:
            on_done(number, results[number])
    raise_first(failures)
    return results
