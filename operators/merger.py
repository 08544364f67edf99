"""Merge list-sorted runs: a task owns a range of lists, reads that slice of every run, writes one immutable run.

Memory is about five times `buffer_bytes` (or the largest single list), whatever the size of the index: a range is
worked through in sub-ranges. The same function makes published parts and, when there are too many shards to open at once,
intermediate runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from operators.artifact.list_run import CACHE_BYTES, RunReader, concat_sorted, write_run
from operators.errors import IntegrityError
from operators.storage.commits import CommitRecord, commit, new_attempt
from operators.storage.store import Store


def open_runs(
    store: Store, runs: Sequence[CommitRecord], quantizer_digest: str, cache_bytes: int = CACHE_BYTES
) -> list[RunReader]:
    """Readers of the runs. Raises IntegrityError naming a run that is missing, cut short, damaged or of another codebook."""
    readers = []
    for record in runs:
        found = record.facts.get("quantizer")
        if found != quantizer_digest:
            raise IntegrityError(
                f"{record.unit} was encoded with quantizer {found}, this index uses {quantizer_digest};"
                " merging them would return wrong neighbours; delete its record to build the shard again"
            )
        readers.append(RunReader(store, record.unit, record.objects, record.facts, cache_bytes))
    return readers


def check_inputs(runs: Sequence[CommitRecord], expected_inputs: Sequence[str]) -> None:
    """Refuse runs made for other pieces, settings or code than this index (a foreign shard)."""
    for record, inputs in zip(runs, expected_inputs, strict=True):
        if record.inputs != inputs:
            raise IntegrityError(
                f"{record.unit} was made from other inputs ({record.inputs[:12]}) than this index expects ({inputs[:12]});"
                " delete its record to build it again"
            )


def list_bytes(readers: Sequence[RunReader], nlist: int) -> np.ndarray:
    """Bytes of each list over all runs, float64 [nlist]. Raises IntegrityError for a run over other lists."""
    total = np.zeros(nlist)
    for reader in readers:
        if (reader.first_list, reader.end_list) != (0, nlist):
            raise IntegrityError(
                f"{reader.name} covers lists {reader.first_list}..{reader.end_list - 1}, expected 0..{nlist - 1}"
            )
        total += reader.bytes_per_list()
    return total


def split_lists(bytes_L: np.ndarray, first_list: int, target_bytes: float) -> list[tuple[int, int]]:
    """Contiguous ranges [first, end) of at most `target_bytes`, or of one list where that alone is larger."""
    ranges: list[tuple[int, int]] = []
    start, held = 0, 0.0
    for number, size in enumerate(bytes_L.tolist()):
        if held and held + size > target_bytes:
            ranges.append((first_list + start, first_list + number))
            start, held = number, 0.0
        held += size
    return [*ranges, (first_list + start, first_list + len(bytes_L))]


def merge_range(
    store: Store,
    key_prefix: str,
    runs: Sequence[CommitRecord],
    lists: tuple[int, int],
    *,
    quantizer_digest: str,
    buffer_bytes: int,
    inputs: str,
) -> CommitRecord:
    """Merge lists [first, end) of all runs into one committed run; `key_prefix` names it ('.../part-00003')."""
    first, end = lists
    # Lists are read once, in order: the caches of all runs together are held to one more buffer.
    readers = open_runs(store, runs, quantizer_digest, cache_bytes=buffer_bytes // (3 * len(runs)))
    sizes = sum(
        (r.list_sizes_L[first - r.first_list : end - r.first_list] for r in readers), np.zeros(end - first, np.int64)
    )
    held = sum((r.bytes_per_list()[first - r.first_list : end - r.first_list] for r in readers), np.zeros(end - first))
    facts = runs[0].facts
    attempt = new_attempt()
    with write_run(
        store,
        f"{key_prefix}-{attempt}",
        list_sizes_L=sizes,
        first_list=first,
        code_size=facts["code_size"],
        d=facts["d"],
        rows_schema=_common_schema(readers),
    ) as (writer, finished):
        for sub_first, sub_end in split_lists(held, first, buffer_bytes):
            writer.append(concat_sorted([reader.read_lists(sub_first, sub_end) for reader in readers]), sub_end)
    kind, _, number = key_prefix.rsplit("/", 1)[1].partition("-")
    record = CommitRecord(
        f"{kind} {number}", inputs, attempt, finished.objects, {**finished.facts, "quantizer": quantizer_digest}
    )
    return commit(store, f"{key_prefix}.json", record)


def _common_schema(readers: Sequence[RunReader]) -> pa.Schema:
    """Schema of the runs' row stores. Raises IntegrityError naming a run that has other columns than the first."""
    first = readers[0]
    for reader in readers[1:]:
        if not reader.rows_schema.equals(first.rows_schema):
            raise IntegrityError(
                f"{reader.name} has row store columns {reader.rows_schema.names}, {first.name} has"
                f" {first.rows_schema.names}; delete its record to build the shard again"
            )
    return first.rows_schema
