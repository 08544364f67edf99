"""The best entries of the probed lists by their codes, over all segments of a version. Deleted rows are never among them.

Q queries, d dimensions, p probed lists, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.topk import merge_topk
from operators.artifact.joined_segments import JoinedSegments
from operators.artifact.mapped_segment import MappedSegment
from operators.artifact.quantizer import Quantizer

SPARE = 16  # candidates asked for beyond the expected number of deleted ones among them

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Probes = tuple[Floats, Ints]  # coarse distances [Q, p] and list numbers [Q, p]


class ListScanner:
    """One faiss index that scans the lists of all segments in turn: it has the quantizers and their tables once."""

    def __init__(self, quantizer: Quantizer, mapped: Sequence[MappedSegment], joined: JoinedSegments | None) -> None:
        self._faiss = quantizer.to_faiss()
        self._is_distance = quantizer.metric == "l2"
        self._mapped = [segment for segment in mapped if segment.num_live]
        self._joined = joined if joined is not None and joined.num_live else None

    def best(self, queries_Qd: Floats, nprobe: int, wanted: int) -> tuple[Floats, Ints]:
        """The `wanted` best live entries: scores float32 [Q, wanted], larger is better, and entry numbers int64.

        Where the lists hold fewer: -inf and -1. Checks the lists first: raises IntegrityError. Ties go to the lowest
        entry where there are several segments, and are as faiss leaves them in one.
        """
        probes = self._faiss.quantizer.search(queries_Qd, nprobe)
        found = [self._of_mapped(segment, queries_Qd, probes, wanted) for segment in self._mapped]
        if self._joined is not None:
            lists, count = self._joined.inverted_lists, min(wanted, self._joined.num_live)
            found.append(self._scan(lists, queries_Qd, probes, count, store_pairs=False))
        if len(found) == 1 and found[0][0].shape[1] == wanted:
            return found[0]
        if not found or not wanted:
            return np.empty((len(queries_Qd), 0), np.float32), np.empty((len(queries_Qd), 0), np.int64)
        return merge_topk(found, wanted)

    def _of_mapped(
        self, segment: MappedSegment, queries_Qd: Floats, probes: Probes, wanted: int
    ) -> tuple[Floats, Ints]:
        """The best live entries of one segment, in min(wanted, live rows) columns.

        faiss takes no selector where it is to say places in the lists (store_pairs). So more are asked for by the share
        that is deleted, and twice as many again for the queries that this leaves with too few.
        """
        segment.check(probes[1])
        wanted = min(wanted, segment.num_live)
        most = min(wanted + segment.num_deleted, segment.num_rows)
        count = min(most, wanted * segment.num_rows // segment.num_live + SPARE) if segment.num_deleted else wanted
        scores, pairs = self._scan(segment.inverted_lists, queries_Qd, probes, count, store_pairs=True)
        entries = segment.entries_of(pairs)
        if not segment.num_deleted:
            return scores, entries
        best_scores = np.full((len(queries_Qd), wanted), -np.inf, np.float32)
        best_entries = np.full((len(queries_Qd), wanted), -1, np.int64)
        left = np.arange(len(queries_Qd))
        while True:
            live = segment.live(entries)
            rank = np.cumsum(live, axis=1) - 1
            query, column = np.nonzero(live & (rank < wanted))
            place = left[query], rank[query, column]
            best_scores[place], best_entries[place] = scores[query, column], entries[query, column]
            # A last column without an entry: the lists hold no more.
            short = (rank[:, -1] + 1 < wanted) & (entries[:, -1] >= 0)
            if count == most or not short.any():
                return best_scores, best_entries
            left = left[short]
            count = min(most, 2 * count)
            some = probes[0][left], probes[1][left]
            scores, pairs = self._scan(segment.inverted_lists, queries_Qd[left], some, count, store_pairs=True)
            entries = segment.entries_of(pairs)

    def _scan(
        self, lists: Any, queries_Qd: Floats, probes: Probes, count: int, *, store_pairs: bool
    ) -> tuple[Floats, Ints]:
        """Scores of the `count` best entries of the probed lists, and their ids or (store_pairs) list_no << 32 | offset."""
        import faiss

        scores = np.empty((len(queries_Qd), count), np.float32)
        labels = np.empty((len(queries_Qd), count), np.int64)
        distances, list_no = probes
        self._faiss.replace_invlists(lists, False)
        self._faiss.nprobe = list_no.shape[1]
        p = [faiss.swig_ptr(a) for a in (queries_Qd, list_no, distances, scores, labels)]
        self._faiss.search_preassigned_c(len(queries_Qd), p[0], count, p[1], p[2], p[3], p[4], store_pairs)
        if self._is_distance:
            np.negative(scores, out=scores)
        scores[labels < 0] = -np.inf
        return scores, labels
