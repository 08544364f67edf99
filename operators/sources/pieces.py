"""Pieces, the deterministic slices of a corpus, and its plan: objects cut into pieces from footers and headers alone.

One piece is one read task and one block of the streaming job.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal

import pyarrow.parquet as pq

from operators.errors import ConfigError, SourceError
from operators.settings import digest_of
from operators.sources.columns import (
    Columns,
    MissingColumnError,
    check_parquet_types,
    columns_of_lines,
    missing_column_hint,
    resolve_columns,
)
from operators.sources.failures import reading
from operators.sources.listing import SourceObject
from operators.sources.read_config import ReadConfig
from operators.sources.streams import opened
from operators.storage.checked import ObjectEntry

MAX_FILES_PER_PIECE = 1024
# A row group of up to this many times the piece size is read as one piece; a larger one is cut by staging.
MAX_OVERSIZE = 4
PLANNING_THREADS = 16

Kind = Literal["row_groups", "byte_range", "files", "staged"]


@dataclass(frozen=True)
class StagedSlice:
    """Rows and rejects that a streaming pass over an object has parsed and stored below the index root."""

    rows: ObjectEntry | None  # None: no good row
    rejects: ObjectEntry | None  # None: no bad row
    num_rows: int
    num_rejects: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "rows": self.rows.to_json() if self.rows else None,
            "rejects": self.rejects.to_json() if self.rejects else None,
            "num_rows": self.num_rows,
            "num_rejects": self.num_rejects,
        }

    @staticmethod
    def from_json(fields: dict[str, Any]) -> StagedSlice:
        """Inverse of `to_json`."""
        rows, rejects = (ObjectEntry.from_json(fields[role]) if fields[role] else None for role in ("rows", "rejects"))
        return StagedSlice(rows, rejects, fields["num_rows"], fields["num_rejects"])


@dataclass(frozen=True)
class Piece:
    """A slice of one source object (of several only for text files). Pickles; equal inputs give equal pieces."""

    objects: tuple[SourceObject, ...]
    kind: Kind
    start: int  # row groups, bytes, or rows of a staged object: [start, end)
    end: int
    first_row: int = 0  # number of the slice's first row in its object
    columns: Columns | None = None
    staged: StagedSlice | None = None
    rows_of_groups: tuple[int, int] | None = None  # only these rows [first, end) of the row groups; None: all

    @property
    def piece_id(self) -> str:
        """32 hex digits: a digest of the objects, their etags and the range, and of the staged bytes."""
        content = (
            [entry.sha256 if entry else "" for entry in (self.staged.rows, self.staged.rejects)] if self.staged else []
        )
        named = [[obj.uri, obj.source, obj.etag] for obj in self.objects]
        return digest_of([named, self.kind, self.start, self.end, self.rows_of_groups, content])[:32]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "objects": [obj.to_json() for obj in self.objects],
            "kind": self.kind,
            "start": self.start,
            "end": self.end,
            "first_row": self.first_row,
            "columns": [self.columns.id_column, list(self.columns.text_columns)] if self.columns else None,
            "staged": self.staged.to_json() if self.staged else None,
            "rows_of_groups": self.rows_of_groups,
        }

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Piece:
        """Inverse of `to_json`."""
        columns, staged, rows = fields["columns"], fields["staged"], fields["rows_of_groups"]
        return Piece(
            tuple(SourceObject.from_json(obj) for obj in fields["objects"]),
            fields["kind"],
            fields["start"],
            fields["end"],
            fields["first_row"],
            Columns(columns[0], tuple(columns[1])) if columns else None,
            StagedSlice.from_json(staged) if staged else None,
            (rows[0], rows[1]) if rows else None,
        )


@dataclass(frozen=True)
class NeedsStaging:
    """An object that can only be cut by reading it from front to back: `stage_object` does that."""

    obj: SourceObject
    reason: str


@dataclass(frozen=True)
class Plan:
    """All pieces of a corpus in source order, but for those of the objects in `to_stage`."""

    entries: tuple[tuple[Piece, ...] | NeedsStaging, ...]
    empty_objects: tuple[str, ...] = ()  # URIs of objects of 0 bytes: no rows, no error
    failures: tuple[SourceError, ...] = ()  # only with keep_going: objects that no piece stands for

    @property
    def to_stage(self) -> list[SourceObject]:
        """Objects to run `stage_object` on, in source order."""
        return [entry.obj for entry in self.entries if isinstance(entry, NeedsStaging)]

    def pieces(self, staged: Mapping[str, Sequence[Piece]]) -> list[Piece]:
        """All pieces in source order. `staged`: uri -> what `stage_object` returned, for every object of `to_stage`."""
        missing = [obj.uri for obj in self.to_stage if obj.uri not in staged]
        assert not missing, f"not staged: {missing}"
        return [
            piece
            for entry in self.entries
            for piece in (staged[entry.obj.uri] if isinstance(entry, NeedsStaging) else entry)
        ]


@dataclass(frozen=True)
class _Outcome:
    """What planning found out about one object. `available`: its column names, None where they are unknown."""

    planned: list[Piece] | NeedsStaging | SourceError
    available: tuple[str, ...] | None = None


def plan_object(obj: SourceObject, config: ReadConfig) -> list[Piece] | NeedsStaging:
    """The pieces of one object (a text file alone in one piece), or that it must be staged.

    Reads the footer of Parquet, the header of CSV, the first records of JSONL. Raises SourceError for an object that
    is damaged, has changed or lacks a column, and for a column of a type that cannot be used.
    """
    planned = _outcome(obj, config).planned
    if isinstance(planned, SourceError):
        raise planned
    return planned


def plan_pieces(objects: Sequence[SourceObject], config: ReadConfig, keep_going: bool = False) -> Plan:
    """The plan of a corpus; footers and headers are read by a pool of threads.

    Raises ConfigError for a column that no object has, and SourceError listing the objects that cannot be read; with
    `keep_going` those are left to the caller in `Plan.failures`.
    """
    with ThreadPoolExecutor(PLANNING_THREADS) as pool:
        outcomes = list(pool.map(lambda obj: _outcome(obj, config), objects))
    _refuse_unknown_columns(objects, outcomes, config)
    failures = [outcome.planned for outcome in outcomes if isinstance(outcome.planned, SourceError)]
    if failures and not keep_going:
        raise failures[0] if len(failures) == 1 else _summary(failures)
    entries: list[tuple[Piece, ...] | NeedsStaging] = []
    pairs = zip(objects, outcomes, strict=True)
    for is_text, group in groupby(pairs, key=lambda pair: pair[0].format == "text"):
        if is_text:
            entries += [(piece,) for piece in _grouped_files([obj for obj, _ in group], config)]
            continue
        for _, outcome in group:
            if isinstance(outcome.planned, NeedsStaging):
                entries.append(outcome.planned)
            elif isinstance(outcome.planned, list):
                entries.append(tuple(outcome.planned))
    empty = [
        obj.uri for obj in objects if obj.size_bytes == 0 and obj.format in ("jsonl", "csv") and not obj.compression
    ]
    return Plan(tuple(entries), tuple(empty), tuple(failures))


def _outcome(obj: SourceObject, config: ReadConfig) -> _Outcome:
    try:
        if obj.format == "text":
            return _Outcome([Piece((obj,), "files", 0, 1)])
        if obj.format == "parquet":
            return _plan_parquet(obj, config)
        return _plan_lines(obj, config)
    except MissingColumnError as error:
        return _Outcome(error, error.available)
    except SourceError as error:
        return _Outcome(error)


def _plan_lines(obj: SourceObject, config: ReadConfig) -> _Outcome:
    """JSONL and CSV."""
    if obj.size_bytes == 0 and obj.compression is None:
        return _Outcome([])
    columns, available = columns_of_lines(obj, config)
    if available is None and obj.format == "csv":
        return _Outcome([])  # blank lines only
    if obj.format == "csv":
        return _Outcome(NeedsStaging(obj, "CSV may have newlines inside quotes"), available)
    if obj.compression:
        return _Outcome(NeedsStaging(obj, f"{obj.compression} can only be read from front to back"), available)
    bounds = [*range(0, obj.size_bytes, config.piece_bytes), obj.size_bytes]
    ranges = pairwise(bounds)
    return _Outcome([Piece((obj,), "byte_range", start, end, start, columns) for start, end in ranges], available)


def _plan_parquet(obj: SourceObject, config: ReadConfig) -> _Outcome:
    with opened(obj) as file, reading(obj), pq.ParquetFile(file) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
    columns = resolve_columns(obj, schema.names, config)
    check_parquet_types(obj, schema, columns)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows, sizes = [group.num_rows for group in groups], [_column_bytes(group, set(columns.names)) for group in groups]
    available = tuple(schema.names)
    if rows and (max(rows) > MAX_OVERSIZE * config.piece_rows or max(sizes) > MAX_OVERSIZE * config.piece_bytes):
        return _Outcome(NeedsStaging(obj, f"a row group has {max(rows)} rows or {max(sizes)} bytes"), available)
    pieces: list[Piece] = []
    start, first_row = 0, 0
    while start < len(groups):
        end, num_rows, num_bytes = start + 1, rows[start], sizes[start]
        while (
            end < len(groups)
            and num_rows + rows[end] <= config.piece_rows
            and num_bytes + sizes[end] <= config.piece_bytes
        ):
            num_rows, num_bytes, end = num_rows + rows[end], num_bytes + sizes[end], end + 1
        num_cuts = max(math.ceil(num_rows / config.piece_rows), math.ceil(num_bytes / config.piece_bytes), 1)
        if num_rows and num_cuts == 1:
            pieces.append(Piece((obj,), "row_groups", start, end, first_row, columns))
        elif num_rows:
            # One row group of a few pieces: each reads it whole and keeps its rows. Decoding it up to MAX_OVERSIZE
            # times costs little beside encoding, and the pieces can be encoded in parallel.
            cuts = [num_rows * number // num_cuts for number in range(num_cuts + 1)]
            pieces += [
                Piece((obj,), "row_groups", start, end, first_row + low, columns, rows_of_groups=(low, high))
                for low, high in pairwise(cuts)
                if low < high
            ]
        start, first_row = end, first_row + num_rows
    return _Outcome(pieces, available)


def _column_bytes(row_group: Any, names: set[str]) -> int:
    """Uncompressed bytes of the columns that are read."""
    chunks = (row_group.column(number) for number in range(row_group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in names)


def _grouped_files(objects: list[SourceObject], config: ReadConfig) -> Iterator[Piece]:
    """Consecutive text files of together up to MAX_FILES_PER_PIECE and piece_bytes in one piece."""
    group: list[SourceObject] = []
    group_bytes = 0
    for obj in objects:
        # No more than the limit is read of a file; eight times is what text rarely compresses beyond.
        size = min(obj.size_bytes * (8 if obj.compression else 1), config.max_text_bytes)
        if group and (len(group) == MAX_FILES_PER_PIECE or group_bytes + size > config.piece_bytes):
            yield Piece(tuple(group), "files", 0, len(group))
            group, group_bytes = [], 0
        group.append(obj)
        group_bytes += size
    if group:
        yield Piece(tuple(group), "files", 0, len(group))


def _refuse_unknown_columns(objects: Sequence[SourceObject], outcomes: list[_Outcome], config: ReadConfig) -> None:
    """ConfigError for a column that no object has: the user's slip, not the objects' fault."""
    named = [*([config.id_column] if config.id_column else []), *config.text_columns]
    if named and all(obj.format == "text" for obj in objects):
        raise ConfigError(
            f"column {named[0]!r} was given, but all {len(objects)} source objects are text files, which have no"
            " columns; leave out --id-column and --text-column"
        )
    known = [(obj, outcome) for obj, outcome in zip(objects, outcomes, strict=True) if outcome.available is not None]
    if not known:
        return
    union = list(dict.fromkeys(name for _, outcome in known for name in outcome.available or ()))
    unknown = [name for name in named if name not in union]
    without_text = [
        outcome
        for _, outcome in known
        if isinstance(outcome.planned, MissingColumnError) and not outcome.planned.column
    ]
    if not unknown and len(without_text) == len(known):
        unknown = [""]
    if unknown:
        others = f" (nor any of {len(known) - 1} other objects)" if len(known) > 1 else ""
        raise ConfigError(f"source object {known[0][0].uri}{others} {missing_column_hint(unknown[0], union)}")


def _summary(failures: Sequence[SourceError]) -> SourceError:
    shown = "; ".join(str(failure) for failure in failures[:5])
    more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
    return SourceError(f"{len(failures)} source objects cannot be read: {shown}{more}")
