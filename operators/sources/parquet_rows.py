"""Rows of a Parquet table, column by column: the checks of the row-by-row path on whole Arrow arrays.

N rows of the table.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.schemas import REJECTS, ROWS
from operators.sources.columns import Columns
from operators.sources.read_config import MAX_ID_BYTES, ReadConfig
from operators.sources.rows import BadRow, PieceRows, safe_detail, too_large

_GOOD = 0
_ID_REASONS = ("invalid_utf8", "null_id", "empty_id", "too_large")
_TEXT_REASONS = ("invalid_utf8", "null_text", "empty_text", "too_large")
_REASONS = ("", *_ID_REASONS, *_TEXT_REASONS)
_FIRST_TEXT_REASON = 1 + len(_ID_REASONS)


def parquet_rows(table: pa.Table, columns: Columns, source: str, first_row: int, config: ReadConfig) -> PieceRows:
    """ROWS and REJECTS of `table`, whose first row is row `first_row` of `source`. Types were checked when planning."""
    num_rows = table.num_rows
    numbers = pa.array(np.arange(first_row, first_row + num_rows, dtype=np.int64))
    doc_ids, id_masks = _ids(table, columns, source, numbers)
    texts, text_masks = _texts(table, columns.text_columns, config)
    # The first reason that holds is the row's, as in the row-by-row path.
    codes = np.select([*id_masks, *text_masks], list(range(1, len(_REASONS))), default=_GOOD)
    bad = np.flatnonzero(codes)
    rejects = pa.Table.from_pylist(
        [
            _reject(source, first_row + int(at), int(codes[at]), doc_ids[int(at)], texts[int(at)], columns, config)
            for at in bad
        ],
        schema=REJECTS,
    )
    if len(bad):
        good = pa.array(codes == _GOOD)
        doc_ids, texts, numbers = doc_ids.filter(good), texts.filter(good), numbers.filter(good)
    sources = pa.repeat(pa.scalar(source, pa.string()), len(numbers))
    return PieceRows(pa.Table.from_arrays([doc_ids.cast(pa.string()), texts, sources, numbers], schema=ROWS), rejects)


def _ids(table: pa.Table, columns: Columns, source: str, numbers: pa.Array) -> tuple[pa.Array, list[np.ndarray]]:
    """Ids (large_string, N) and one bool mask (N,) for each of _ID_REASONS."""
    if columns.id_column is None:
        made = pc.binary_join_element_wise(source, numbers.cast(pa.string()), "#")
        return made.cast(pa.large_string()), [np.zeros(table.num_rows, bool)] * len(_ID_REASONS)
    ids, invalid = _as_text(table.column(columns.id_column))
    return ids, [invalid, _mask(ids.is_null()), _blank(ids), _mask(pc.greater(pc.binary_length(ids), MAX_ID_BYTES))]


def _texts(table: pa.Table, names: tuple[str, ...], config: ReadConfig) -> tuple[pa.Array, list[np.ndarray]]:
    """Joined texts (large_string, N) and one bool mask (N,) for each of _TEXT_REASONS."""
    columns, masks = zip(*(_as_text(table.column(name)) for name in names), strict=True)
    invalid = np.logical_or.reduce(masks)
    nulls = [_mask(column.is_null()) for column in columns]
    blanks = [_blank(column) for column in columns]
    all_null = np.logical_and.reduce(nulls)
    none_left = np.logical_and.reduce([null | blank for null, blank in zip(nulls, blanks, strict=True)])
    if len(columns) == 1:
        texts = columns[0]
    else:
        kept = [
            pc.if_else(pa.array(blank), pa.scalar(None, pa.large_string()), column) if blank.any() else column
            for column, blank in zip(columns, blanks, strict=True)
        ]
        texts = kept[0]
        for column in kept[1:]:
            # Not null_handling="skip": pyarrow 26 then leaves out the rows in which all are null.
            joined = pc.binary_join_element_wise(texts, column, pa.scalar(" ", pa.large_string()))
            texts = pc.coalesce(joined, texts, column)
    too_long = _mask(pc.greater(pc.binary_length(texts), config.max_text_bytes))
    return texts, [invalid, all_null, none_left, too_long]


def _as_text(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The column as large_string (N), with null where its bytes are not UTF-8, and the mask of those rows."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    none_invalid = np.zeros(len(column), bool)
    if pa.types.is_integer(column.type):
        return _one_array(column.cast(pa.large_string())), none_invalid
    # Arrow strings from a file may hold any bytes; the cast from binary is what validates them.
    raw = _one_array(column.cast(pa.large_binary()))
    try:
        return raw.cast(pa.large_string()), none_invalid
    except pa.ArrowInvalid:
        decoded = [_decoded(value) for value in raw.to_pylist()]
        texts = pa.array(decoded, pa.large_string())
        return texts, _mask(texts.is_null()) & _mask(raw.is_valid())


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return pa.concat_arrays(combined.chunks) if isinstance(combined, pa.ChunkedArray) else combined


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _blank(texts: pa.Array) -> np.ndarray:
    """Mask (N,) of the texts that are empty or all whitespace; False for nulls."""
    empty = _mask(pc.equal(pc.binary_length(texts), 0))
    # Looking at every character takes 20 ms for 8 MB; the first one settles nearly every text.
    if _mask(pc.utf8_is_space(pc.utf8_slice_codeunits(texts, 0, 1))).any():
        return empty | _mask(pc.utf8_is_space(texts))
    return empty


def _mask(values: pa.Array) -> np.ndarray:
    """Boolean array as NumPy bool (N,), null as False."""
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False), dtype=bool)


def _reject(
    source: str, row: int, code: int, doc_id: pa.Scalar, text: pa.Scalar, columns: Columns, config: ReadConfig
) -> dict[str, object]:
    reason, of_text = _REASONS[code], code >= _FIRST_TEXT_REASON
    if reason == "too_large" and of_text:
        bad = too_large("text", text.as_buffer().size, config.max_text_bytes)
    elif reason == "too_large":
        bad = too_large("id", doc_id.as_buffer().size, MAX_ID_BYTES)
    else:
        what = {"invalid_utf8": "bytes that are not UTF-8", "null_id": "null", "null_text": "null"}.get(reason, "blank")
        names = columns.text_columns if of_text else (str(columns.id_column),)
        bad = BadRow(reason, f"{', '.join(repr(name) for name in names)}: {what}")
    return {
        "source": source,
        "row": row,
        "doc_id": doc_id.as_py() if of_text else None,
        "outcome": "rejected",
        "reason": reason,
        "detail": safe_detail(bad.detail),
    }
