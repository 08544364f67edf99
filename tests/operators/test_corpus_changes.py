"""What an update has to do, against the same question answered with dictionaries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from operators.corpus_changes import Corpus, concatenated, delete_ids, find_changes, inherit
from operators.documents import DELETED, NO_TOKENS, TAKES_PART, Ledger

# Few ids and texts, so that documents move, repeat and come back. Text 0 has no tokens.
TOKENLESS = 0
doc_st = st.tuples(st.integers(0, 6), st.sampled_from([0, 1, 1, 2, 2, 3, 3, 4]))
object_st = st.lists(doc_st, max_size=6)


@dataclass
class Doc:
    """A document of the ledger; row: of its first chunk, -1 without."""

    doc_id: int
    text: int
    state: int = TAKES_PART
    row: int = -1
    chunks: int = 0


def ledger_of(docs: list[Doc]) -> Ledger:
    # The last word is what look-ups are narrowed by: different keys share it.
    ids = np.array([[d.doc_id, d.doc_id % 2] for d in docs], np.uint64).reshape(-1, 2)
    texts = np.array([[d.text, d.text % 2] for d in docs], np.uint64).reshape(-1, 2)
    rows, chunks = np.array([d.row for d in docs], np.int64), np.array([d.chunks for d in docs], np.int32)
    return Ledger(ids, texts, rows, chunks, np.array([d.state for d in docs], np.int8))


def winners(docs: list[Doc], drop: bool) -> list[int]:
    ids: set[int] = set()
    texts: set[int] = set()
    found = []
    for place, doc in enumerate(docs):
        if doc.state != TAKES_PART or doc.doc_id in ids:
            continue
        ids.add(doc.doc_id)
        if not drop or doc.text not in texts:
            texts.add(doc.text)
            found.append(place)
    return found


@st.composite
def parents(draw: st.DrawFn) -> tuple[list[list[Doc]], int]:
    """Objects of a version whose winners, and some of the others, have rows; the number of rows."""
    drop = draw(st.booleans())
    objects = [[Doc(*doc) for doc in draw(object_st)] for _ in range(draw(st.integers(1, 4)))]
    docs = [doc for held in objects for doc in held]
    for doc in docs:
        if doc.text == TOKENLESS:
            doc.state = NO_TOKENS
        elif draw(st.integers(0, 5)) == 0:
            doc.state = DELETED
    won = winners(docs, drop)
    row = draw(st.integers(0, 2))  # rows that belong to nobody any more
    for place, doc in enumerate(docs):
        if doc.state != NO_TOKENS and (place in won or draw(st.booleans())):
            doc.row, doc.chunks = row, 1 + doc.text % 3
            row += doc.chunks
    return objects, row + draw(st.integers(0, 2))


@given(parent=parents(), drop=st.booleans(), deletes=st.sets(st.integers(0, 8), max_size=2), data=st.data())
def test_changes_are_those_of_the_plain_model(
    parent: tuple[list[list[Doc]], int], drop: bool, deletes: set[int], data: st.DataObject
) -> None:
    before, num_rows = parent
    old = [doc for held in before for doc in held]
    live = np.zeros(num_rows, bool)
    for place in winners(old, drop=False):
        if old[place].row >= 0:
            live[old[place].row : old[place].row + old[place].chunks] = True
    # The new corpus: of the old objects some are gone, some unchanged and some scanned again; and new ones; in any order.
    fates = [data.draw(st.sampled_from(["same", "same", "changed", "gone"])) for _ in before]
    chosen = [(number, fate) for number, fate in enumerate(fates) if fate != "gone"] + [(-1, "changed")] * 2
    chosen = data.draw(st.permutations(chosen))
    docs: list[Doc] = []
    object_of: list[int] = []
    positions: list[int] = []
    origin: list[int] = []
    firsts = np.cumsum([0, *(len(held) for held in before)]).tolist()
    for number, (parent_number, fate) in enumerate(chosen):
        if fate == "same":
            held = [Doc(d.doc_id, d.text, d.state, d.row, d.chunks) for d in before[parent_number]]
            positions += range(firsts[parent_number], firsts[parent_number] + len(held))
        else:
            kept = before[parent_number] if parent_number >= 0 else []
            kept = [Doc(d.doc_id, d.text) for d in kept if data.draw(st.booleans())]
            held = data.draw(st.permutations([*kept, *(Doc(*doc) for doc in data.draw(object_st))]))
            positions += [-1] * len(held)
        docs += held
        object_of += [number] * len(held)
        origin += [parent_number] * len(held)
    corpus = Corpus(ledger_of(docs), np.array(object_of, np.int64), np.array(positions, np.int64))
    number_of = {parent_number: number for number, (parent_number, _) in enumerate(chosen) if parent_number >= 0}
    object_of_parent = [number_of.get(number, -1) for number, held in enumerate(before) for _ in held]

    inherit(corpus, np.array(object_of_parent, np.int64), ledger_of(old))
    gone = {
        (d.doc_id, d.text) for n, held in enumerate(before) if n not in number_of for d in held if d.state == DELETED
    }
    no_tokens = {doc.text for doc in old if doc.state == NO_TOKENS}
    for doc, parent_number, position in zip(docs, origin, positions, strict=True):
        if position < 0:
            same_object = before[parent_number] if parent_number >= 0 else []
            requests = gone | {(d.doc_id, d.text) for d in same_object if d.state == DELETED}
            doc.state = DELETED if (doc.doc_id, doc.text) in requests else TAKES_PART
        if doc.state == TAKES_PART and doc.text in no_tokens:
            doc.state = NO_TOKENS
    assert corpus.ledger.state_N.tolist() == [doc.state for doc in docs]

    hashes = np.array([[i, i % 2] for i in sorted(deletes)], np.uint64).reshape(-1, 2)
    assert delete_ids(corpus.ledger, hashes) == len(deletes & {doc.doc_id for doc in docs})
    for doc in docs:
        if doc.doc_id in deletes and doc.state != NO_TOKENS:
            doc.state = DELETED
    assert corpus.ledger.state_N.tolist() == [doc.state for doc in docs]

    changes = find_changes(corpus, ledger_of(old), live, drop)
    won = winners(docs, drop)
    assert np.flatnonzero(changes.wins_N).tolist() == won
    rows_of = {(d.doc_id, d.text) for d in old if d.row >= 0}
    to_encode = [i for i in won if docs[i].row < 0 and (docs[i].doc_id, docs[i].text) not in rows_of]
    assert changes.to_encode_E.tolist() == to_encode
    ledger = corpus.ledger
    lives = np.zeros(num_rows, bool)
    was_live = 0
    for place in won:
        if place in to_encode:
            assert ledger.row_id_N[place] == -1
            continue
        row, chunks = int(ledger.row_id_N[place]), int(ledger.num_chunks_N[place])
        owners = [d for d in old if d.row == row]
        assert [(d.doc_id, d.text, d.chunks) for d in owners] == [(docs[place].doc_id, docs[place].text, chunks)]
        lives[row : row + chunks] = True
        was_live += bool(live[row])
        same = [d.row for d in old if (d.doc_id, d.text) == (docs[place].doc_id, docs[place].text) and d.row >= 0]
        assert docs[place].row >= 0 or live[row] or not any(live[other] for other in same)  # live rows first
    assert changes.live_R.tolist() == lives.tolist()
    ids_before = {d.doc_id for d in old if d.row >= 0 and live[d.row]}
    edited = sum(docs[i].doc_id in ids_before for i in to_encode)
    assert changes.counts == {
        "added": len(to_encode) - edited,
        "edited": edited,
        "deleted": len(ids_before - {docs[i].doc_id for i in won}),
        "revived": len(won) - len(to_encode) - was_live,
        "unchanged": was_live,
    }


@given(parts=st.lists(object_st, min_size=1, max_size=4))
def test_ledgers_are_joined_in_order(parts: list[list[tuple[int, int]]]) -> None:
    docs = [[Doc(*doc, row=number) for number, doc in enumerate(held)] for held in parts]
    joined = concatenated([ledger_of(held) for held in docs])
    whole = ledger_of([doc for held in docs for doc in held])
    for name in ("doc_hash_N2", "text_hash_N2", "row_id_N", "num_chunks_N", "state_N"):
        assert getattr(joined, name).tolist() == getattr(whole, name).tolist()
