"""Cuts an object that cannot be sliced (compressed, CSV, huge row groups) into stored slices, in one streaming pass."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pyarrow as pa
import pyarrow.parquet as pq

from operators.crash_points import crash_point
from operators.settings import digest_of, semantic_fields
from operators.sources.columns import check_parquet_types, columns_of_lines, resolve_columns
from operators.sources.csv_records import csv_records
from operators.sources.failures import reading
from operators.sources.listing import SourceObject
from operators.sources.parquet_rows import parquet_rows
from operators.sources.pieces import Piece, StagedSlice
from operators.sources.read_config import ReadConfig
from operators.sources.rows import BadRow, PieceRows, RowCollector
from operators.sources.streams import CHUNK_BYTES, chunks, decompressed, lines, opened
from operators.storage.checked import ObjectEntry, write_checked
from operators.storage.commits import CommitRecord, commit, new_attempt, read_record
from operators.storage.store import Store

# Rows of Parquet that are decoded at a time; fewer where they are long.
BATCH_ROWS = 256


def stage_object(obj: SourceObject, config: ReadConfig, store: Store, prefix: str) -> list[Piece]:
    """Pieces of `obj`, whose rows and rejects lie below `prefix`. A second call finds the commit record, reads nothing.

    Memory is bounded by one slice (`piece_rows` rows, `piece_bytes` of text), not by the object. A slice's content does
    not depend on the attempt. Raises SourceError for a damaged or changed object; then nothing is committed.
    """
    inputs = digest_of({"object": obj.to_json(), "read": semantic_fields(config)})
    key = f"{prefix}/{inputs[:32]}.json"
    record = read_record(store, key)
    if record is None:
        attempt = new_attempt()
        writer = _SliceWriter(store, f"{prefix}/{inputs[:32]}-{attempt}")
        try:
            for batch in _batches(obj, config):
                writer.write(batch)
        except BaseException:
            writer.discard()
            raise
        facts = {"slices": [list(counts) for counts in writer.counts]}
        record = commit(store, key, CommitRecord(f"staged {obj.uri}", inputs, attempt, writer.entries, facts))
    return _pieces(obj, record)


def _pieces(obj: SourceObject, record: CommitRecord) -> list[Piece]:
    pieces: list[Piece] = []
    first = 0
    for number, (num_rows, num_rejects) in enumerate(record.facts["slices"]):
        rows, rejects = (record.objects.get(f"{number:05d}.{role}") for role in ("rows", "rejects"))
        end = first + num_rows + num_rejects
        staged = StagedSlice(rows, rejects, num_rows, num_rejects)
        pieces.append(Piece((obj,), "staged", first, end, first, None, staged))
        first = end
    return pieces


class _SliceWriter:
    """Writes slices under the keys of one attempt; `entries` by role are what the commit record names."""

    def __init__(self, store: Store, stem: str) -> None:
        self._store, self._stem = store, stem
        self.entries: dict[str, ObjectEntry] = {}
        self.counts: list[tuple[int, int]] = []  # good rows, rejects

    def write(self, batch: PieceRows) -> None:
        number = f"{len(self.counts):05d}"
        for role, table in (("rows", batch.rows), ("rejects", batch.rejects)):
            if table.num_rows:
                suffix = "" if role == "rows" else "-rejects"
                with write_checked(self._store, f"{self._stem}-{number}{suffix}.parquet") as pending:
                    # Read once and soon: fast to write matters more than small. Texts rarely repeat.
                    pq.write_table(
                        table, pending.file, compression="zstd", use_dictionary=False, write_statistics=False
                    )
                assert pending.entry is not None
                self.entries[f"{number}.{role}"] = pending.entry
        self.counts.append((batch.rows.num_rows, batch.rejects.num_rows))
        crash_point("staged.slice_written")

    def discard(self) -> None:
        """Delete what was written."""
        for entry in self.entries.values():
            self._store.delete(entry.key)


def _batches(obj: SourceObject, config: ReadConfig) -> Iterator[PieceRows]:
    """The object's rows, one slice at a time."""
    if obj.format == "parquet":
        return _parquet_batches(obj, config)
    columns, names = columns_of_lines(obj, config)
    collector = RowCollector(columns, config)
    rows = _json_rows(obj, collector) if obj.format == "jsonl" else _csv_rows(obj, names or (), collector)
    return _collected(rows, collector, config)


def _collected(rows: Iterator[None], collector: RowCollector, config: ReadConfig) -> Iterator[PieceRows]:
    for _ in rows:
        if collector.num_rows_read >= config.piece_rows or collector.text_bytes >= config.piece_bytes:
            yield collector.finish()
    if collector.num_rows_read:
        yield collector.finish()


def _json_rows(obj: SourceObject, collector: RowCollector) -> Iterator[None]:
    with decompressed(obj) as file:
        for offset, line in lines(chunks(obj, file)):
            collector.add_json_line(obj.source, offset, line)
            yield


def _csv_rows(obj: SourceObject, header: Sequence[str], collector: RowCollector) -> Iterator[None]:
    with decompressed(obj) as file:
        records = csv_records(obj, chunks(obj, file))
        next(records, None)
        for row, fields in enumerate(records):
            if isinstance(fields, csv.Error):
                collector.reject(obj.source, row, BadRow("bad_csv", str(fields)))
            elif len(fields) != len(header):
                detail = f"{len(fields)} fields, the header has {len(header)}"
                collector.reject(obj.source, row, BadRow("bad_csv", detail))
            else:
                collector.add_record(obj.source, row, dict(zip(header, fields, strict=True)))
            yield


def _parquet_batches(obj: SourceObject, config: ReadConfig) -> Iterator[PieceRows]:
    held: list[PieceRows] = []
    held_rows, held_bytes, first_row = 0, 0, 0
    # Without pre_buffer and with a buffer size pages are read as they are needed, not whole row groups.
    options = {"pre_buffer": False, "buffer_size": CHUNK_BYTES, "page_checksum_verification": True}
    with ExitStack() as stack:
        file = stack.enter_context(opened(obj, read_ahead=True))
        with reading(obj):
            parquet = stack.enter_context(pq.ParquetFile(file, **options))
        columns = resolve_columns(obj, parquet.schema_arrow.names, config)
        check_parquet_types(obj, parquet.schema_arrow, columns)
        tables = parquet.iter_batches(min(BATCH_ROWS, config.piece_rows), columns=columns.names, use_threads=False)
        while True:
            with reading(obj):
                decoded = next(tables, None)
            if decoded is None:
                break
            batch = parquet_rows(pa.Table.from_batches([decoded]), columns, obj.source, first_row, config)
            first_row += decoded.num_rows
            if held and (
                held_rows + batch.num_rows_read > config.piece_rows
                or held_bytes + batch.text_bytes > config.piece_bytes
            ):
                yield _concatenated(held)
                held, held_rows, held_bytes = [], 0, 0
            held.append(batch)
            held_rows, held_bytes = held_rows + batch.num_rows_read, held_bytes + batch.text_bytes
        if held:
            yield _concatenated(held)


def _concatenated(batches: list[PieceRows]) -> PieceRows:
    return PieceRows(
        pa.concat_tables([batch.rows for batch in batches]).combine_chunks(),
        pa.concat_tables([batch.rejects for batch in batches]).combine_chunks(),
    )
