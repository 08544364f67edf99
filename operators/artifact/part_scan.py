"""Exhaustive search over the stored vectors of a version by groups of parts, each read alone: no index is opened.

What all groups find together is what `Index.exact_search` finds, to the bit: a pair's score does not depend on how rows
come in blocks (kernels/topk.py), and equal scores go by entry, whose numbers are those of the version.
Q queries, d dimensions, k hits, n entries of a part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from kernels.topk import exact_search, merge_topk
from operators.artifact.deletions import read_bitmap
from operators.artifact.list_run import RunReader
from operators.artifact.manifest import Manifest, Segment, read_part_record
from operators.errors import IntegrityError
from operators.storage.store import Store

GROUP_ROWS = 1 << 20  # scanned by one core in some 10 s for 256 queries of 384 dimensions
MOST_GROUPS = 512  # each gives its k best of every query
BLOCK_ROWS = 65_536
MERGED_AT_ONCE = 32

Best = tuple[
    npt.NDArray[np.float32], npt.NDArray[np.int64]
]  # scores and entries [Q, k], best first; -inf and -1: fewer


@dataclasses.dataclass(frozen=True)
class PartsToScan:
    """Consecutive parts of a segment, which holds no others here, and the number of their first entry in the version."""

    segment: Segment
    first_entry: int


def scan_groups(manifest: Manifest, from_row_id: int = 0, group_rows: int = GROUP_ROWS) -> list[list[PartsToScan]]:
    """All parts that hold live rows, in order, in groups of about so many rows, or of more where there would be too many groups.

    from_row_id: only of the segments from this row id on.
    """
    rows = sum(s.num_rows for s in manifest.segments if s.first_row_id >= from_row_id)
    group_rows = max(group_rows, -(-rows // MOST_GROUPS))
    groups: list[list[PartsToScan]] = []
    first_entry, held = 0, group_rows
    for segment in manifest.segments:
        wanted = segment.first_row_id >= from_row_id and segment.num_live > 0
        for ref in segment.parts:
            if wanted and ref.num_entries:
                if held + ref.num_entries > group_rows:
                    groups.append([])
                    held = 0
                if groups[-1] and groups[-1][-1].segment.name == segment.name:
                    groups[-1][-1].segment.parts.append(ref)
                else:
                    groups[-1].append(PartsToScan(dataclasses.replace(segment, parts=[ref]), first_entry))
                held += ref.num_entries
            first_entry += ref.num_entries
    return groups


def scan_parts(store: Store, group: Sequence[PartsToScan], queries_Qd: np.ndarray, k: int, metric: str) -> Best:
    """The k best live entries of the group for queries float32 [Q, d]; ties go to the lowest entry. Raises IntegrityError."""
    first_rows, live_entries = [0], []  # of each block: number of its first live row; entries of its live rows

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for parts in group:
            for entries, vectors in _live_blocks(store, parts):
                live_entries.append(entries)
                first_rows.append(first_rows[-1] + len(entries))
                yield first_rows[-2], vectors

    scores, rows = exact_search(queries_Qd, blocks(), k, metric=metric)
    found = np.full(rows.shape, -1, np.int64)
    block_of = np.searchsorted(first_rows, rows, side="right") - 1
    for number in np.unique(block_of[rows >= 0]).tolist():
        here = (block_of == number) & (rows >= 0)
        found[here] = live_entries[number][rows[here] - first_rows[number]]
    return scores, found


def best_of_groups(found: Sequence[Best], k: int) -> Best:
    """The k best of what the groups found, at least one; ties go to the lowest entry."""
    best = found[0]
    for begin in range(1, len(found), MERGED_AT_ONCE):
        best = merge_topk([best, *found[begin : begin + MERGED_AT_ONCE]], k)
    return best


def _live_blocks(store: Store, parts: PartsToScan) -> Iterator[tuple[npt.NDArray[np.int64], np.ndarray]]:
    """Entries int64 [n] and vectors float16 [n, d] of the live rows, some at a time; the next are being read meanwhile."""
    bitmap = read_bitmap(store, parts.segment) if parts.segment.num_deleted else None
    first_entry = parts.first_entry
    with ThreadPoolExecutor(1) as pool:  # one: a reader is used by one thread at a time
        for ref in parts.segment.parts:
            record = read_part_record(store, ref)
            reader = RunReader(store, ref.record_key, record.objects, record.facts)
            live = _live(reader, parts.segment, bitmap) if bitmap is not None else np.ones(ref.num_entries, bool)
            starts = list(range(0, ref.num_entries, BLOCK_ROWS))
            ahead = pool.submit(reader.read_vectors, 0, min(BLOCK_ROWS, ref.num_entries))
            for lo in starts:
                vectors, hi = ahead.result(), min(lo + BLOCK_ROWS, ref.num_entries)
                ahead = pool.submit(reader.read_vectors, hi, min(hi + BLOCK_ROWS, ref.num_entries))
                kept = live[lo:hi]
                yield np.flatnonzero(kept) + (first_entry + lo), vectors if kept.all() else vectors[kept]
            first_entry += ref.num_entries


def _live(reader: RunReader, segment: Segment, bitmap: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """bool [n]: which entries of the part are not deleted."""
    place = reader.read_codes(reader.first_list, reader.end_list)[1] - segment.first_row_id
    if place.min() < 0 or place.max() >= segment.num_rows:
        raise IntegrityError(
            f"{reader.name}: row ids {place.min() + segment.first_row_id}..{place.max() + segment.first_row_id} do not belong to"
            f" their segment ({segment.first_row_id}..{segment.first_row_id + segment.num_rows - 1}); run `vectormill verify`"
        )
    deleted: npt.NDArray[np.bool_] = (bitmap[place >> 3] >> (place & 7).astype(np.uint8)) & 1 == 1
    return ~deleted
