"""Row ids once the deleted rows of a version are gone: dense, in the order that they had.

n row ids, W words of 64 rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from operators.artifact.deletions import read_bitmap
from operators.artifact.manifest import Segment
from operators.errors import IntegrityError
from operators.storage.store import Store

Ints = npt.NDArray[np.int64]
_ONE = np.uint64(1)


class Renumbering:
    """For every row of the segments whether it is live, and the number of live rows before it: its new row id.

    Holds two bits a row. Raises IntegrityError for a damaged bitmap.
    """

    def __init__(self, store: Store, segments: Sequence[Segment]) -> None:
        self._first_rows = np.array([segment.first_row_id for segment in segments], np.int64)
        self._end_row = segments[-1].first_row_id + segments[-1].num_rows
        self.num_deleted = sum(segment.num_deleted for segment in segments)
        num_words = [-(-segment.num_rows // 64) for segment in segments]
        self._first_words = np.concatenate([[0], np.cumsum(num_words)]).astype(np.int64)
        self._live_W = np.empty(sum(num_words), np.uint64)
        for segment, begin, count in zip(segments, self._first_words.tolist(), num_words, strict=False):
            # Bits beyond the last row count as deleted.
            packed = np.full(8 * count, 0xFF, np.uint8)
            packed[: -(-segment.num_rows // 8)] = read_bitmap(store, segment)
            words = self._live_W[begin : begin + count]
            words[:] = ~packed.view("<u8")
            if segment.num_rows % 64:
                words[-1] &= (_ONE << np.uint64(segment.num_rows % 64)) - _ONE
        counts = np.bitwise_count(self._live_W)
        self._before_W = np.cumsum(counts, dtype=np.int64) - counts

    @property
    def num_live(self) -> int:
        """Rows that are not deleted."""
        return int(self._before_W[-1] + np.bitwise_count(self._live_W[-1])) if len(self._live_W) else 0

    def find(self, row_ids_n: Ints) -> tuple[npt.NDArray[np.bool_], Ints]:
        """(live bool [n], new row ids int64 [n]) of row ids in any order; a new id is only meant for a live row."""
        if len(row_ids_n) and (row_ids_n.min() < self._first_rows[0] or row_ids_n.max() >= self._end_row):
            raise IntegrityError(
                f"row ids must be in {self._first_rows[0]}..{self._end_row - 1}, got {row_ids_n.min()}..{row_ids_n.max()}"
            )
        segment_n = np.searchsorted(self._first_rows, row_ids_n, side="right") - 1
        inside_n = row_ids_n - self._first_rows[segment_n]
        word_n = self._first_words[segment_n] + (inside_n >> 6)
        bit_n = (inside_n & 63).astype(np.uint64)
        live_n = self._live_W[word_n]
        lower_n = live_n & ((_ONE << bit_n) - _ONE)
        return (live_n >> bit_n & _ONE).astype(bool), self._before_W[word_n] + np.bitwise_count(lower_n)
