"""A shard: the entries of a group of committed pieces as a list-sorted run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from operators import schemas
from operators.artifact.list_run import RunSlice, write_run
from operators.artifact.quantizer import Quantizer
from operators.errors import IntegrityError
from operators.piece_store import kept_mask, read_table, vectors_of
from operators.storage.commits import CommitRecord, commit, new_attempt
from operators.storage.store import Store


@dataclass(frozen=True)
class PieceOfShard:
    """A committed piece with the row ids of its chunks and the documents left out."""

    record: CommitRecord
    first_row_id: int
    num_rows: int
    dropped_docs: list[int]


def build_shard(
    store: Store, key_prefix: str, pieces: Sequence[PieceOfShard], quantizer: Quantizer, inputs: str
) -> CommitRecord:
    """Assign and encode the pieces' vectors, sort by (list_no, row_id), write and commit the run.

    Holds the whole shard in memory: its size is bounded by `index.shard_rows`.
    """
    slices = [_encode_piece(store, piece, quantizer) for piece in pieces]
    list_no = np.concatenate([s.list_no for s in slices])
    order = np.argsort(list_no, kind="stable")  # pieces come in row-id order, so row ids ascend within a list
    shard = RunSlice(
        list_no[order],
        np.concatenate([s.row_ids for s in slices])[order],
        np.concatenate([s.codes for s in slices])[order],
        np.concatenate([s.vectors for s in slices])[order],
        pa.concat_tables([s.rows for s in slices]).take(pa.array(order)),
    )
    return commit_shard(store, key_prefix, shard, quantizer, inputs)


def commit_shard(
    store: Store,
    key_prefix: str,
    shard: RunSlice,
    quantizer: Quantizer,
    inputs: str,
    further_facts: Mapping[str, Any] | None = None,
) -> CommitRecord:
    """Write and commit entries that are ordered by (list_no, row_id) as a run over all lists."""
    attempt = new_attempt()
    sizes = np.bincount(shard.list_no, minlength=quantizer.nlist)
    with write_run(
        store,
        f"{key_prefix}-{attempt}",
        list_sizes_L=sizes,
        first_list=0,
        code_size=quantizer.code_size,
        d=quantizer.d,
        rows_schema=shard.rows.schema,
    ) as (writer, finished):
        writer.append(shard, quantizer.nlist)
    facts = {**finished.facts, "quantizer": quantizer.digest, **(further_facts or {})}
    name = key_prefix.rsplit("/", 1)[1]
    return commit(store, f"{key_prefix}.json", CommitRecord(f"shard {name}", inputs, attempt, finished.objects, facts))


def _encode_piece(store: Store, piece: PieceOfShard, quantizer: Quantizer) -> RunSlice:
    table = read_table(store, piece.record.objects["encoded"])
    kept = kept_mask(table.column("chunk_no").to_numpy(), piece.dropped_docs)
    if not kept.all():
        table = table.filter(pa.array(kept))
    if table.num_rows != piece.num_rows:
        raise IntegrityError(
            f"{piece.record.unit} holds {table.num_rows} rows, its place in the index was sized for {piece.num_rows}"
        )
    vectors = vectors_of(table)
    if vectors.shape[1] != quantizer.d:
        raise IntegrityError(
            f"{piece.record.unit} has vectors of {vectors.shape[1]} dimensions, the quantizer {quantizer.d}"
        )
    list_no, codes = quantizer.encode(vectors)
    row_ids = np.arange(piece.first_row_id, piece.first_row_id + piece.num_rows, dtype=np.int64)
    columns = [pa.array(row_ids), pa.array(list_no, pa.int32())]
    schema = schemas.row_store(table.schema)
    columns += [table.column(name) for name in schema.names[2:]]
    return RunSlice(list_no, row_ids, codes, vectors, pa.table(columns, schema=schema))
