"""Small segments of a version, read into memory and joined list by list: many nightly deltas are searched like one.

J entries of all joined segments, d dimensions, L lists, B bytes of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from operators.artifact.deletions import read_deleted
from operators.artifact.list_run import RunReader
from operators.artifact.manifest import Manifest, Segment
from operators.errors import IntegrityError
from operators.storage.store import Store

# Bytes of codes, row ids and vectors that an open index holds of segments after the base: at d = 384 some 300,000 rows.
JOINED_BYTES = 256 << 20

Ints = npt.NDArray[np.int64]


def segments_to_join(manifest: Manifest, code_size: int, joined_bytes: int = JOINED_BYTES) -> list[int]:
    """Numbers, ascending, of the segments after the base that are joined: the smallest, as many as fit."""
    row_bytes = 2 * manifest.d + code_size + 16
    chosen, held = [], 0
    for number in sorted(range(1, len(manifest.segments)), key=lambda n: (manifest.segments[n].num_rows, n)):
        held += manifest.segments[number].num_rows * row_bytes
        if held > joined_bytes:
            break
        chosen.append(number)
    return sorted(chosen)


@dataclass
class LoadedSegment:
    """All entries of a segment, in list order."""

    first_entry: int  # number of its first entry in the version
    list_no_n: npt.NDArray[np.int32]
    row_ids_n: Ints
    codes_nB: npt.NDArray[np.uint8]
    vectors_nd: npt.NDArray[np.float16]
    live_n: npt.NDArray[np.bool_]


def load_segment(store: Store, segment: Segment, readers: Sequence[RunReader], first_entry: int) -> LoadedSegment:
    """The segment's entries, each byte checked. Raises IntegrityError."""
    codes = [reader.read_codes(reader.first_list, reader.end_list) for reader in readers]
    row_ids = np.concatenate([row_ids for _, row_ids, _ in codes])
    place = row_ids - segment.first_row_id
    if len(place) != segment.num_rows or (len(place) and (place.min() < 0 or place.max() >= segment.num_rows)):
        raise IntegrityError(
            f"segment {segment.name} must hold the row ids {segment.first_row_id}..{segment.first_row_id + segment.num_rows - 1},"
            f" its lists hold {len(place)} others; run `vectormill verify`"
        )
    return LoadedSegment(
        first_entry,
        np.concatenate([list_no for list_no, _, _ in codes]),
        row_ids,
        np.concatenate([code for _, _, code in codes]),
        np.concatenate([reader.read_vectors(0, reader.facts["num_entries"]) for reader in readers]),
        ~read_deleted(store, segment)[place],
    )


class JoinedSegments:
    """Entries of segments in memory; `inverted_lists` holds the live ones, under their entry numbers as ids."""

    def __init__(self, segments: Sequence[LoadedSegment], nlist: int, code_size: int) -> None:
        import faiss

        self._first_entries = np.array([s.first_entry for s in segments], np.int64)
        self._starts = np.concatenate([[0], np.cumsum([len(s.row_ids_n) for s in segments])])
        self.row_ids_J = np.concatenate([s.row_ids_n for s in segments])
        self.vectors_Jd = np.concatenate([s.vectors_nd for s in segments])
        self.live_J = np.concatenate([s.live_n for s in segments])
        self.num_live = int(self.live_J.sum())
        entries = np.concatenate([np.arange(len(s.row_ids_n)) + s.first_entry for s in segments])
        list_no = np.concatenate([s.list_no_n for s in segments])
        codes = np.concatenate([s.codes_nB for s in segments])
        kept = np.flatnonzero(self.live_J)
        order = kept[np.argsort(list_no[kept], kind="stable")]
        entries, codes, list_no = entries[order], np.ascontiguousarray(codes[order]), list_no[order]
        self.inverted_lists = faiss.ArrayInvertedLists(nlist, code_size)
        bounds = [*np.flatnonzero(np.diff(list_no, prepend=-1)).tolist(), len(list_no)]
        for lo, hi in pairwise(bounds):
            self.inverted_lists.add_entries(
                int(list_no[lo]), hi - lo, faiss.swig_ptr(entries[lo:hi]), faiss.swig_ptr(codes[lo:hi])
            )

    def places_of(self, entries_n: Ints) -> Ints:
        """Where entries int64 [n] of the version lie in the arrays of J; -1 for those of other segments."""
        segment = np.searchsorted(self._first_entries, entries_n, side="right") - 1
        offset = entries_n - self._first_entries[segment]
        here = (segment >= 0) & (offset < self._starts[segment + 1] - self._starts[segment])
        return np.where(here, offset + self._starts[segment], -1)
