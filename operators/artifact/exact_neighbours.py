"""The exact neighbours of the query sample, kept with a version: from them and from what is new follow those of the next.

So measuring recall after an update costs a scan of the new rows, not of the whole index. Q queries, K neighbours kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from operators import schemas
from operators.artifact.deletions import live_rows
from operators.artifact.index import Index, Neighbours
from operators.artifact.manifest import Manifest
from operators.artifact.part_scan import Best
from operators.piece_store import read_table, write_table
from operators.storage.checked import ObjectEntry
from operators.storage.store import Store

KEPT = 64  # of each query; an update that deletes all but fewer than are asked for scans everything once


@dataclass
class ExactNeighbours:
    """Of each query the row ids of the best rows, best first, and their scores; as many as are known to be the best."""

    row_ids: list[npt.NDArray[np.int64]]
    scores: list[npt.NDArray[np.float32]]

    def first(self, k: int) -> list[npt.NDArray[np.int64]]:
        """Row ids of the k best of each query, or of all that there are."""
        return [rows[:k] for rows in self.row_ids]


def write_exact(store: Store, key: str, exact: ExactNeighbours) -> ObjectEntry:
    """Store them, a row a query (schemas.EXACT)."""
    columns = [pa.array(exact.row_ids, pa.list_(pa.int64())), pa.array(exact.scores, pa.list_(pa.float32()))]
    return write_table(store, key, pa.table(columns, schema=schemas.EXACT))


def read_exact(store: Store, entry: ObjectEntry) -> ExactNeighbours:
    """Raises IntegrityError when the object is damaged."""
    table = read_table(store, entry)
    row_ids = [np.array(rows, np.int64) for rows in table.column("row_ids").to_pylist()]
    return ExactNeighbours(row_ids, [np.array(scores, np.float32) for scores in table.column("scores").to_pylist()])


def exact_neighbours(index: Index, queries_Qd: npt.NDArray[np.float32], scanned: Best | None = None) -> ExactNeighbours:
    """By a scan of all live rows; scanned: the KEPT best that scans of all groups of parts found."""
    found = _found(index, queries_Qd, scanned, 0)
    return ExactNeighbours(list(found.row_ids_Qk), list(found.scores_Qk))


def _found(index: Index, queries_Qd: npt.NDArray[np.float32], scanned: Best | None, from_row_id: int) -> Neighbours:
    if scanned is None:
        return index.exact_search(queries_Qd, KEPT, from_row_id=from_row_id)
    scores, entries = scanned
    return Neighbours(scores, index.row_ids_of(entries), entries)


def exact_after_update(
    index: Index, queries_Qd: npt.NDArray[np.float32], parent: Manifest, k: int, scanned: Best | None = None
) -> ExactNeighbours | None:
    """From the parent's, what was deleted since, and a scan of the segments that the parent does not have.

    scanned: the KEPT best that scans of all groups of those segments' parts found.
    None when rows of the parent are live again, or fewer than k neighbours of a query (or than there are rows) would be certain: then all rows have to be scanned.
    """
    store = index.store
    if parent.exact is None:
        return None
    known = read_exact(store, ObjectEntry.from_json(parent.exact))
    live, before = live_rows(store, index.manifest), live_rows(store, parent)
    if (live[: len(before)] & ~before).any():  # rows that are live again may be in no list
        return None
    new = _found(index, queries_Qd, scanned, parent.next_row_id)
    row_ids, scores = [], []
    for query in range(len(queries_Qd)):
        survives = live[known.row_ids[query]]
        old_rows, old_scores = known.row_ids[query][survives], known.scores[query][survives]
        new_rows, new_scores = new.row_ids_Qk[query], new.scores_Qk[query]
        if len(known.row_ids[query]) < parent.ntotal:  # rows beyond the parent's list may score as its last one
            least = old_scores[-1] if len(old_scores) else np.inf
            new_rows, new_scores = new_rows[new_scores >= least], new_scores[new_scores >= least]
        both_rows, both_scores = np.concatenate([old_rows, new_rows]), np.concatenate([old_scores, new_scores])
        order = np.lexsort((both_rows, -both_scores))[:KEPT]
        if len(order) < min(k, index.manifest.ntotal):
            return None
        row_ids.append(both_rows[order])
        scores.append(both_scores[order])
    return ExactNeighbours(row_ids, scores)
