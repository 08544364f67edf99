"""The parallel tasks of an update: scan changed objects without encoding, and take out the documents that are to be encoded.

Each opens the store by its URL, does one unit of work and commits it. All are deterministic in their arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.stream import ReadError, StreamJob, cleaner_of, read_piece
from operators import schemas
from operators.crash_points import crash_point
from operators.documents import TAKES_PART, document_table
from operators.errors import SourceChangedError, SourceError, VectormillError
from operators.piece_store import read_table, write_table
from operators.sources.pieces import Piece, StagedSlice
from operators.sources.readers import PieceRows
from operators.storage.checked import ObjectEntry, write_checked
from operators.storage.commits import CommitRecord, commit, finished_unit, new_attempt
from operators.storage.store import Store, open_store

# Documents of a scanned piece: those of schemas.DOCUMENTS with their piece (its number in the group) and source.
SCANNED = pa.schema(
    [pa.field("piece", pa.int32(), nullable=False), pa.field("source", pa.string(), nullable=False), *schemas.DOCUMENTS]
)


def scan_group(job: StreamJob, key_prefix: str, pieces: Sequence[Piece], inputs: str) -> CommitRecord:
    """Commit which documents the pieces hold (SCANNED) and what is wrong with their other rows. Nothing is encoded."""
    store = open_store(job.store_url)
    done = finished_unit(store, f"{key_prefix}.json", inputs)
    if done is not None:
        return done
    attempt = new_attempt()
    rows_read: Counter[str] = Counter()
    with (
        _parquet(store, f"{key_prefix}-{attempt}.parquet", SCANNED) as documents,
        _parquet(store, f"{key_prefix}-{attempt}.rejects.parquet", schemas.REJECTS) as rejects,
    ):
        for number, piece in enumerate(pieces):
            found = _read(job, piece)
            cleaned, unclean = cleaner_of(job)(found.rows)
            bad = pa.concat_tables([found.rejects, unclean])
            rows_read.update(Counter(cleaned.column("source").to_pylist()))
            rows_read.update(Counter(bad.column("source").to_pylist()))
            documents.write(_scanned(cleaned, number))
            rejects.write(bad)
    objects = {"documents": documents.entry, "rejects": rejects.entry}
    facts = {"num_rows_read": dict(sorted(rows_read.items()))}
    name = key_prefix.rsplit("/", 1)[1]
    return commit(store, f"{key_prefix}.json", CommitRecord(f"scan {name}", inputs, attempt, objects, facts))


def _read(job: StreamJob, piece: Piece) -> PieceRows:
    try:
        return read_piece(job, piece)[0]
    except ReadError as error:
        if isinstance(error.cause, VectormillError):
            raise error.cause from None
        names = ", ".join(obj.source for obj in piece.objects[:3])
        raise SourceError(
            f"{names} ({piece.kind} {piece.start}..{piece.end}) could not be read in {error.attempts} attempt(s):"
            f" {type(error.cause).__name__}: {error}; run again to resume"
        ) from error.cause


class _parquet:
    """Context: a checked Parquet object that tables are written to one by one."""

    def __init__(self, store: Store, key: str, schema: pa.Schema) -> None:
        self._pending = write_checked(store, key)
        self._schema = schema

    def __enter__(self) -> _parquet:
        self._object = self._pending.__enter__()
        self._sink = pa.PythonFile(self._object.file, mode="w")
        self._writer = pq.ParquetWriter(self._sink, self._schema, compression="zstd", use_dictionary=["source"])
        return self

    def write(self, table: pa.Table) -> None:
        if table.num_rows:
            self._writer.write_table(table)

    def __exit__(self, *error: Any) -> None:
        self._writer.close()
        self._pending.__exit__(*error)

    @property
    def entry(self) -> ObjectEntry:
        assert self._object.entry is not None
        return self._object.entry


def _scanned(cleaned: pa.Table, piece: int) -> pa.Table:
    count = cleaned.num_rows
    doc_id, row, text_hash = (cleaned.column(name).combine_chunks() for name in ("doc_id", "row", "text_hash"))
    none = np.zeros(count, np.int64)
    table = document_table(doc_id, row, text_hash, none - 1, none, np.full(count, TAKES_PART, np.int8))
    table = table.add_column(0, SCANNED.field("source"), cleaned.column("source"))
    return table.add_column(0, SCANNED.field("piece"), pa.array(np.full(count, piece, np.int32)))


@dataclass(frozen=True)
class Wanted:
    """Rows that are wanted of a piece, by source and number (of all its object's pieces, where the piece is not known)."""

    piece: Piece
    sources: list[str]
    rows: npt.NDArray[np.int64]
    is_whole: bool  # they are all documents of the piece


def take_group(job: StreamJob, key_prefix: str, wanted: Sequence[Wanted], inputs: str) -> CommitRecord:
    """Commit the raw rows of the documents that are to be encoded, as a slice that is staged for the streaming job."""
    store = open_store(job.store_url)
    done = finished_unit(store, f"{key_prefix}.json", inputs)
    if done is not None:
        return done
    found = []
    for one in wanted:
        table = _read(job, one.piece).rows
        asked = set(zip(one.sources, one.rows.tolist(), strict=True))
        here = zip(table.column("source").to_pylist(), table.column("row").to_pylist(), strict=True)
        found.append(table.filter(pa.array([place in asked for place in here], pa.bool_())))
    taken = pa.concat_tables(found).combine_chunks()
    crash_point("take.before_data")
    attempt = new_attempt()
    objects = {"rows": write_table(store, f"{key_prefix}-{attempt}.parquet", taken)}
    name = key_prefix.rsplit("/", 1)[1]
    record = CommitRecord(f"take {name}", inputs, attempt, objects, {"num_rows": taken.num_rows})
    return commit(store, f"{key_prefix}.json", record)


def staged_piece(wanted: Sequence[Wanted], record: CommitRecord) -> Piece:
    """The piece that the streaming job encodes."""
    objects = tuple(dict.fromkeys(obj for one in wanted for obj in one.piece.objects))
    num_rows = record.facts["num_rows"]
    slice_of_rows = StagedSlice(record.objects["rows"], None, num_rows, 0)
    return Piece(objects, "staged", 0, num_rows, staged=slice_of_rows)


def check_taken(records: Sequence[CommitRecord], expected: int) -> None:
    """Raise SourceChangedError unless all documents were found again."""
    found = sum(record.facts["num_rows"] for record in records)
    if found != expected:
        raise SourceChangedError(
            f"{expected} documents were to be encoded and {found} found when they were read again: a source object changed"
            " while the update ran; run it again"
        )


def documents_of_pieces(store: Store, pieces: Sequence[CommitRecord]) -> Iterator[pa.Table]:
    """doc_id and number of chunks of each document of committed pieces, piece by piece."""
    for record in pieces:
        table = read_table(store, record.objects["encoded"], ["doc_id", "chunk_no"])
        chunk_no = table.column("chunk_no").to_numpy()
        starts = np.flatnonzero(chunk_no == 0)
        counts = np.diff(np.append(starts, len(chunk_no)))
        doc_id = table.column("doc_id").combine_chunks().take(pa.array(starts))
        yield pa.table({"doc_id": doc_id, "num_chunks": pa.array(counts, pa.int64())})
