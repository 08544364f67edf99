"""List-sorted runs: the one format of shards, of intermediate merges and of published parts.

A run holds the entries of the inverted lists [first_list, first_list + num_lists), ordered by (list_no, row_id), in three
objects: `lists` (codes and row ids, faiss's own ArrayInvertedLists serialisation, so that plain faiss memory-maps it),
`vectors` (.npy float16 [n, d], for refinement) and `rows` (Parquet, schemas.ROW_STORE). Entry i of one is entry i of all.
Shape letters: n entries, d dimensions, L lists of the run, B bytes of a code.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from operators import schemas
from operators.crash_points import crash_point
from operators.errors import IntegrityError
from operators.storage.checked import CheckedFile, ObjectEntry, write_checked
from operators.storage.store import Store

ROW_GROUP_ROWS = 512  # text of a hit costs one row group; 512 rows of ~500 bytes compress to about 100 kB
CACHE_BYTES = 32 << 20
_MAGIC = b"ilar"
_LAYOUT = b"full"  # sizes of all lists follow, also of empty ones


@dataclass
class RunSlice:
    """Entries of consecutive lists, ordered by (list_no, row_id)."""

    list_no: np.ndarray  # int32 [n]
    row_ids: np.ndarray  # int64 [n]
    codes: np.ndarray  # uint8 [n, B]
    vectors: np.ndarray  # float16 [n, d]
    rows: pa.Table  # schemas.ROW_STORE and the columns of further outputs, n rows


def row_id_checksum(row_ids: np.ndarray) -> int:
    """Order-free checksum of a set of row ids int64 [n]: the sum of their splitmix64 hashes modulo 2^64.

    Adds over disjoint sets, so parts can be checked against shards and both against 0..ntotal-1.
    """
    with np.errstate(over="ignore"):
        return int(splitmix64(row_ids.astype(np.uint64)).sum(dtype=np.uint64))


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Hash uint64 [n] -> uint64 [n] (Steele et al., 2014, the finaliser of SplitMix)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class RunWriter:
    """Streams a run to storage, list after list. `list_sizes_L` must be known before; `write_run` makes one."""

    def __init__(
        self,
        list_sizes_L: np.ndarray,
        first_list: int,
        code_size: int,
        d: int,
        rows_schema: pa.Schema,
        files: dict[str, Any],
    ) -> None:
        self._sizes = list_sizes_L.astype(np.int64)
        self._first_list = first_list
        self._code_size = code_size
        self._lists, self._vectors, rows = files["lists"], files["vectors"], files["rows"]
        self._next_list = first_list
        self._num_entries = 0
        self.checksum = 0
        self._lists.write(_MAGIC + np.array([len(self._sizes), code_size], dtype="<u8").tobytes())
        self._lists.write(_LAYOUT + np.array([len(self._sizes)], dtype="<u8").tobytes())
        self._lists.write(self._sizes.astype("<u8").tobytes())
        header = io.BytesIO()
        shape = (int(self._sizes.sum()), d)
        np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
        self._vectors.write(header.getvalue())
        self._parquet = pq.ParquetWriter(
            pa.PythonFile(rows, mode="w"), rows_schema, compression="zstd", use_dictionary=["source"]
        )
        self._buffered: list[pa.Table] = []
        self._num_buffered = 0

    def append(self, piece: RunSlice, end_list: int) -> None:
        """Add the entries of lists [the last end_list, end_list). Raises IntegrityError when the sizes do not fit."""
        start = self._next_list - self._first_list
        stop = end_list - self._first_list
        list_no = piece.list_no.astype(np.int64) - self._next_list
        if len(list_no) and (list_no.min() < 0 or (list_no[1:] < list_no[:-1]).any()):
            raise IntegrityError(
                f"entries of lists {self._next_list}..{end_list - 1} must be sorted by list, got lists"
                f" {piece.list_no.min()}..{piece.list_no.max()} in another order or from before"
            )
        sizes = np.bincount(list_no, minlength=stop - start)
        if not np.array_equal(sizes, self._sizes[start:stop]):
            raise IntegrityError(f"lists {self._next_list}..{end_list - 1} have other sizes than announced")
        lengths = (len(list_no), len(piece.row_ids), len(piece.codes), len(piece.vectors), piece.rows.num_rows)
        if len(set(lengths)) != 1:
            raise IntegrityError(
                f"lists {self._next_list}..{end_list - 1}: list numbers, row ids, codes, vectors and rows must be as many,"
                f" got {lengths}"
            )
        position = 0
        for size in sizes.tolist():
            if size:
                self._lists.write(np.ascontiguousarray(piece.codes[position : position + size]).tobytes())
                self._lists.write(piece.row_ids[position : position + size].astype("<i8").tobytes())
            position += size
        self._vectors.write(np.ascontiguousarray(piece.vectors, dtype="<f2").tobytes())
        self._buffered.append(piece.rows)
        self._num_buffered += piece.rows.num_rows
        self._flush_rows(ROW_GROUP_ROWS)
        self._num_entries += position
        self._next_list = end_list
        self.checksum = (self.checksum + row_id_checksum(piece.row_ids)) % 2**64

    def _flush_rows(self, least: int) -> None:
        """Write whole row groups, so that their boundaries do not depend on how the entries arrived."""
        if self._num_buffered < least or not self._num_buffered:
            return
        table = pa.concat_tables(self._buffered)
        whole = table.num_rows if least == 1 else table.num_rows // ROW_GROUP_ROWS * ROW_GROUP_ROWS
        self._parquet.write_table(table.slice(0, whole).combine_chunks(), row_group_size=ROW_GROUP_ROWS)
        self._buffered = [table.slice(whole)]
        self._num_buffered = table.num_rows - whole

    def finish(self) -> None:
        """Write what is buffered. Raises IntegrityError when entries are missing."""
        if self._num_entries != int(self._sizes.sum()):
            raise IntegrityError(f"a run announced {int(self._sizes.sum())} entries and got {self._num_entries}")
        self._flush_rows(1)
        self._parquet.close()

    def abandon(self) -> None:
        """Close what an exception left open, while the files still are: a ParquetWriter would do it when it is collected."""
        with suppress(Exception):  # the exception that ended the run is the one to show
            self._parquet.close()
        self._parquet.is_open = False


class FinishedRun:
    """What a finished `write_run` leaves: the objects' entries by role, and the row-id checksum."""

    def __init__(self) -> None:
        self.objects: dict[str, ObjectEntry] = {}
        self.facts: dict[str, Any] = {}


@contextmanager
def write_run(
    store: Store,
    key_prefix: str,
    *,
    list_sizes_L: np.ndarray,
    first_list: int,
    code_size: int,
    d: int,
    rows_schema: pa.Schema = schemas.ROW_STORE,
) -> Iterator[tuple[RunWriter, FinishedRun]]:
    """Writer of a run with objects `<key_prefix>.lists`, `.vectors.npy` and `.rows.parquet`.

    The FinishedRun is filled when the block ends without an exception; otherwise nothing becomes visible.
    """
    finished = FinishedRun()
    names = {"lists": ".lists", "vectors": ".vectors.npy", "rows": ".rows.parquet"}
    with ExitStack() as stack:
        pending = {role: stack.enter_context(write_checked(store, key_prefix + end)) for role, end in names.items()}
        files = {role: each.file for role, each in pending.items()}
        writer = RunWriter(list_sizes_L, first_list, code_size, d, rows_schema, files)
        try:
            yield writer, finished
            crash_point("run.before_finish")  # in a shard or in a merge: data streams are open, nothing is visible
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
    for role, each in pending.items():
        assert each.entry is not None
        finished.objects[role] = each.entry
    finished.facts = {
        "first_list": first_list,
        "num_lists": len(list_sizes_L),
        "num_entries": int(list_sizes_L.sum()),
        "code_size": code_size,
        "d": d,
        "row_id_checksum": writer.checksum,
    }


class RunReader:
    """Reads ranges of lists of a committed run; every byte is checked on the way. Not thread-safe.

    Keeps up to `cache_bytes` of verified blocks of each of the three objects.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        objects: dict[str, ObjectEntry],
        facts: dict[str, Any],
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.name = name
        self.facts = facts
        self.first_list: int = facts["first_list"]
        self.end_list: int = facts["first_list"] + facts["num_lists"]
        self._code_size: int = facts["code_size"]
        self._d: int = facts["d"]
        self._lists = CheckedFile(store, objects["lists"], cache_bytes)
        self._vectors = CheckedFile(store, objects["vectors"], cache_bytes)
        self._rows_file = CheckedFile(store, objects["rows"], cache_bytes)
        self._parquet: pq.ParquetFile | None = None
        self._row_group_starts: np.ndarray | None = None
        num_lists = facts["num_lists"]
        head = 4 + 16 + 4 + 8
        header = self._lists.read_range(0, head + 8 * num_lists)
        found = (header[:4], *np.frombuffer(header[4:20], "<u8").tolist(), header[20:24])
        if found != (_MAGIC, num_lists, self._code_size, _LAYOUT):
            raise IntegrityError(
                f"{name}: lists object has header {found}, expected {num_lists} lists of {self._code_size}-byte codes"
            )
        self.list_sizes_L = np.frombuffer(header[head:], "<u8").astype(np.int64)
        self.starts_L = np.concatenate([[0], np.cumsum(self.list_sizes_L)])  # entry number at which each list begins
        if self.starts_L[-1] != facts["num_entries"]:
            raise IntegrityError(
                f"{name}: list sizes add up to {self.starts_L[-1]}, its record says {facts['num_entries']}"
            )
        self._payload = head + 8 * num_lists
        vector_bytes = facts["num_entries"] * self._d * 2
        self._vector_start = objects["vectors"].size_bytes - vector_bytes

    def bytes_per_list(self) -> np.ndarray:
        """Estimated bytes that each list's entries take in all three objects, float64 [L]."""
        total = self._lists.entry.size_bytes + self._vectors.entry.size_bytes + self._rows_file.entry.size_bytes
        return self.list_sizes_L * (total / max(1, self.facts["num_entries"]))

    @property
    def payload_start(self) -> int:
        """Byte of the lists object at which the first list begins; the header lies before it."""
        return self._payload

    def list_bytes(self, list_no: int) -> tuple[int, int]:
        """Bytes [start, stop) of the lists object that hold the list: all its codes, then all its row ids."""
        lo, hi = self.starts_L[list_no - self.first_list : list_no - self.first_list + 2].tolist()
        width = self._code_size + 8
        return self._payload + lo * width, self._payload + hi * width

    def row_id_bytes(self, positions: np.ndarray) -> np.ndarray:
        """Byte of the lists object at which the row id of each entry int64 [n] begins: 8 bytes, not aligned."""
        end = self.starts_L[np.searchsorted(self.starts_L, positions, side="right")]  # of the entry's list
        return (
            self._payload + end * self._code_size + positions * 8
        )  # all ids before it, all codes up to its list's end

    def read_codes(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(list_no int32 [n], row_ids int64 [n], codes uint8 [n, B]) of lists [first, end)."""
        a, b = first - self.first_list, end - self.first_list
        width = self._code_size + 8
        lo, hi = int(self.starts_L[a]), int(self.starts_L[b])
        data = self._lists.read_range(self._payload + lo * width, self._payload + hi * width)
        codes = np.empty((hi - lo, self._code_size), np.uint8)
        row_ids = np.empty(hi - lo, np.int64)
        position = 0
        sizes = self.list_sizes_L[a:b]
        for size in sizes[sizes > 0].tolist():
            begin = position * width
            middle = begin + size * self._code_size
            codes[position : position + size] = np.frombuffer(data[begin:middle], np.uint8).reshape(
                size, self._code_size
            )
            row_ids[position : position + size] = np.frombuffer(data[middle : begin + size * width], "<i8")
            position += size
        list_no = np.repeat(np.arange(first, end, dtype=np.int32), self.list_sizes_L[a:b])
        return list_no, row_ids, codes

    def read_vectors(self, lo: int, hi: int) -> np.ndarray:
        """Vectors of entries [lo, hi), float16 [hi - lo, d]."""
        width = 2 * self._d
        data = self._vectors.read_range(self._vector_start + lo * width, self._vector_start + hi * width)
        return np.frombuffer(data, "<f2").reshape(hi - lo, self._d)

    def gather_vectors(self, positions: np.ndarray) -> np.ndarray:
        """Vectors of the entries `positions` int64 [n] in any order, float16 [n, d]; neighbours share reads."""
        order = np.argsort(positions, kind="stable")
        ascending = positions[order]
        out = np.empty((len(positions), self._d), np.float16)
        # Entries of about the same block are read together: what lies between them is fetched and checked anyway.
        group = ascending * (2 * self._d) // self._vectors.entry.block_bytes
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1, [len(positions)]]).tolist()
        for begin, end in pairwise(bounds):
            if begin < end:
                low, high = int(ascending[begin]), int(ascending[end - 1]) + 1
                out[order[begin:end]] = self.read_vectors(low, high)[ascending[begin:end] - low]
        return out

    def read_rows(self, lo: int, hi: int, columns: list[str] | None = None) -> pa.Table:
        """Row store entries [lo, hi)."""
        if lo >= hi:
            schema = self.rows_schema if columns is None else pa.schema([schemas.ROW_STORE.field(c) for c in columns])
            return schema.empty_table()
        parquet, starts = self._open_rows()
        first = int(np.searchsorted(starts, lo, side="right")) - 1
        last = int(np.searchsorted(starts, hi, side="left"))
        table = parquet.read_row_groups(list(range(first, last)), columns=columns, use_threads=False)
        return table.slice(lo - int(starts[first]), hi - lo)

    @property
    def rows_schema(self) -> pa.Schema:
        """schemas.ROW_STORE, and the columns of further outputs where the run has them."""
        schema: pa.Schema = self._open_rows()[0].schema_arrow.remove_metadata()
        return schema

    @property
    def row_group_starts(self) -> np.ndarray:
        """First entry of each row group of the row store, and the number of all entries; int64."""
        return self._open_rows()[1]

    def read_row_group(self, group: int, columns: Sequence[str] = schemas.ROW_STORE.names) -> pa.Table:
        """These columns of one whole row group of the row store; those of further outputs only if they are named."""
        return self._open_rows()[0].read_row_group(group, columns=list(columns), use_threads=False)

    def _open_rows(self) -> tuple[pq.ParquetFile, np.ndarray]:
        if self._parquet is None or self._row_group_starts is None:
            try:
                self._parquet = pq.ParquetFile(pa.PythonFile(self._rows_file, mode="r"), pre_buffer=False)
            except pa.ArrowInvalid as error:
                raise IntegrityError(f"{self.name}: row store is not readable Parquet ({error})") from None
            metadata = self._parquet.metadata
            counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self._row_group_starts = np.concatenate([[0], np.cumsum(counts)])
            if metadata.num_rows != self.facts["num_entries"]:
                raise IntegrityError(
                    f"{self.name}: row store has {metadata.num_rows} rows, expected {self.facts['num_entries']}"
                )
        return self._parquet, self._row_group_starts

    def read_lists(self, first: int, end: int) -> RunSlice:
        """All entries of lists [first, end). Raises IntegrityError when rows, ids and lists do not belong together."""
        list_no, row_ids, codes = self.read_codes(first, end)
        lo, hi = int(self.starts_L[first - self.first_list]), int(self.starts_L[end - self.first_list])
        rows = self.read_rows(lo, hi)
        if not np.array_equal(rows.column("row_id").to_numpy(), row_ids):
            raise IntegrityError(
                f"{self.name}: row ids of lists {first}..{end - 1} differ between inverted lists and row store"
            )
        if not np.array_equal(rows.column("list_no").to_numpy(), list_no):
            raise IntegrityError(f"{self.name}: list numbers of lists {first}..{end - 1} differ in the row store")
        return RunSlice(list_no, row_ids, codes, self.read_vectors(lo, hi), rows)


def concat_sorted(slices: list[RunSlice]) -> RunSlice:
    """Entries of several slices of the same lists in one, ordered by (list_no, row_id)."""
    list_no = np.concatenate([s.list_no for s in slices])
    row_ids = np.concatenate([s.row_ids for s in slices])
    order = np.lexsort((row_ids, list_no))
    return RunSlice(
        list_no[order],
        row_ids[order],
        np.concatenate([s.codes for s in slices])[order],
        np.concatenate([s.vectors for s in slices])[order],
        pa.concat_tables([s.rows for s in slices]).take(pa.array(order)),
    )
