"""Rows and rejects of a piece, and the row-by-row path: JSON values, CSV fields, text files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from operators.schemas import REJECTS, ROWS
from operators.sources.columns import Columns
from operators.sources.read_config import MAX_ID_BYTES, MAX_LINE_BYTES, ReadConfig

MAX_DETAIL_CHARS = 200


@dataclass(frozen=True)
class PieceRows:
    """What a piece holds: ROWS, REJECTS, both in source order; every row read is in exactly one of them."""

    rows: pa.Table
    rejects: pa.Table

    @property
    def num_rows_read(self) -> int:
        """Rows read: good and rejected."""
        return int(self.rows.num_rows + self.rejects.num_rows)

    @property
    def text_bytes(self) -> int:
        """Bytes of the good rows' text column."""
        return int(self.rows["text"].nbytes)


class BadRow(Exception):
    """Why a row is rejected."""

    def __init__(self, reason: str, detail: str, doc_id: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.doc_id = reason, detail, doc_id


def safe_detail(detail: str) -> str:
    """One printable line of at most MAX_DETAIL_CHARS characters."""
    return "".join(char if char.isprintable() else "?" for char in detail[:MAX_DETAIL_CHARS])


def too_large(what: str, size_bytes: int, limit: int) -> BadRow:
    """The row has a text or an id over its limit."""
    setting = " (read.max_text_bytes)" if what == "text" else ""
    return BadRow("too_large", f"{what} of {size_bytes} bytes, the limit is {limit}{setting}")


class RowCollector:
    """Collects rows one by one and hands them out as PieceRows."""

    def __init__(self, columns: Columns | None, config: ReadConfig) -> None:
        self._columns = columns
        self._config = config
        self._clear()

    def _clear(self) -> None:
        self._rows: tuple[list[str], list[str], list[str], list[int]] = ([], [], [], [])
        self._rejects: list[dict[str, Any]] = []
        self.num_rows_read, self.text_bytes = 0, 0

    def finish(self) -> PieceRows:
        """Everything collected so far; the collector is empty afterwards."""
        doc_ids, texts, sources, numbers = self._rows
        rows = pa.Table.from_arrays(
            [
                pa.array(doc_ids, pa.string()),
                pa.array(texts, pa.large_string()),
                pa.array(sources, pa.string()),
                pa.array(numbers, pa.int64()),
            ],
            schema=ROWS,
        )
        rejects = pa.Table.from_pylist(self._rejects, schema=REJECTS)
        self._clear()
        return PieceRows(rows, rejects)

    def accept(self, source: str, row: int, doc_id: str, text: str, size_bytes: int) -> None:
        """A good row."""
        doc_ids, texts, sources, numbers = self._rows
        doc_ids.append(doc_id)
        texts.append(text)
        sources.append(source)
        numbers.append(row)
        self.num_rows_read += 1
        self.text_bytes += size_bytes

    def reject(self, source: str, row: int, bad: BadRow) -> None:
        """A bad row."""
        self._rejects.append(
            {
                "source": source,
                "row": row,
                "doc_id": bad.doc_id,
                "outcome": "rejected",
                "reason": bad.reason,
                "detail": safe_detail(bad.detail),
            }
        )
        self.num_rows_read += 1

    def add_json_line(self, source: str, offset: int, line: bytes | None) -> None:
        """A line of JSONL, None for one that was too long to hold; a blank line is no row."""
        if line is not None and not line.strip():
            return
        try:
            record = _json_object(line, self._config, has_bom=offset == 0)
        except BadRow as bad:
            self.reject(source, offset, bad)
        else:
            self.add_record(source, offset, record)

    def add_record(self, source: str, row: int, record: Mapping[str, Any]) -> None:
        """Named values of a row; a missing one is null."""
        assert self._columns is not None
        doc_id: str | None = None
        try:
            if self._columns.id_column is None:
                doc_id = made_id(source, row)
            else:
                doc_id = _doc_id(self._columns.id_column, record.get(self._columns.id_column))
            text, size_bytes = _joined_text(self._columns.text_columns, record, self._config.max_text_bytes)
        except BadRow as bad:
            bad.doc_id = doc_id
            self.reject(source, row, bad)
        else:
            self.accept(source, row, doc_id, text, size_bytes)

    def add_file(self, source: str, content: bytes) -> None:
        """A text file as one document with its source path as id. `content` may stop one byte past the limit."""
        limit = self._config.max_text_bytes
        try:
            if len(content) > limit:
                raise BadRow("too_large", f"file of more than {limit} bytes (read.max_text_bytes)", source)
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise BadRow("invalid_utf8", _decode_detail(error), source) from None
            if not text or text.isspace():
                raise BadRow("empty_text", "the file holds no text", source)
        except BadRow as bad:
            self.reject(source, 0, bad)
        else:
            self.accept(source, 0, source, text, len(content))


def made_id(source: str, row: int) -> str:
    """Id of a row of an object without an id column."""
    return f"{source}#{row}"


def _json_object(line: bytes | None, config: ReadConfig, has_bom: bool) -> dict[str, Any]:
    if line is None:
        raise BadRow("too_large", f"line of more than {MAX_LINE_BYTES} bytes")
    try:
        record = json.loads(line.decode("utf-8-sig" if has_bom else "utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("invalid_utf8", _decode_detail(error)) from None
    except json.JSONDecodeError as error:
        raise BadRow("bad_json", f"{error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", str(error)) from None
    if not isinstance(record, dict):
        raise BadRow("wrong_type", f"the line must be a JSON object, got {type(record).__name__}")
    return record


def _decode_detail(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at byte {error.start}: {error.reason}"


def _utf8_size(column: str, value: str) -> int:
    try:
        return len(value.encode())
    except UnicodeEncodeError as error:
        raise BadRow("invalid_utf8", f"column {column!r}, character {error.start} is not valid Unicode") from None


def _doc_id(column: str, value: Any) -> str:
    if value is None:
        raise BadRow("null_id", f"column {column!r} is null or missing")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"column {column!r} must be a string or an integer, got {type(value).__name__}")
    size_bytes = _utf8_size(column, value)
    if not value or value.isspace():
        raise BadRow("empty_id", f"column {column!r} is empty or blank")
    if size_bytes > MAX_ID_BYTES:
        raise too_large("id", size_bytes, MAX_ID_BYTES)
    return value


def _joined_text(columns: tuple[str, ...], record: Mapping[str, Any], limit: int) -> tuple[str, int]:
    """The non-blank texts joined by one space, and the UTF-8 size."""
    texts: list[str] = []
    size_bytes, all_null = -1, True
    for column in columns:
        value = record.get(column)
        if value is None:
            continue
        if not isinstance(value, str):
            raise BadRow("wrong_type", f"column {column!r} must be a string, got {type(value).__name__}")
        all_null = False
        text_bytes = _utf8_size(column, value)
        if value and not value.isspace():
            texts.append(value)
            size_bytes += text_bytes + 1
    if not texts:
        named = ", ".join(repr(column) for column in columns)
        if all_null:
            raise BadRow("null_text", f"{named}: null or missing")
        raise BadRow("empty_text", f"{named}: no text")
    if size_bytes > limit:
        raise too_large("text", size_bytes, limit)
    return " ".join(texts), size_bytes
