from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import piece_store, schemas
from operators.piece_store import doc_hashes, kept_mask
from operators.row_ids import RowIds, assign_row_ids
from operators.storage.commits import CommitRecord
from operators.storage.store import Store, open_store
from tests.artifact_maker import commit_table, encoded_table

Docs = Sequence[tuple[str, int]]  # (doc_id, number of chunks) of a piece's documents


def commit_docs(store: Store, pieces: Sequence[Docs]) -> list[CommitRecord]:
    """One committed piece for each list of documents; source object `piece-<i>.csv`."""
    records = []
    for number, docs in enumerate(pieces):
        doc_ids = [doc_id for doc_id, chunks in docs for _ in range(chunks)]
        chunk_no = [chunk for _, chunks in docs for chunk in range(chunks)]
        vectors = np.zeros((len(doc_ids), 2), np.float16)
        table = encoded_table(doc_ids, chunk_no, doc_ids, vectors, source=f"piece-{number}.csv")
        records.append(commit_table(store, f"{number:04d}", table))
    return records


def first_come(pieces: Sequence[Docs]) -> tuple[list[int], dict[int, list[int]], list[tuple[str, str, int, str]]]:
    """Chunks left of each piece, dropped documents, and (doc_id, source, row, detail) of each, by going through all."""
    first_of: dict[str, str] = {}
    counts, dropped, rejects = [], {}, []
    for number, docs in enumerate(pieces):
        lost = []
        for row, (doc_id, _) in enumerate(docs):
            if doc_id in first_of:
                lost.append(row)
                rejects.append((doc_id, f"piece-{number}.csv", row, f"first seen in {first_of[doc_id]}"))
            else:
                first_of[doc_id] = f"piece-{number}.csv row {row}"
        counts.append(sum(chunks for row, (_, chunks) in enumerate(docs) if row not in lost))
        if lost:
            dropped[number] = lost
    return counts, dropped, rejects


def check(rows: RowIds, pieces: Sequence[Docs]) -> None:
    counts, dropped, rejects = first_come(pieces)
    assert rows.counts == counts
    assert rows.bases == [sum(counts[:i]) for i in range(len(counts))]
    assert rows.dropped == dropped
    assert rows.num_docs == len({doc_id for docs in pieces for doc_id, _ in docs})
    assert rows.duplicates.schema == schemas.REJECTS
    lines = rows.duplicates.to_pylist()
    assert [(line["doc_id"], line["source"], line["row"], line["detail"]) for line in lines] == rejects
    assert {(line["outcome"], line["reason"]) for line in lines} <= {("rejected", "duplicate_id")}


corpora = st.lists(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", "d", "é", "語", "g", "h", "i", "j"]), st.integers(1, 3)), max_size=8
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40)
@given(pieces=corpora, hashes_per_pass=st.sampled_from([1, 3, 1000]))
def test_the_first_document_of_an_id_wins_and_rows_are_numbered_in_source_order(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[Docs], hashes_per_pass: int
) -> None:
    store = open_store(str(tmp_path_factory.mktemp("rows")))
    check(assign_row_ids(store, commit_docs(store, pieces), hashes_per_pass), pieces)


def test_duplicates_within_a_piece_and_across_pieces_are_rejected_with_their_first_place(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    pieces = [[("a", 2), ("b", 1), ("a", 3)], [], [("c", 1), ("b", 2)], [("a", 1), ("b", 1)]]
    rows = assign_row_ids(store, commit_docs(store, pieces))
    check(rows, pieces)
    assert rows.counts == [3, 0, 1, 0]
    assert rows.bases == [0, 3, 3, 4]
    assert rows.dropped == {0: [2], 2: [1], 3: [0, 1]}
    assert rows.duplicates.column("detail").to_pylist()[-1] == "first seen in piece-0.csv row 1"


def test_many_passes_give_the_answer_of_one(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    ids = np.random.default_rng(5).integers(0, 900, 1500)
    pieces = [[(f"doc {i}", 1 + i % 3) for i in ids[lo : lo + 300].tolist()] for lo in range(0, 1500, 300)]
    records = commit_docs(store, pieces)
    one = assign_row_ids(store, records)
    check(one, pieces)
    many = assign_row_ids(store, records, hashes_per_pass=100)
    assert (many.bases, many.counts, many.num_docs, many.dropped) == (one.bases, one.counts, one.num_docs, one.dropped)
    assert many.duplicates.equals(one.duplicates)


@pytest.mark.parametrize("hashes_per_pass", [1, 1000])
def test_different_ids_with_the_same_hash_are_both_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashes_per_pass: int
) -> None:
    monkeypatch.setattr(piece_store, "doc_hashes", lambda ids: doc_hashes(ids) % np.uint64(2))
    store = open_store(str(tmp_path))
    pieces = [[("a", 1), ("b", 2), ("c", 1), ("a", 1)], [("d", 1), ("b", 1), ("e", 3)], [("e", 1), ("a", 2), ("f", 1)]]
    check(assign_row_ids(store, commit_docs(store, pieces), hashes_per_pass), pieces)


def test_a_corpus_without_documents_has_no_rows(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    check(assign_row_ids(store, commit_docs(store, [[], []])), [[], []])


def test_hashes_are_those_of_blake2b() -> None:
    # As `b2sum -l 64` prints them. They stand in every committed piece, so they must not change.
    expected = [bytes.fromhex(digest) for digest in ("f824bd8d9cb2a038", "e4a6a0577479b2b4")]
    assert doc_hashes(["doc", ""]).tolist() == [int.from_bytes(digest, "little") for digest in expected]


def test_dropping_a_document_drops_all_its_chunks() -> None:
    chunk_no = np.array([0, 1, 0, 0, 1, 2], np.int32)
    assert kept_mask(chunk_no, []).tolist() == [True] * 6
    assert kept_mask(chunk_no, [0, 2]).tolist() == [False, False, True, False, False, False]
