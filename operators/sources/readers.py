"""Reads a piece into rows and rejects, whatever its source is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from operators.errors import IntegrityError
from operators.schemas import REJECTS, ROWS
from operators.sources.failures import reading
from operators.sources.listing import SourceObject
from operators.sources.parquet_rows import parquet_rows
from operators.sources.pieces import Piece
from operators.sources.read_config import ReadConfig
from operators.sources.rows import PieceRows, RowCollector
from operators.sources.streams import chunks, decompressed, lines_of_range, opened
from operators.storage.checked import CheckedFile, ObjectEntry
from operators.storage.filesystem import filesystem_for, is_local
from operators.storage.store import Store

__all__ = ["PieceReader", "PieceRows", "ReadConfig"]

FILE_THREADS = 16


class PieceReader:
    """Operator from a piece to its rows. The same piece and configuration give the same tables, byte for byte.

    Raises SourceError for an object that cannot be read, SourceChangedError for one that is not the listed one,
    IntegrityError for a damaged staged slice.
    """

    def __init__(self, config: ReadConfig, store: Store | None = None) -> None:
        """`store`: where staged slices lie; other pieces need none."""
        self._config = config
        self._store = store

    def read(self, piece: Piece) -> PieceRows:
        """Good rows (ROWS) and bad ones (REJECTS), each in source order."""
        if piece.kind == "row_groups":
            return self._read_row_groups(piece)
        if piece.kind == "byte_range":
            return self._read_byte_range(piece)
        if piece.kind == "files":
            return self._read_files(piece)
        assert self._store is not None, "staged pieces need the store of the index root"
        return _read_staged(piece, self._store)

    def _read_row_groups(self, piece: Piece) -> PieceRows:
        (obj,) = piece.objects
        assert piece.columns is not None
        with (
            opened(obj) as file,
            reading(obj),
            pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True) as parquet,
        ):
            # One thread: the pieces are what runs in parallel.
            table = parquet.read_row_groups(range(piece.start, piece.end), piece.columns.names, use_threads=False)
        if piece.rows_of_groups is not None:
            low, high = piece.rows_of_groups
            table = table.slice(low, high - low)
        return parquet_rows(table, piece.columns, obj.source, piece.first_row, self._config)

    def _read_byte_range(self, piece: Piece) -> PieceRows:
        (obj,) = piece.objects
        collector = RowCollector(piece.columns, self._config)
        with opened(obj) as file:
            for offset, line in lines_of_range(obj, file, piece.start, piece.end):
                collector.add_json_line(obj.source, offset, line)
        return collector.finish()

    def _read_files(self, piece: Piece) -> PieceRows:
        collector = RowCollector(None, self._config)
        # Requests to an object store take tens of milliseconds each; a local disk needs no threads.
        remote = not is_local(filesystem_for(piece.objects[0].uri)[0])
        with ThreadPoolExecutor(FILE_THREADS if remote else 1) as pool:
            for obj, content in zip(piece.objects, pool.map(self._file_content, piece.objects), strict=True):
                collector.add_file(obj.source, content)
        return collector.finish()

    def _file_content(self, obj: SourceObject) -> bytes:
        """The file's bytes, decompressed; of a file over the limit, one byte more than the limit."""
        wanted = self._config.max_text_bytes + 1
        parts: list[bytes] = []
        with decompressed(obj) as file:
            for chunk in chunks(obj, file, first_bytes=wanted):
                parts.append(chunk)
                wanted -= len(chunk)
                if wanted <= 0:
                    break
        return b"".join(parts)[: self._config.max_text_bytes + 1]


def _read_staged(piece: Piece, store: Store) -> PieceRows:
    staged = piece.staged
    assert staged is not None
    rows = _staged_table(store, staged.rows, ROWS, staged.num_rows)
    return PieceRows(rows, _staged_table(store, staged.rejects, REJECTS, staged.num_rejects))


def _staged_table(store: Store, entry: ObjectEntry | None, schema: pa.Schema, num_rows: int) -> pa.Table:
    if entry is None:
        return schema.empty_table()
    table = pq.read_table(CheckedFile(store, entry), use_threads=False)
    if table.num_rows != num_rows or not table.schema.equals(schema):
        raise IntegrityError(
            f"staged object {store.url}/{entry.key} must hold {num_rows} rows of {schema.names}, found {table.num_rows}"
            f" of {table.schema.names}; build again with --fresh"
        )
    return table
