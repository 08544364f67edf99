"""A piece between two stages: one row that carries its tables as Arrow IPC, its counts, its spans and, if it failed, why.

Stages are functions of a `Parcel`; `each_piece` applies one to the rows of a block.
"""

from __future__ import annotations

import json
import os
import struct
import traceback
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cluster.gpu_sampler import GpuSampler
from cluster.telemetry import Span, Stopwatch, dump_spans, load_spans, observe_span
from operators.errors import VectormillError
from operators.sources.pieces import Piece

STORAGE_FAILED = "storage_failed"  # in the facts of a piece: arguments of the OSError that ends the job
STAGE_VERBS = {"chunk": "chunking", "encode": "encoding", "commit": "committing"}  # in messages

ENVELOPE = pa.schema(
    [
        pa.field("piece", pa.string(), nullable=False),  # Piece as JSON
        pa.field("table", pa.large_binary()),  # Arrow IPC: rows, then chunks, then encoded
        pa.field("rejects", pa.large_binary()),  # Arrow IPC of schemas.REJECTS
        pa.field("queries", pa.large_binary()),  # Arrow IPC of schemas.DRAWN_QUERIES, then of schemas.QUERIES
        pa.field("facts", pa.string(), nullable=False),  # counts so far, JSON
        pa.field("spans", pa.string(), nullable=False),  # what the stages so far took, JSON (cluster/telemetry.py)
        pa.field("error", pa.string()),  # what failed, with its kind; the rest of the row is empty then
    ]
)


@dataclass(frozen=True)
class Parcel:
    """A piece between two stages, unpacked."""

    piece: Piece
    table: pa.Table | None
    rejects: pa.Table | None
    facts: dict[str, Any]
    queries: pa.Table | None = None


@dataclass(frozen=True)
class PieceResult:
    """A finished piece: its counts, or what failed."""

    piece: Piece
    facts: dict[str, Any]
    error: str | None
    spans: list[Span] = field(default_factory=list)  # of its stages, in order


def result_of(line: dict[str, Any]) -> PieceResult:
    facts = json.loads(line["facts"])
    if STORAGE_FAILED in facts:
        raise OSError(*facts[STORAGE_FAILED])
    return PieceResult(Piece.from_json(json.loads(line["piece"])), facts, line["error"], load_spans(line["spans"]))


def each_piece(
    batch: pa.Table,
    stage: str,
    work: Callable[[Parcel], Parcel],
    *,
    gpu: GpuSampler | None = None,
    packing: Executor | None = None,
) -> pa.Table:
    """Apply a stage to every piece of a block (one, as the job is built); failures become rows with an error.

    packing: packs what was made of a piece while the next one is worked on; the span is then that of the work alone.
    """
    done: list[pa.Table | Future[pa.Table]] = []
    for line in range(batch.num_rows):
        if batch.column("error")[line].is_valid:
            done.append(batch.slice(line, 1))
            continue
        piece = Piece.from_json(json.loads(batch.column("piece")[line].as_py()))
        spans = load_spans(batch.column("spans")[line].as_py())
        watch = Stopwatch()
        found: Parcel | pa.Table | None
        try:
            found = work(_parcel(piece, batch, line))
        except Exception as error:
            # Made a row here: the exception would keep alive all that its traceback holds, on the device too.
            found = failure(piece, STAGE_VERBS[stage], error)
        if packing is None:
            made = _packed_line(piece, found, stage)
            done.append(with_spans(made, spans, watch.span(stage)))
        else:
            span = watch.span(stage, gpu=gpu.take() if gpu else None)
            done.append(packing.submit(_packed_after, piece, found, spans, span))
        found = None  # nor is what was made held any longer than it takes to pack it
    lines = [line.result() if isinstance(line, Future) else line for line in done]
    return pa.concat_tables(lines) if lines else ENVELOPE.empty_table()


def _parcel(piece: Piece, batch: pa.Table, line: int) -> Parcel:
    table, rejects, queries = (_unpack(batch.column(name)[line]) for name in ("table", "rejects", "queries"))
    return Parcel(piece, table, rejects, json.loads(batch.column("facts")[line].as_py()), queries)


def _packed_line(piece: Piece, found: Parcel | pa.Table, stage: str) -> pa.Table:
    """The row for what a stage made of a piece; one that tells of a failure is one already."""
    try:
        return envelope(found) if isinstance(found, Parcel) else found
    except Exception as error:
        return failure(piece, STAGE_VERBS[stage], error)


def _packed_after(piece: Piece, found: Parcel | pa.Table, spans: list[Span], span: Span) -> pa.Table:
    return with_spans(_packed_line(piece, found, span.stage), spans, span)


def with_spans(line: pa.Table, spans: list[Span], span: Span) -> pa.Table:
    """The row with the spans of the stages before and of this one, which Ray's metrics hear of too."""
    observe_span(span)
    place = ENVELOPE.get_field_index("spans")
    return line.set_column(place, ENVELOPE.field(place), pa.array([dump_spans([*spans, span])], pa.string()))


def envelope(parcel: Parcel) -> pa.Table:
    packed = [_packed(table) for table in (parcel.table, parcel.rejects, parcel.queries)]
    return _line(parcel.piece, packed, parcel.facts, None)


def failure(piece: Piece, stage: str, error: BaseException) -> pa.Table:
    if isinstance(error, VectormillError):
        text = str(error)
    else:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {_first_line(error)} (at {os.path.basename(place.filename)}:{place.lineno})"
    # Where one piece cannot be committed no other can: a full disk, a store that is down.
    fatal = stage == STAGE_VERBS["commit"] and isinstance(error, OSError) and error.errno is not None
    facts = {STORAGE_FAILED: [error.errno, error.strerror, str(error.filename or "")]} if fatal else {}  # type: ignore[attr-defined]
    return _line(piece, [_packed(None)] * 3, facts, f"{stage}: {text}")


def _line(piece: Piece, packed: list[pa.Array], facts: dict[str, Any], error: str | None) -> pa.Table:
    values = (json.dumps(piece.to_json()), json.dumps(facts), "[]", error)
    first, *others = [pa.array([value], pa.string()) for value in values]
    return pa.table([first, *packed, *others], schema=ENVELOPE)


def _packed(table: pa.Table | None) -> pa.Array:
    """The table's Arrow IPC stream as a column of one value, without a further copy."""
    if table is None:
        return pa.nulls(1, pa.large_binary())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    offsets = pa.py_buffer(struct.pack("<qq", 0, data.size))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def _unpack(value: pa.Scalar) -> pa.Table | None:
    if not value.is_valid:
        return None
    with pa.ipc.open_stream(value.as_buffer()) as reader:
        return reader.read_all()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
