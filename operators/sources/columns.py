"""Which columns of an object hold the id and the text, found when the corpus is planned, before any work is done."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from operators.errors import SourceError
from operators.sources.csv_records import csv_records
from operators.sources.listing import SourceObject
from operators.sources.read_config import ID_CANDIDATES, TEXT_CANDIDATES, ReadConfig
from operators.sources.streams import CHUNK_BYTES, chunks, decompressed, lines

# JSONL has no header: the columns are the keys of its first records.
SAMPLE_RECORDS = 200
SAMPLE_BYTES = CHUNK_BYTES


@dataclass(frozen=True)
class Columns:
    """Columns that are read. `id_column` None: ids are made from source and row."""

    id_column: str | None
    text_columns: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All columns to read, each once."""
        return list(dict.fromkeys([*([self.id_column] if self.id_column is not None else []), *self.text_columns]))


class MissingColumnError(SourceError):
    """An object lacks a column. `column` is "" where none of the default text columns is there."""

    def __init__(self, obj: SourceObject, column: str, available: Sequence[str]) -> None:
        super().__init__(f"source object {obj.uri} {missing_column_hint(column, available)}")
        self.obj, self.column, self.available = obj, column, tuple(available)

    def __reduce__(self) -> Any:
        # Exceptions pickle to their message, which is not what this one is made from.
        return MissingColumnError, (self.obj, self.column, self.available)


def missing_column_hint(column: str, available: Sequence[str]) -> str:
    """`has no column 'tilte'; did you mean 'title'? its columns are ...` - what is missing and what to do."""
    shown = ", ".join(repr(name) for name in available[:20]) + (", ..." if len(available) > 20 else "")
    listed = f"its columns are {shown}" if available else "it has no columns"
    if not column:
        return f"has no text column ({', '.join(TEXT_CANDIDATES)}); {listed}; name the text with --text-column"
    near = difflib.get_close_matches(column, available, n=1, cutoff=0.5)
    folded = [name for name in available if name.lower() == column.lower()]
    suggestion = f"did you mean {(folded or near)[0]!r}? " if folded or near else ""
    return f"has no column {column!r}; {suggestion}{listed}; set --id-column or --text-column"


def resolve_columns(obj: SourceObject, available: Sequence[str], config: ReadConfig) -> Columns:
    """The columns to read from `obj`. Raises MissingColumnError, or SourceError for a name that stands there twice.

    JSONL may lack a named column: its rows may differ, and the first of them do not speak for all.
    """
    present = set(available)
    id_column = config.id_column or next((name for name in ID_CANDIDATES if name in present), None)
    text_columns = config.text_columns
    if not text_columns:
        found = next((name for name in TEXT_CANDIDATES if name in present), None)
        if found is None:
            raise MissingColumnError(obj, "", available)
        text_columns = ("title", "text") if found == "text" and "title" in present else (found,)
    columns = Columns(id_column, text_columns)
    for name in columns.names:
        if name not in present and obj.format != "jsonl":
            raise MissingColumnError(obj, name, available)
        if list(available).count(name) > 1:
            raise SourceError(f"source object {obj.uri} has more than one column {name!r}; rename one of them")
    return columns


def check_parquet_types(obj: SourceObject, schema: pa.Schema, columns: Columns) -> None:
    """Raises SourceError for a column whose type cannot hold an id or a text."""
    for name in columns.names:
        kind = schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
        raw = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
        usable = any(test(kind) for test in texts + raw)
        if name in columns.text_columns and not usable:
            raise SourceError(
                f"text column {name!r} of source object {obj.uri} must hold strings, its type is {kind};"
                " name another with --text-column, or write it anew as strings"
            )
        if name == columns.id_column and not usable and not pa.types.is_integer(kind):
            raise SourceError(
                f"id column {name!r} of source object {obj.uri} must hold strings or integers, its type is {kind};"
                " name another with --id-column, or write it anew as strings"
            )


def columns_of_lines(obj: SourceObject, config: ReadConfig) -> tuple[Columns, tuple[str, ...] | None]:
    """Columns to read of a JSONL or CSV object, and all its column names (None where it has none)."""
    names = sample_columns(obj)
    if names is None:
        # Without one good record there are only rejects, and any columns serve to write them down.
        return Columns(None, ("text",)), None
    return resolve_columns(obj, names, config), tuple(names)


def sample_columns(obj: SourceObject) -> list[str] | None:
    """Column names of a JSONL or CSV object, from its header or its first good records; None if it has none."""
    with decompressed(obj) as file:
        if obj.format == "csv":
            header = next(csv_records(obj, chunks(obj, file)), None)
            if header is None:
                return None
            if isinstance(header, Exception):
                raise SourceError(f"the header of source object {obj.uri} is not CSV: {header}; repair or remove it")
            return header
        names: dict[str, None] = {}
        good = 0
        for offset, line in lines(chunks(obj, file)):
            try:
                record = json.loads((line or b"").decode("utf-8-sig" if offset == 0 else "utf-8"))
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                good += 1
                names |= dict.fromkeys(record)
            # At least one good record, so that bad lines at the top do not decide what the columns are.
            if good and (good >= SAMPLE_RECORDS or offset >= SAMPLE_BYTES):
                break
        return list(names) if good else None
