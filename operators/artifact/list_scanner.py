"""The best entries of the probed lists by their codes, over all segments of a version. Deleted rows are never among them.

Q queries, d dimensions, p probed lists, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.topk import merge_topk
from operators.artifact.joined_segments import JoinedSegments
from operators.artifact.mapped_segment import MappedSegment
from operators.artifact.quantizer import Quantizer

SPARE = 16  # candidates asked for beyond the expected number of deleted ones among them

TERMS_AT_ONCE = 2 << 20  # queries * candidates of one scan for entries that are few among others: bounds memory

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

    def probes(self, queries_Qd: Floats, nprobe: int) -> Probes:
        """The nprobe lists nearest to each query."""
        found: Probes = self._faiss.quantizer.search(queries_Qd, nprobe)
        return found

    def best(self, queries_Qd: Floats, probes: Probes, wanted: int, among: Ints | None = None) -> tuple[Floats, Ints]:
        """The `wanted` best live entries: scores float32 [Q, wanted], larger is better, and entry numbers int64.

        among: only of these entries, int64 ascending, all live. Where the lists hold fewer: -inf and -1. Checks the lists
        first: raises IntegrityError. Ties go to the lowest entry where there are several segments, and are as faiss
        leaves them in one.
        """
        found = [self._of_mapped(segment, queries_Qd, probes, wanted, among) for segment in self._mapped]
        if self._joined is not None:
            found.append(self._of_joined(self._joined, queries_Qd, probes, wanted, among))
        if len(found) == 1 and found[0][0].shape[1] == wanted:
            return found[0]
        if not found or not wanted:
            return np.empty((len(queries_Qd), 0), np.float32), np.empty((len(queries_Qd), 0), np.int64)
        return merge_topk(found, wanted)

    def _of_mapped(
        self, segment: MappedSegment, queries_Qd: Floats, probes: Probes, wanted: int, among: Ints | None
    ) -> tuple[Floats, Ints]:
        """The best live entries of one segment, in as many columns as there can be, at most `wanted`."""
        segment.check(probes[1])

        def scan(queries: Floats, probes: Probes, count: int) -> tuple[Floats, Ints]:
            scores, pairs = self._scan(segment.inverted_lists, queries, probes, count, store_pairs=True)
            return scores, segment.entries_of(pairs)

        num_taken = segment.num_live
        taken: Callable[[Ints], npt.NDArray[np.bool_]] = segment.live
        if among is not None:
            bounds = np.searchsorted(among, [segment.first_entry, segment.end_entry])
            num_taken, taken = int(bounds[1] - bounds[0]), _membership(among)
        most = int(segment.list_sizes_L[probes[1]].sum(axis=1).max(initial=0))
        return _best_of_taken(scan, queries_Qd, probes, wanted, segment.num_rows, num_taken, taken, most)

    def _of_joined(
        self, joined: JoinedSegments, queries_Qd: Floats, probes: Probes, wanted: int, among: Ints | None
    ) -> tuple[Floats, Ints]:
        def scan(queries: Floats, probes: Probes, count: int) -> tuple[Floats, Ints]:
            return self._scan(joined.inverted_lists, queries, probes, count, store_pairs=False)

        if among is None:
            return scan(queries_Qd, probes, min(wanted, joined.num_live))
        num_taken = int((joined.places_of(among) >= 0).sum())
        held = joined.num_live
        return _best_of_taken(scan, queries_Qd, probes, wanted, held, num_taken, _membership(among), held)

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
        if (labels[:, -1:] < 0).any():  # what is missing is at the end
            scores[labels < 0] = -np.inf
        return scores, labels


def _membership(among: Ints) -> Callable[[Ints], npt.NDArray[np.bool_]]:
    """Which entries (any shape, -1: none) are among these, int64 ascending."""

    def taken(entries: Ints) -> npt.NDArray[np.bool_]:
        place = np.minimum(np.searchsorted(among, entries), max(0, len(among) - 1))
        return among[place] == entries if len(among) else np.zeros(entries.shape, bool)

    return taken


def _best_of_taken(
    scan: Callable[[Floats, Probes, int], tuple[Floats, Ints]],
    queries_Qd: Floats,
    probes: Probes,
    wanted: int,
    num_rows: int,
    num_taken: int,
    taken: Callable[[Ints], npt.NDArray[np.bool_]],
    most: int,
) -> tuple[Floats, Ints]:
    """The best entries that are taken, in min(wanted, num_taken) columns, of lists that hold others as well.

    faiss takes no selector where it is to say places in the lists (store_pairs). So more are asked for by the share
    that is not taken, and twice as many again for the queries that this leaves with too few, up to `most`: as many as the
    probed lists of any query hold.
    """
    wanted = min(wanted, num_taken)
    num_others = num_rows - num_taken
    if not num_others:
        return scan(queries_Qd, probes, wanted)
    best_scores = np.full((len(queries_Qd), wanted), -np.inf, np.float32)
    best_entries = np.full((len(queries_Qd), wanted), -1, np.int64)
    most = min(most, wanted + num_others)
    if not wanted or not most:
        return best_scores, best_entries
    count = min(most, wanted * num_rows // num_taken + SPARE)
    left = np.arange(len(queries_Qd))
    while True:
        again: list[Ints] = []
        step = max(1, TERMS_AT_ONCE // count)
        for some in (left[begin : begin + step] for begin in range(0, len(left), step)):
            scores, entries = scan(queries_Qd[some], (probes[0][some], probes[1][some]), count)
            here = taken(entries)
            rank = np.cumsum(here, axis=1) - 1
            query, column = np.nonzero(here & (rank < wanted))
            place = some[query], rank[query, column]
            best_scores[place], best_entries[place] = scores[query, column], entries[query, column]
            # A last column without an entry: the lists hold no more.
            again.append(some[(rank[:, -1] + 1 < wanted) & (entries[:, -1] >= 0)])
        left = np.concatenate(again) if again else left[:0]
        if count == most or not len(left):
            return best_scores, best_entries
        count = min(most, 2 * count)
