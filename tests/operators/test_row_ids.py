from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import piece_store, row_ids, schemas
from operators.piece_store import doc_hashes, kept_mask
from operators.row_ids import RowIds, assign_row_ids, duplicate_lines
from operators.storage.commits import CommitRecord
from operators.storage.store import Store, open_store
from pipelines.numbering import number_rows
from tests.artifact_maker import commit_table, encoded_table

Docs = Sequence[tuple[str, str, int]]  # (doc_id, text, number of chunks) of a piece's documents


def commit_docs(store: Store, pieces: Sequence[Docs]) -> list[CommitRecord]:
    """One committed piece for each list of documents; source object `piece-<i>.csv`."""
    records = []
    for number, docs in enumerate(pieces):
        doc_ids = [doc_id for doc_id, _, chunks in docs for _ in range(chunks)]
        texts = [text for _, text, chunks in docs for _ in range(chunks)]
        chunk_no = [chunk for _, _, chunks in docs for chunk in range(chunks)]
        vectors = np.zeros((len(doc_ids), 2), np.float16)
        table = encoded_table(doc_ids, chunk_no, texts, vectors, source=f"piece-{number}.csv")
        field = table.schema.field("text_hash")
        hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
        table = table.set_column(table.schema.get_field_index("text_hash"), field, pa.array(hashes, field.type))
        records.append(commit_table(store, f"{number:04d}", table))
    return records


def same_rows(one: RowIds, other: RowIds) -> bool:
    """Whether they agree to the bit, types included."""
    ours, theirs = dataclasses.asdict(one), dataclasses.asdict(other)
    duplicates, others = ours.pop("duplicates"), theirs.pop("duplicates")
    equal = [
        np.array_equal(duplicates[name], others[name]) and duplicates[name].dtype == others[name].dtype
        for name in others
    ]
    return repr(ours) == repr(theirs) and all(equal)


def lines_of(store: Store, records: Sequence[CommitRecord], rows: RowIds) -> list[dict[str, object]]:
    """What the version's rejects say of the duplicates."""
    tables = list(duplicate_lines(store, records, rows.duplicates))
    assert all(table.schema == schemas.REJECTS for table in tables)
    return [line for table in tables for line in table.to_pylist()]


def first_come(
    pieces: Sequence[Docs], drop_equal_texts: bool
) -> tuple[list[int], dict[int, list[int]], list[dict[str, object]]]:
    """Chunks left of each piece, documents left out, and the rejects, by going through all documents."""
    first_of_id: dict[str, str] = {}
    first_of_text: dict[str, str] = {}
    counts, dropped, rejects = [], {}, []
    for number, docs in enumerate(pieces):
        lost = []
        for row, (doc_id, text, _) in enumerate(docs):
            source, place = f"piece-{number}.csv", f"piece-{number}.csv row {row}"
            if doc_id in first_of_id:
                found = ("rejected", "duplicate_id", f"first seen in {first_of_id[doc_id]}")
            elif drop_equal_texts and text in first_of_text:
                found = ("dropped", "duplicate_text", f"same text as {first_of_text[text]}")
            else:
                found = None
            first_of_id.setdefault(doc_id, place)
            if found is None:
                first_of_text.setdefault(text, f"{doc_id} in {place}")
            else:
                lost.append(row)
                names = ("source", "row", "doc_id", "outcome", "reason", "detail")
                rejects.append(dict(zip(names, (source, row, doc_id, *found), strict=True)))
        counts.append(sum(chunks for row, (_, _, chunks) in enumerate(docs) if row not in lost))
        if lost:
            dropped[number] = lost
    return counts, dropped, rejects


def in_tasks(
    store: Store, records: Sequence[CommitRecord], hashes_per_pass: int, *, drop_equal_texts: bool, num_tasks: list[int]
) -> RowIds:
    """As a build numbers rows, its tasks one after the other, in groups of at most 7 documents; num_tasks: how many they were."""

    def tasks(function: Any, calls: list[tuple[Any, ...]], *, shared: Sequence[Any] = ()) -> list[Any]:
        given = pickle.dumps(shared)  # as it comes to another process
        return [function(*pickle.loads(given), *call) for call in calls]

    context: Any = SimpleNamespace(
        store=store,
        config=SimpleNamespace(clean=SimpleNamespace(duplicates="drop" if drop_equal_texts else "keep")),
        run=SimpleNamespace(prefix="runs/r"),
        progress=SimpleNamespace(stage=lambda name, total: num_tasks.append(total)),
        tasks=tasks,
    )
    return number_rows(context, records, hashes_per_pass=hashes_per_pass, documents_per_run=7)


def check(
    store: Store, pieces: Sequence[Docs], hashes_per_pass: int = 1000, *, drop_equal_texts: bool = False
) -> RowIds:
    """Compares the row ids of the pieces with `first_come`, in one task and as a build of such passes does."""
    records = commit_docs(store, pieces)
    rows = assign_row_ids(store, records, drop_equal_texts=drop_equal_texts)
    num_tasks: list[int] = []
    of_tasks = in_tasks(store, records, hashes_per_pass, drop_equal_texts=drop_equal_texts, num_tasks=num_tasks)
    assert same_rows(of_tasks, rows)
    assert not list(store.list_keys("runs/r"))
    words = sum(len(docs) for docs in pieces) * (2 if drop_equal_texts else 1)
    assert (num_tasks == [1]) == (words <= hashes_per_pass)
    counts, dropped, rejects = first_come(pieces, drop_equal_texts)
    assert rows.counts == counts
    assert rows.bases == [sum(counts[:i]) for i in range(len(counts))]
    assert rows.dropped == dropped
    assert rows.num_docs == sum(len(docs) for docs in pieces) - len(rejects)
    assert lines_of(store, records, rows) == rejects
    counted = [sum(rows.duplicates.counts(outcome).values()) for outcome in ("rejected", "dropped")]
    assert sum(counted) == len(rejects)
    return rows


ids = st.sampled_from(["a", "b", "c", "d", "é", "語", "g", "h", "i", "j"])
texts = st.sampled_from(["", "one text", "one text ", "ein Text", "テキスト", "text 6"])
corpora = st.lists(st.lists(st.tuples(ids, texts, st.integers(1, 3)), max_size=8), min_size=1, max_size=4)


@settings(max_examples=40)
@given(
    pieces=corpora,
    hashes_per_pass=st.sampled_from([1, 3, 1000]),
    drop_equal_texts=st.booleans(),
    lines_at_once=st.sampled_from([1, 2, 1000]),
)
def test_the_first_document_of_an_id_then_of_a_text_stands_and_rows_are_numbered_in_source_order(
    tmp_path_factory: pytest.TempPathFactory,
    pieces: list[Docs],
    hashes_per_pass: int,
    drop_equal_texts: bool,
    lines_at_once: int,
) -> None:
    store = open_store(str(tmp_path_factory.mktemp("rows")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_ids, "LINES_AT_ONCE", lines_at_once)
        check(store, pieces, hashes_per_pass, drop_equal_texts=drop_equal_texts)


def test_duplicates_within_a_piece_and_across_pieces_are_rejected_with_their_first_place(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    pieces = [[("a", "x", 2), ("b", "x", 1), ("a", "x", 3)], [], [("c", "x", 1), ("b", "y", 2)], [("a", "z", 1)]]
    rows = check(store, pieces)
    assert rows.counts == [3, 0, 1, 0]
    assert rows.bases == [0, 3, 3, 4]
    assert rows.dropped == {0: [2], 2: [1], 3: [0]}
    assert (rows.duplicates.counts("rejected"), rows.duplicates.counts("dropped")) == ({"duplicate_id": 3}, {})


def test_a_text_whose_first_document_is_rejected_is_kept_in_the_next_one(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    pieces = [[("a", "first", 1)], [("a", "second", 2), ("b", "second", 1), ("c", "second", 1), ("d", "first", 3)]]
    rows = check(store, pieces, drop_equal_texts=True)
    assert rows.counts == [1, 1]
    assert rows.dropped == {1: [0, 2, 3]}
    assert (rows.duplicates.counts("rejected"), rows.duplicates.counts("dropped")) == (
        {"duplicate_id": 1},
        {"duplicate_text": 2},
    )
    details = [line["detail"] for line in lines_of(store, commit_docs(store, pieces), rows)]
    assert details == [
        "first seen in piece-0.csv row 0",
        "same text as b in piece-1.csv row 1",
        "same text as a in piece-0.csv row 0",
    ]


def test_many_passes_give_the_answer_of_one(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    drawn = np.random.default_rng(5).integers(0, [900, 700], (1500, 2)).tolist()
    docs = [(f"doc {i}", f"text {t}", 1 + i % 3) for i, t in drawn]
    pieces = [docs[lo : lo + 300] for lo in range(0, 1500, 300)]
    one = check(store, pieces, drop_equal_texts=True)
    many = check(store, pieces, hashes_per_pass=100, drop_equal_texts=True)
    assert one.duplicates.counts("rejected")["duplicate_id"] > 300
    assert one.duplicates.counts("dropped")["duplicate_text"] > 200
    assert np.array_equal(many.duplicates.first_F, one.duplicates.first_F)


@pytest.mark.parametrize("hashes_per_pass", [1, 1000])
def test_different_ids_with_the_same_hash_are_both_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashes_per_pass: int
) -> None:
    monkeypatch.setattr(piece_store, "doc_hashes", lambda ids: doc_hashes(ids) % np.uint64(2))
    by_id = [[("a", 1), ("b", 2), ("c", 1), ("a", 1)], [("d", 1), ("b", 1), ("e", 3)], [("e", 1), ("a", 2), ("f", 1)]]
    pieces = [[(doc_id, "x", chunks) for doc_id, chunks in docs] for docs in by_id]
    check(open_store(str(tmp_path)), pieces, hashes_per_pass)


@pytest.mark.parametrize("drop_equal_texts", [False, True])
def test_a_corpus_without_documents_has_no_rows(tmp_path: Path, drop_equal_texts: bool) -> None:
    check(open_store(str(tmp_path)), [[], []], drop_equal_texts=drop_equal_texts)


def test_hashes_are_those_of_blake2b() -> None:
    # As `b2sum -l 64` prints them. They stand in every committed piece, so they must not change.
    expected = [bytes.fromhex(digest) for digest in ("f824bd8d9cb2a038", "e4a6a0577479b2b4")]
    assert doc_hashes(["doc", ""]).tolist() == [int.from_bytes(digest, "little") for digest in expected]


def test_dropping_a_document_drops_all_its_chunks() -> None:
    chunk_no = np.array([0, 1, 0, 0, 1, 2], np.int32)
    assert kept_mask(chunk_no, []).tolist() == [True] * 6
    assert kept_mask(chunk_no, [0, 2]).tolist() == [False, False, True, False, False, False]


def test_rows_of_a_corpus_in_a_bucket_are_numbered_in_passes(bucket: str) -> None:
    pieces = [[("a", "x", 2), ("b", "y", 1)], [], [("a", "z", 1)], [("c", "y", 3), ("d", "w", 1)]]
    check(open_store(f"{bucket}/root"), pieces, hashes_per_pass=2, drop_equal_texts=True)
