"""Merge list-sorted runs: a task owns a range of lists, reads that slice of every run, writes one immutable run.

Memory is about five times `buffer_bytes` (or the largest single list), whatever the size of the index: a range is
worked through in sub-ranges. The same function makes published parts and, when there are too many shards to open at once,
intermediate runs; and it makes the parts of one segment from those of several, without their deleted rows.
Shape letters: n entries, L lists, W words of 8 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from operators import schemas
from operators.artifact.list_run import CACHE_BYTES, RunReader, RunSlice, concat_sorted, splitmix64, write_run
from operators.errors import IntegrityError
from operators.renumbering import Renumbering
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
    renumbering: Renumbering | None = None,
) -> CommitRecord:
    """Merge lists [first, end) of all runs into one committed run; `key_prefix` names it ('.../part-00003').

    The runs together must cover these lists; each may cover a part of them. With `renumbering` deleted rows are left out,
    the others get their new row ids, and the record has a fact more: `entry_checksum` of what went in.
    """
    first, end = lists
    # Lists are read once, in order: the caches of all runs together are held to one more buffer.
    readers = open_runs(store, runs, quantizer_digest, cache_bytes=buffer_bytes // (3 * len(runs)))
    sizes, held = np.zeros(end - first, np.int64), np.zeros(end - first)
    for reader in readers:
        a, b = _shared_lists(reader, first, end)
        own = slice(a - reader.first_list, b - reader.first_list)
        held[a - first : b - first] += reader.bytes_per_list()[own]
        if renumbering is None or not renumbering.num_deleted:
            sizes[a - first : b - first] += reader.list_sizes_L[own]
        else:
            sizes[a - first : b - first] += _live_sizes(reader, a, b, renumbering, buffer_bytes)
    facts = runs[0].facts
    attempt = new_attempt()
    checksum = 0
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
            shared = [(reader, *_shared_lists(reader, sub_first, sub_end)) for reader in readers]
            slices = [reader.read_lists(a, b) for reader, a, b in shared if a < b]
            if renumbering is not None:
                slices = [renumbered(entries, renumbering) for entries in slices]
                checksum += sum(entry_checksum(s.row_ids, s.list_no, s.codes, s.vectors) for s in slices)
            writer.append(concat_sorted(slices), sub_end)
    kind, _, number = key_prefix.rsplit("/", 1)[1].partition("-")
    found = {**finished.facts, "quantizer": quantizer_digest}
    if renumbering is not None:
        found["entry_checksum"] = checksum % 2**64
    record = CommitRecord(f"{kind} {number}", inputs, attempt, finished.objects, found)
    return commit(store, f"{key_prefix}.json", record)


def _shared_lists(reader: RunReader, first: int, end: int) -> tuple[int, int]:
    """The lists [a, b) that the run has of [first, end); a == b where it has none."""
    a = min(max(first, reader.first_list), end)
    return a, max(a, min(end, reader.end_list))


def _live_sizes(reader: RunReader, first: int, end: int, renumbering: Renumbering, buffer_bytes: int) -> np.ndarray:
    """Live entries of each of the lists [first, end), int64 [end - first]."""
    sizes = np.zeros(end - first, np.int64)
    in_lists = reader.list_sizes_L[first - reader.first_list : end - reader.first_list]
    for a, b in split_lists(in_lists * (reader.facts["code_size"] + 8.0), first, buffer_bytes):
        list_no, row_ids, _ = reader.read_codes(a, b)
        live_n, _ = renumbering.find(row_ids)
        sizes[a - first : b - first] = np.bincount(list_no[live_n] - a, minlength=b - a)
    return sizes


def renumbered(entries: RunSlice, renumbering: Renumbering) -> RunSlice:
    """The live ones of the entries, with their new row ids."""
    live_n, row_ids = renumbering.find(entries.row_ids)
    if not live_n.all():
        row_ids, rows = row_ids[live_n], entries.rows.filter(pa.array(live_n))
        entries = RunSlice(entries.list_no[live_n], row_ids, entries.codes[live_n], entries.vectors[live_n], rows)
    rows = entries.rows.set_column(0, schemas.ROW_STORE.field("row_id"), pa.array(row_ids))
    return RunSlice(entries.list_no, row_ids, entries.codes, entries.vectors, rows)


def entry_checksum(row_ids: np.ndarray, *columns: np.ndarray) -> int:
    """Order-free checksum of which values the rows have in the columns [n] or [n, ...]; adds over disjoint sets modulo 2^64.

    A multilinear hash of each row's values, mixed with its id: what an entry loses, or gets of another one, is seen.
    """
    total = splitmix64(row_ids.astype(np.uint64))
    for number, column in enumerate(columns):
        width = column[:1].nbytes
        padded_nW = np.zeros((len(column), -(-width // 8)), np.uint64)
        padded_nW.view(np.uint8)[:, :width] = np.ascontiguousarray(column).view(np.uint8).reshape(len(column), width)
        weights_W = splitmix64(np.arange(padded_nW.shape[1], dtype=np.uint64) + np.uint64(number << 32)) | np.uint64(1)
        total = splitmix64(total ^ np.einsum("nw,w->n", padded_nW, weights_W))
    return int(total.sum(dtype=np.uint64))


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
