"""The ledger of a version: winners, look-ups by hash, positions that move, and its tables read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators import documents, schemas
from operators.documents import (
    DELETED,
    NO_TOKENS,
    TAKES_PART,
    Ledger,
    SourceEntry,
    document_hash,
    document_table,
    find_rows,
    moved,
    positions_of,
    read_documents,
    read_ledger,
    read_sources,
    rows_of_documents,
    winners_of,
    write_documents,
    write_sources,
)
from operators.errors import IntegrityError
from operators.piece_store import write_table
from operators.sources.listing import SourceObject
from operators.storage.store import Store, open_store
from tests.artifact_maker import Version, make_version

# Few ids and texts, so that many are equal.
small = st.integers(0, 5)
documents_st = st.lists(
    st.tuples(small, small, st.sampled_from([TAKES_PART, TAKES_PART, DELETED, NO_TOKENS])), max_size=30
)
keys_st = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=20)


def ledger_of(docs: list[tuple[int, int, int]]) -> Ledger:
    """Documents (id, text, state) without rows. Hashes of different ids share a word now and then."""
    ids = np.array([[i, i % 2] for i, _, _ in docs], np.uint64).reshape(-1, 2)
    texts = np.array([[t % 2, t] for _, t, _ in docs], np.uint64).reshape(-1, 2)
    states = np.array([state for *_, state in docs], np.int8)
    return Ledger(ids, texts, np.full(len(docs), -1, np.int64), np.zeros(len(docs), np.int32), states)


@given(docs=documents_st, drop=st.booleans())
def test_the_first_with_an_id_wins_and_then_the_first_with_a_text(docs: list[tuple[int, int, int]], drop: bool) -> None:
    by_id: dict[int, int] = {}
    by_text: dict[int, int] = {}
    winners, lost = [], {}
    for place, (doc_id, text, state) in enumerate(docs):
        if state != TAKES_PART:
            continue
        if doc_id in by_id:
            lost[place] = (by_id[doc_id], False)
            continue
        by_id[doc_id] = place
        if drop and text in by_text:
            lost[place] = (by_text[text], True)
            continue
        by_text[text] = place
        winners.append(place)
    wins, duplicates = winners_of(ledger_of(docs), drop_equal_texts=drop)
    assert np.flatnonzero(wins).tolist() == winners
    stands = zip(duplicates.first_F.tolist(), duplicates.by_text_F.tolist(), strict=True)
    assert dict(zip(duplicates.place_F.tolist(), stands, strict=True)) == lost
    assert duplicates.place_F.tolist() == sorted(lost)


@given(known=keys_st, wanted=keys_st)
def test_a_key_is_found_where_it_first_occurs(known: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> None:
    arrays = [np.array(keys, np.uint64).reshape(-1, 2) for keys in (known, wanted)]
    expected = [known.index(key) if key in known else -1 for key in wanted]
    assert find_rows(*arrays).tolist() == expected


@given(counts=st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=12), beyond=st.integers(0, 5))
def test_the_rows_of_documents_are_those_from_the_first_on(counts: list[tuple[int, bool]], beyond: int) -> None:
    expected = [chosen for count, chosen in counts for _ in range(count)] + [False] * beyond
    ends = np.cumsum([count for count, _ in counts], dtype=np.int64)
    chosen = np.array([chosen for _, chosen in counts], bool)
    num_chunks = np.array([count for count, _ in counts], np.int32)
    first = ends - num_chunks
    assert rows_of_documents(first[chosen], num_chunks[chosen], len(expected)).tolist() == expected


def test_rows_that_overlap_or_lie_beyond_are_refused() -> None:
    with pytest.raises(IntegrityError, match="row 2 belongs to two documents"):
        rows_of_documents(np.array([0, 2]), np.array([3, 1]), 9)
    for first in (-1, 8):
        with pytest.raises(IntegrityError, match="there are 9"):
            rows_of_documents(np.array([first]), np.array([2]), 9)


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6), data=st.data())
def test_documents_keep_their_place_when_tables_go(sizes: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    starts = np.cumsum(sizes) - sizes
    before = np.arange(sum(sizes))
    after = np.concatenate(
        [np.empty(0, np.int64), *(before[s : s + n] for s, n, k in zip(starts, sizes, kept, strict=True) if k)]
    )
    entries = []
    for start, size, is_kept in zip(starts.tolist(), sizes, kept, strict=True):
        if is_kept:
            cut = data.draw(st.integers(0, size))
            ranges = [(start, cut), (start + cut, size - cut)]
            entries += [SourceEntry(obj_of(f"{first}-{n}"), n, first if n else 0, n) for first, n in ranges]
    entries = data.draw(st.permutations(entries))
    found = moved(entries, kept, sizes)
    assert after[positions_of(found)].tolist() == before[positions_of(entries)].tolist()
    assert [dataclasses.replace(e, first=0) for e in found] == [dataclasses.replace(e, first=0) for e in entries]


def obj_of(name: str) -> SourceObject:
    return SourceObject(f"/corpus/{name}.jsonl", f"{name}.jsonl", f"etag-{name}", 100, "jsonl")


def table_of(names: list[str], first_row_id: int) -> pa.Table:
    count = len(names)
    texts = pa.array([document_hash(f"text of {name}") for name in names], pa.binary(16))
    rows = np.arange(count, dtype=np.int64)
    ones, states = np.ones(count, np.int32), np.zeros(count, np.int8)
    return document_table(pa.array(names), pa.array(rows), texts, rows + first_row_id, ones, states)


@pytest.fixture
def version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Version]:
    """A manifest whose ledger is three tables of 9, 4 and 7 documents in row groups of three, listed in another order."""
    made = make_version(tmp_path / "root", num_docs=20, d=8, nlist=2, M=2, nbits=4, num_pieces=1, num_shards=1)
    monkeypatch.setattr(documents, "ROW_GROUP_DOCUMENTS", 3)
    tables, first = [], 0
    for number, size in enumerate((9, 4, 7)):
        names = [f"d{first + i}" for i in range(size)]
        tables.append(write_documents(made.store, f"segments/l/documents-{number}", [table_of(names, first)]))
        first += size
    ranges = [("b", 9, 4), ("empty", 0, 0), ("c", 13, 7), ("a", 2, 5)]
    entries = [SourceEntry(obj_of(name), count + 1, first, count) for name, first, count in ranges]
    listing = write_sources(made.store, "segments/l/sources", entries)
    manifest = dataclasses.replace(
        made.manifest, documents=tables, sources={"listing": listing.to_json()}, amended=None
    )
    return made.store, dataclasses.replace(made, manifest=manifest)


def test_the_listing_and_the_ledger_read_back_as_they_were_written(version: tuple[Store, Version]) -> None:
    store, made = version
    entries = read_sources(store, made.manifest)
    assert [(e.obj.source, e.num_rows_read, e.first, e.num_docs) for e in entries] == [
        ("b.jsonl", 5, 9, 4), ("empty.jsonl", 1, 0, 0), ("c.jsonl", 8, 13, 7), ("a.jsonl", 6, 2, 5)
    ]  # fmt: skip
    ledger = read_ledger(store, made.manifest, entries)
    order = [*range(9, 13), *range(13, 20), *range(2, 7)]
    assert ledger.row_id_N.tolist() == order
    hashes = [ledger.doc_hash_N2[i].tobytes() for i in range(len(ledger))]
    assert hashes == [document_hash(f"d{position}") for position in order]


def test_amendments_hold_in_place_of_what_the_tables_say(version: tuple[Store, Version]) -> None:
    store, made = version
    columns = [[3, 15], [-1, 99], [0, 2], [DELETED, TAKES_PART]]
    table = pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, schemas.AMENDED, strict=True)], schema=schemas.AMENDED
    )
    amended = write_table(store, "segments/l/amended", table).to_json()
    manifest = dataclasses.replace(made.manifest, amended=amended)
    entries = read_sources(store, manifest)
    positions = positions_of(entries).tolist()
    ledger = read_ledger(store, manifest, entries)
    at = [positions.index(3), positions.index(15)]
    assert ledger.row_id_N[at].tolist() == [-1, 99]
    assert ledger.num_chunks_N[at].tolist() == [0, 2]
    assert ledger.state_N[at].tolist() == [DELETED, TAKES_PART]
    assert read_ledger(store, manifest, entries, amend=False).row_id_N[at].tolist() == [3, 15]


def test_documents_are_read_by_position_from_the_row_groups_that_hold_them(
    version: tuple[Store, Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = version
    read: list[int] = []
    honest = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **options: Any) -> pa.Table:
        read.append(group)
        return honest(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    found = read_documents(store, made.manifest, np.array([19, 4, 4, 10, 3]), ["row", "doc_id"])
    assert found.column("doc_id").to_pylist() == ["d19", "d4", "d4", "d10", "d3"]
    assert found.column("row").to_pylist() == [6, 4, 4, 1, 3]
    assert sorted(read) == [0, 1, 2]  # of 3 + 2 + 3
    assert read_documents(store, made.manifest, np.empty(0, np.int64), ["doc_id"]).num_rows == 0


def test_a_listing_that_points_beyond_the_tables_is_refused(version: tuple[Store, Version]) -> None:
    store, made = version
    shorter = dataclasses.replace(made.manifest, documents=made.manifest.documents[:2])
    with pytest.raises(IntegrityError, match=r"c\.jsonl lie at 13\.\.19, the tables .* hold 13"):
        read_sources(store, shorter)
    wrong = [{**made.manifest.documents[0], "num_rows": 8}, *made.manifest.documents[1:]]
    with pytest.raises(IntegrityError, match="must hold 8 rows, found 9"):
        read_ledger(store, dataclasses.replace(made.manifest, documents=wrong), [])


def test_an_empty_ledger_is_read(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    held = write_documents(store, "documents", [])
    assert held["num_rows"] == 0
    assert len(documents.ledger_columns([])) == 0
