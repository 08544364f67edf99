"""What an update has to do: the ledger of the parent version and a scan of the changed objects, set against each other.

Everything follows from one rule: the live rows of a version are exactly the rows of its winners (operators/documents.py).
N documents of the new corpus, in its order; P of the parent's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from operators.documents import (
    DELETED,
    NO_TOKENS,
    TAKES_PART,
    Hashes,
    Ints,
    Ledger,
    find_rows,
    rows_of_documents,
    winners_of,
)
from operators.row_ids import Duplicates


@dataclass
class Corpus:
    """All documents of the new corpus. `object_N`: number of the source object of each; objects are consecutive."""

    ledger: Ledger
    object_N: Ints
    position_N: Ints  # in the parent's documents tables; -1: found by scanning


@dataclass
class Changes:
    """What becomes of the documents. Places are indices into the new corpus."""

    wins_N: npt.NDArray[np.bool_]
    duplicates: Duplicates
    to_encode_E: Ints  # places of the winners that have no rows yet, ascending
    live_R: npt.NDArray[np.bool_]  # the rows of the others, by row id
    counts: dict[str, int]


def inherit(corpus: Corpus, object_of_parent_P: Ints, parent: Ledger) -> None:
    """Give scanned documents what the parent's ledger knows of them; fills the corpus's ledger.

    A document that was deleted by request stays so as long as its object (`object_of_parent_P`: the number that the
    object has in the new corpus, -1 for one that is gone) holds the same text under its id; when its object is gone (or
    has another name now), wherever it is found. A text without tokens has none wherever it stands.
    """
    ledger = corpus.ledger
    scanned = np.flatnonzero(corpus.position_N < 0)
    was_deleted = np.flatnonzero((parent.state_N == DELETED) & (object_of_parent_P >= 0))
    known = _keys(parent.take(was_deleted), object_of_parent_P[was_deleted])
    again = find_rows(known, _keys(ledger.take(scanned), corpus.object_N[scanned])) >= 0
    homeless = np.flatnonzero((parent.state_N == DELETED) & (object_of_parent_P < 0))
    again |= find_rows(_keys(parent.take(homeless)), _keys(ledger.take(scanned))) >= 0
    ledger.state_N[scanned[again]] = DELETED
    spread_no_tokens(ledger, parent.text_hash_N2[parent.state_N == NO_TOKENS])


def spread_no_tokens(ledger: Ledger, text_hash_M2: Hashes) -> None:
    """Documents with one of these texts have no tokens."""
    if len(text_hash_M2):
        has_none = find_rows(text_hash_M2, ledger.text_hash_N2) >= 0
        ledger.state_N[has_none & (ledger.state_N == TAKES_PART)] = NO_TOKENS


def delete_ids(ledger: Ledger, doc_hash_M2: Hashes) -> int:
    """Mark all documents with these ids as deleted by request; the number of ids that there are documents of.

    A document without tokens stays one: it is left out already, and counted once.
    """
    found = find_rows(doc_hash_M2, ledger.doc_hash_N2)
    ledger.state_N[(found >= 0) & (ledger.state_N != NO_TOKENS)] = DELETED
    return len(np.unique(found[found >= 0]))


def find_changes(
    corpus: Corpus, parent: Ledger, parent_live_R: npt.NDArray[np.bool_], drop_equal_texts: bool
) -> Changes:
    """Winners of the new corpus, which of them must be encoded, and which rows stay. Fills row ids in the corpus's ledger.

    A winner without rows of its own takes those that the parent has for the same text under the same id, live ones
    first, whatever object they came from: a document that moved is not encoded again.
    """
    ledger = corpus.ledger
    wins, duplicates = winners_of(ledger, drop_equal_texts=drop_equal_texts)
    has_rows = np.flatnonzero(parent.row_id_N >= 0)
    was_live = parent_live_R[parent.row_id_N[has_rows]]
    known = np.concatenate([has_rows[was_live], has_rows[~was_live]])
    homeless = np.flatnonzero(wins & (ledger.row_id_N < 0))
    match = find_rows(_keys(parent.take(known)), _keys(ledger.take(homeless)))
    of_parent = known[match[match >= 0]]
    ledger.row_id_N[homeless[match >= 0]] = parent.row_id_N[of_parent]
    ledger.num_chunks_N[homeless[match >= 0]] = parent.num_chunks_N[of_parent]
    at_home = np.flatnonzero(wins & (ledger.row_id_N >= 0))
    live = rows_of_documents(ledger.row_id_N[at_home], ledger.num_chunks_N[at_home], len(parent_live_R))
    to_encode = np.flatnonzero(wins & (ledger.row_id_N < 0))
    before = has_rows[was_live]
    _, first = np.unique(parent.row_id_N[before], return_index=True)
    ids_before = parent.doc_hash_N2[before[first]]
    edited = int((find_rows(ids_before, ledger.doc_hash_N2[to_encode]) >= 0).sum())
    revived = int((~parent_live_R[ledger.row_id_N[at_home]]).sum())
    gone = int((find_rows(ledger.doc_hash_N2[wins], ids_before) < 0).sum())
    counts = {
        "added": len(to_encode) - edited,
        "edited": edited,
        "deleted": gone,
        "revived": revived,
        "unchanged": len(at_home) - revived,
    }
    return Changes(wins, duplicates, to_encode, live, counts)


def _keys(ledger: Ledger, number_N: Ints | None = None) -> Hashes:
    """Id and text (and a number) of each document as words."""
    words: list[Hashes] = [ledger.text_hash_N2, ledger.doc_hash_N2]
    if number_N is not None:
        words.insert(0, number_N.astype(np.uint64)[:, None])
    return np.concatenate(words, axis=1)


def concatenated(parts: Sequence[Ledger]) -> Ledger:
    """Several ledgers, one after the other."""
    return Ledger(
        np.concatenate([part.doc_hash_N2 for part in parts]),
        np.concatenate([part.text_hash_N2 for part in parts]),
        np.concatenate([part.row_id_N for part in parts]),
        np.concatenate([part.num_chunks_N for part in parts]),
        np.concatenate([part.state_N for part in parts]),
    )
