"""Committed pieces: write one, read columns of one back."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from operators import schemas
from operators.crash_points import crash_point
from operators.errors import IntegrityError
from operators.storage.checked import CheckedFile, ObjectEntry, write_checked
from operators.storage.commits import CommitRecord, commit, new_attempt
from operators.storage.store import Store

READ_AHEAD = 16  # a read of a remote store mostly waits: some 30 ms a request on S3


@dataclass
class EncodedPiece:
    """One piece at the end of the streaming job, with the counts that must reconcile."""

    piece_id: str
    encoded: pa.Table  # schemas.encoded(d)
    rejects: pa.Table  # schemas.REJECTS
    num_rows_read: int
    queries: pa.Table | None = None  # schemas.QUERIES, the piece's share of the query sample
    facts: dict[str, Any] = field(default_factory=dict)  # tokens and the like, for reports


def piece_key(run_prefix: str, piece_id: str) -> str:
    """Key of a piece's commit record."""
    return f"{run_prefix}/pieces/{piece_id}.json"


def doc_hashes(doc_ids: Sequence[str]) -> np.ndarray:
    """Stable 64-bit hash of each id, uint64 [n] (BLAKE2b, first 8 bytes little-endian)."""
    digests = b"".join(hashlib.blake2b(doc_id.encode(), digest_size=8).digest() for doc_id in doc_ids)
    return np.frombuffer(digests, dtype="<u8")


def commit_piece(store: Store, run_prefix: str, piece: EncodedPiece, inputs: str) -> CommitRecord:
    """Write the piece's rows and rejects, then its record. Raises IntegrityError when its counts do not reconcile."""
    num_docs = int((piece.encoded.column("chunk_no").to_numpy() == 0).sum())
    counts: dict[str, dict[str, int]] = {"rejected": {}, "dropped": {}}
    for outcome, reason in zip(
        piece.rejects.column("outcome").to_pylist(), piece.rejects.column("reason").to_pylist(), strict=True
    ):
        counts[outcome][reason] = counts[outcome].get(reason, 0) + 1
    if piece.num_rows_read != num_docs + piece.rejects.num_rows:
        raise IntegrityError(
            f"piece {piece.piece_id}: {piece.num_rows_read} rows read, but {num_docs} encoded and {piece.rejects.num_rows} left out"
        )
    crash_point("piece.before_data")
    attempt = new_attempt()
    prefix = f"{run_prefix}/pieces/{piece.piece_id}-{attempt}"
    d = piece.encoded.schema.field("vector").type.list_size
    hashes = pa.array(doc_hashes(piece.encoded.column("doc_id").to_pylist()), pa.uint64())
    table = piece.encoded.append_column(schemas.committed(d).field("doc_hash"), hashes)
    objects = {"encoded": _write_parquet(store, f"{prefix}.parquet", table)}
    if piece.rejects.num_rows:
        objects["rejects"] = _write_parquet(store, f"{prefix}.rejects.parquet", piece.rejects)
    if piece.queries is not None and piece.queries.num_rows:
        objects["queries"] = _write_parquet(store, f"{prefix}.queries.parquet", piece.queries)
    facts = {"num_rows_read": piece.num_rows_read, "num_docs": num_docs, "num_chunks": table.num_rows, "d": d}
    record = CommitRecord(f"piece {piece.piece_id}", inputs, attempt, objects, {**facts, **counts, **piece.facts})
    return commit(store, piece_key(run_prefix, piece.piece_id), record)


def _write_parquet(store: Store, key: str, table: pa.Table) -> ObjectEntry:
    # Vectors do not compress; text does.
    compression = {name: "NONE" if name == "vector" else "zstd" for name in table.schema.names}
    columns = {("vector.list.element" if name == "vector" else name): how for name, how in compression.items()}
    with write_checked(store, key) as pending, pa.PythonFile(pending.file, mode="w") as sink:
        pq.write_table(table, sink, compression=columns, use_dictionary=["source"])
    assert pending.entry is not None
    return pending.entry


def write_table(store: Store, key: str, table: pa.Table) -> ObjectEntry:
    """Write a table as a checked Parquet object."""
    return _write_parquet(store, key, table)


def read_table(store: Store, entry: ObjectEntry, columns: list[str] | None = None) -> pa.Table:
    """Columns of a checked Parquet object. Raises IntegrityError naming it when it is damaged."""
    source = CheckedFile(store, entry)
    try:
        return pq.ParquetFile(pa.PythonFile(source, mode="r")).read(columns=columns, use_threads=False)
    except pa.ArrowInvalid as error:
        raise IntegrityError(f"object {store.url}/{entry.key} is not readable Parquet ({error})") from None


def read_tables(store: Store, entries: Iterable[ObjectEntry], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The columns of each object in turn; the next READ_AHEAD are being read meanwhile. Raises IntegrityError as `read_table` does."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        ahead: deque[Future[pa.Table]] = deque()
        try:
            for entry in entries:
                ahead.append(pool.submit(read_table, store, entry, columns))
                if len(ahead) > READ_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def vectors_of(table: pa.Table) -> np.ndarray:
    """The vector column as float16 [n, d]."""
    column = table.column("vector").combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    d = column.type.list_size
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, d)


def doc_ordinals(chunk_no: np.ndarray) -> np.ndarray:
    """Number of the document within its piece for each chunk, int64 [n]: chunks stand in document order."""
    return np.cumsum(chunk_no == 0) - 1


def kept_mask(chunk_no: np.ndarray, dropped_docs: Sequence[int]) -> np.ndarray:
    """True for the chunks whose document was not dropped as a duplicate, bool [n]."""
    if not len(dropped_docs):
        return np.ones(len(chunk_no), dtype=bool)
    return ~np.isin(doc_ordinals(chunk_no), np.asarray(dropped_docs))
