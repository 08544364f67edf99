"""Hashes of a group of pieces, written by pass, so that a pass reads what is its own and every piece is read once.

A pass takes the hashes whose first word leaves one remainder. A run holds rows (words, place, number of chunks), those of
a pass together, in source order within it. Shapes: N documents, W words of a hash, P passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from operators.piece_store import READ_AHEAD
from operators.row_ids import DocumentHashes
from operators.storage.checked import CheckedFile, ObjectEntry, put_checked
from operators.storage.store import Store


@dataclass(frozen=True)
class HashRun:
    """Where the hashes of a group are: those of pass p are the rows starts_P[p] .. starts_P[p + 1] of the object."""

    entry: ObjectEntry
    words: int
    starts_P: npt.NDArray[np.int64]  # one more than there are passes


def write_hash_run(store: Store, key: str, hashes: DocumentHashes, passes: int) -> HashRun:
    """Store the hashes of a group for so many passes."""
    pass_N = hashes.words_NW[:, 0] % np.uint64(passes)
    order = np.argsort(pass_N, kind="stable")
    words = hashes.words_NW.shape[1]
    rows = np.empty(len(order), _row_type(words))
    rows["words"] = hashes.words_NW[order]
    rows["place"] = hashes.place_N[order]
    rows["num_chunks"] = hashes.num_chunks_N[order]
    starts_P = np.searchsorted(pass_N[order], np.arange(passes + 1, dtype=np.uint64))
    return HashRun(put_checked(store, key, rows.tobytes()), words, starts_P)


def read_pass(store: Store, runs: Sequence[HashRun], number: int) -> DocumentHashes:
    """The hashes of one pass from the runs of all groups, in source order as the runs are. Raises IntegrityError."""
    ends = np.cumsum([0, *(run.starts_P[number + 1] - run.starts_P[number] for run in runs)]).tolist()
    words = runs[0].words
    found = DocumentHashes(
        np.empty((ends[-1], words), np.uint64), *(np.empty(ends[-1], t) for t in (np.int64, np.int32))
    )
    row_type = _row_type(words)

    def fill(index: int) -> None:
        run, here = runs[index], slice(ends[index], ends[index + 1])
        if here.start == here.stop:
            return
        start, stop = (run.starts_P[number : number + 2] * row_type.itemsize).tolist()
        rows = np.frombuffer(CheckedFile(store, run.entry).read_range(start, stop), row_type)
        found.words_NW[here], found.place_N[here] = rows["words"], rows["place"]
        found.num_chunks_N[here] = rows["num_chunks"]

    with ThreadPoolExecutor(READ_AHEAD) as pool:
        list(pool.map(fill, range(len(runs))))
    return found


def _row_type(words: int) -> np.dtype[np.void]:
    return np.dtype([("words", "<u8", (words,)), ("place", "<i8"), ("num_chunks", "<i4")])
