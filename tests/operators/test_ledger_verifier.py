"""Versions with deltas whose ledger, bitmaps or segments contradict one another, though every object is what its checksums say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from operators.artifact.deletions import read_deleted, write_deleted
from operators.artifact.exact_neighbours import ExactNeighbours, exact_neighbours, write_exact
from operators.artifact.index import Index
from operators.artifact.manifest import Manifest, compute_content_digest
from operators.artifact.verifier import check_exact, check_version, verify_part
from operators.documents import read_sources, write_documents, write_sources
from operators.piece_store import read_table, write_table
from operators.storage.checked import ObjectEntry, put_checked
from operators.storage.commits import new_attempt
from tests.artifact_maker import Version, add_delta, make_version


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Segments of 600, 60 and 15 rows; nine rows of the base are deleted, three of the first delta."""
    base = make_version(tmp_path_factory.mktemp("good"))
    return add_delta(add_delta(base, 30, delete=[3, 250, 400]), 8, delete=[610])


def problems_of(made: Version, manifest: Manifest) -> list[str]:
    """All that is found wrong with a manifest that was put together wrongly."""
    manifest = dataclasses.replace(manifest, content_digest=compute_content_digest(manifest))
    reports = {
        segment.name: [verify_part(made.store, ref, made.quantizer, segment) for ref in segment.parts]
        for segment in manifest.segments
    }
    return check_version(made.store, manifest, reports)


def with_segment(manifest: Manifest, number: int, **changes: Any) -> Manifest:
    segments = list(manifest.segments)
    segments[number] = dataclasses.replace(segments[number], **changes)
    return dataclasses.replace(manifest, segments=segments, ntotal=sum(segment.num_live for segment in segments))


def with_deleted(made: Version, number: int, change: Callable[[np.ndarray], None]) -> Manifest:
    """With another bitmap, and counts that fit it."""
    deleted_N = read_deleted(made.store, made.manifest.segments[number])
    change(deleted_N)
    entry = write_deleted(made.store, f"segments/wrong/deleted-{new_attempt()}", deleted_N)
    return with_segment(made.manifest, number, deleted=entry.to_json(), num_deleted=int(deleted_N.sum()))


def with_bitmap(made: Version, change: Callable[[bytearray], object]) -> Manifest:
    """With other bytes as the bitmap of the base, and the counts as they were."""
    data = bytearray(made.store.read(made.manifest.segments[0].deleted["key"]))  # type: ignore[index]
    change(data)
    entry = put_checked(made.store, f"segments/wrong/deleted-{new_attempt()}", bytes(data))
    return with_segment(made.manifest, 0, deleted=entry.to_json())


def with_documents(made: Version, change: Callable[[dict[str, list[Any]]], object]) -> Manifest:
    """With another documents table of the base; `change` edits its columns."""
    first = made.manifest.documents[0]
    table = read_table(made.store, ObjectEntry.from_json(first["object"]))
    columns = table.to_pydict()
    change(columns)
    changed = pa.Table.from_pydict(columns, schema=table.schema)
    written = write_documents(made.store, f"segments/wrong/documents-{new_attempt()}", [changed])
    return dataclasses.replace(made.manifest, documents=[written, *made.manifest.documents[1:]])


def with_amended(made: Version, change: Callable[[pa.Table], pa.Table]) -> Manifest:
    assert made.manifest.amended is not None
    table = change(read_table(made.store, ObjectEntry.from_json(made.manifest.amended)))
    entry = write_table(made.store, f"segments/wrong/amended-{new_attempt()}", table)
    return dataclasses.replace(made.manifest, amended=entry.to_json())


def with_listing(made: Version, number: int, **changes: Any) -> Manifest:
    entries = read_sources(made.store, made.manifest)
    entries[number] = dataclasses.replace(entries[number], **changes)
    listing = write_sources(made.store, f"segments/wrong/sources-{new_attempt()}", entries)
    return dataclasses.replace(made.manifest, sources={**made.manifest.sources, "listing": listing.to_json()})


def _delete_one_more(deleted_N: np.ndarray) -> None:
    deleted_N[np.flatnonzero(~deleted_N)[5]] = True


def _delete_one_less(deleted_N: np.ndarray) -> None:
    deleted_N[np.flatnonzero(deleted_N)[0]] = False


def _delete_another(deleted_N: np.ndarray) -> None:
    _delete_one_less(deleted_N)
    deleted_N[-1] = True


def _delete_nothing(deleted_N: np.ndarray) -> None:
    deleted_N[:] = False


@pytest.mark.parametrize(
    ("number", "change", "problem"),
    [
        (
            0,
            _delete_one_more,
            "disagree about 1 rows: row 8 is deleted but belongs to a document that is to be indexed",
        ),
        (2, _delete_one_more, "disagree about 1 rows: row 665 is deleted but belongs to a document"),
        (0, _delete_one_less, "disagree about 1 rows: row 3 is not deleted but belongs to no document"),
        (1, _delete_another, "disagree about 2 rows: row 6"),
        (1, _delete_nothing, "segment s2 has a bitmap though no row of it is deleted"),
    ],
)
def test_rows_that_are_deleted_otherwise_than_the_ledger_says_are_found(
    good: Version, number: int, change: Callable[[np.ndarray], None], problem: str
) -> None:
    problems = problems_of(good, with_deleted(good, number, change))
    assert any(problem in line for line in problems), problems


def _exchange_rows(columns: dict[str, list[Any]]) -> None:
    """Two documents of as many chunks name each other's rows."""
    rows = columns["row_id"]
    rows[6], rows[9] = rows[9], rows[6]


def _another_text(columns: dict[str, list[Any]]) -> None:
    columns["text_hash"][20] = bytes(16)


def _another_id(columns: dict[str, list[Any]]) -> None:
    columns["doc_hash"][20] = bytes(16)


def _no_rows(columns: dict[str, list[Any]]) -> None:
    columns["row_id"][20], columns["num_chunks"][20] = -1, 0


def _rows_of_two(columns: dict[str, list[Any]]) -> None:
    columns["row_id"][20] = columns["row_id"][21]


def _rows_beyond(columns: dict[str, list[Any]]) -> None:
    columns["row_id"][20] = 10_000


def _a_duplicate(columns: dict[str, list[Any]]) -> None:
    columns["doc_hash"][40] = columns["doc_hash"][20]


def _an_unknown_state(columns: dict[str, list[Any]]) -> None:
    columns["state"][20] = 7


def _a_document_less(columns: dict[str, list[Any]]) -> None:
    for values in columns.values():
        del values[-1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_exchange_rows, "live rows of segment s1 are not those of the documents"),
        (_another_text, "live rows of segment s1 are not those of the documents"),
        (_another_id, "live rows of segment s1 are not those of the documents"),
        (_no_rows, "1 documents that are to be indexed have no rows, the first is number 20"),
        (_rows_of_two, "belongs to two documents of the ledger"),
        (_rows_beyond, "the ledger names rows 0..10002, there are 675"),
        (_a_duplicate, "the ledger has 333 documents that are to be indexed, the manifest says num_docs 334"),
        (_a_duplicate, "the ledger has duplicates that are rejected: {'duplicate_id': 1}, the manifest says {}"),
        (_an_unknown_state, "the ledger has documents in states [0, 1, 7]"),
        (_a_document_less, "tables of version v000003 hold 337"),
    ],
)
def test_documents_that_are_not_those_of_the_rows_are_found(
    good: Version, change: Callable[[dict[str, list[Any]]], None], problem: str
) -> None:
    problems = problems_of(good, with_documents(good, change))
    assert any(problem in line for line in problems), problems


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: table.slice(1), "the ledger has 335 documents that are to be indexed"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "a document is amended twice"),
        (
            lambda table: table.set_column(
                0, table.schema.field(0), pc.add(table.column("position"), 1000).cast(pa.int64())
            ),
            "the documents tables hold 338 documents",
        ),
        (
            lambda table: table.set_column(3, table.schema.field(3), pa.array([0] * len(table), pa.int8())),
            "have no rows",
        ),
    ],
)
def test_amendments_that_are_lost_doubled_or_misplaced_are_found(
    good: Version, change: Callable[[pa.Table], pa.Table], problem: str
) -> None:
    problems = problems_of(good, with_amended(good, change))
    assert any(problem in line for line in problems), problems


@pytest.mark.parametrize(
    ("number", "changes", "problem"),
    [
        (6, {"num_docs": 100}, "the tables of version v000003 hold 338"),
        (1, {"first": 50}, "overlap at position 50"),
        (1, {"num_docs": 3}, "documents that are to be indexed, the manifest says num_docs"),
        (1, {"num_rows_read": 3}, "rows were read, the manifest"),
    ],
)
def test_a_listing_that_is_not_that_of_the_documents_is_found(
    good: Version, number: int, changes: dict[str, Any], problem: str
) -> None:
    problems = problems_of(good, with_listing(good, number, **changes))
    assert any(problem in line for line in problems), problems


def test_source_objects_that_are_missing_or_named_twice_are_found(good: Version) -> None:
    entries = read_sources(good.store, good.manifest)
    for wrong, problem in (
        (entries[:-1], "the listing has 6 source objects, the manifest says 7"),
        ([*entries[:-1], dataclasses.replace(entries[-1], obj=entries[0].obj)], f"names {entries[0].obj.uri} twice"),
    ):
        listing = write_sources(good.store, f"segments/wrong/sources-{new_attempt()}", wrong)
        sources = {**good.manifest.sources, "listing": listing.to_json()}
        problems = problems_of(good, dataclasses.replace(good.manifest, sources=sources))
        assert any(problem in line for line in problems), problems


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data.append(0), "must hold 75 bytes"),
        (lambda data: data.pop(), "must hold 75 bytes"),
        (lambda data: data.__setitem__(30, data[30] ^ 1), "rows, segment s1 of 600 rows has 9 deleted"),
    ],
)
def test_a_bitmap_that_does_not_fit_its_segment_is_found(
    good: Version, change: Callable[[bytearray], object], problem: str
) -> None:
    problems = problems_of(good, with_bitmap(good, change))
    assert any(problem in line for line in problems), problems


def test_a_bit_beyond_the_last_row_is_found(good: Version) -> None:
    segment = good.manifest.segments[2]
    data = np.packbits(np.zeros(segment.num_rows, bool), bitorder="little")
    assert segment.num_rows % 8
    data[-1] |= 0x80
    entry = put_checked(good.store, f"segments/wrong/deleted-{new_attempt()}", data.tobytes())
    problems = problems_of(good, with_segment(good.manifest, 2, deleted=entry.to_json(), num_deleted=1))
    assert any("marks 1 rows, segment s3" in line for line in problems), problems


def test_segments_that_are_missing_doubled_or_overlap_are_found(good: Version) -> None:
    base, first, second = good.manifest.segments
    moved = dataclasses.replace(second, first_row_id=second.first_row_id - 1)
    for segments, problem in (
        ([base, second], f"row ids of segment s3 begin at {second.first_row_id}, expected 600"),
        ([first, second], "row ids of segment s2 begin at 600, expected 0"),
        ([base, first, first, second], f"row ids of segment s2 begin at 600, expected {second.first_row_id}"),
        ([base, first, moved], f"row ids of segment s3 begin at {moved.first_row_id}, expected {second.first_row_id}"),
        ([base, first], "segments hold"),
    ):
        problems = problems_of(good, dataclasses.replace(good.manifest, segments=segments))
        assert any(problem in line for line in problems), problems


def test_wrong_counts_of_deleted_rows_are_found(good: Version) -> None:
    for number, count in ((0, 4), (0, 0), (1, 5), (2, 1)):
        problems = problems_of(good, with_segment(good.manifest, number, num_deleted=count))
        assert any(f"segment s{number + 1} " in line and "deleted" in line for line in problems), problems
    without = problems_of(good, with_segment(good.manifest, 0, deleted=None))
    assert any("deleted rows and no bitmap of them" in line for line in without)


def test_rows_of_another_segment_in_a_part_are_found(good: Version, tmp_path: Path) -> None:
    base, first, second = good.manifest.segments
    exchanged = dataclasses.replace(second, parts=first.parts)
    problems = problems_of(good, dataclasses.replace(good.manifest, segments=[base, first, exchanged]))
    assert any(f"segment s3 has {second.first_row_id}.." in line for line in problems), problems


def test_a_segment_that_was_taken_over_is_not_read_again_but_its_ledger_is(good: Version) -> None:
    """What an update checks: the parts of its own segment alone."""
    new = good.manifest.segments[2]
    reports = {new.name: [verify_part(good.store, ref, good.quantizer, new) for ref in new.parts]}
    assert check_version(good.store, good.manifest, reports) == []
    wrong = with_deleted(good, 0, _delete_one_more)
    wrong = dataclasses.replace(wrong, content_digest=compute_content_digest(wrong))
    assert any("disagree about 1 rows" in line for line in check_version(good.store, wrong, reports))


def _with_rows(query: int, row_ids: np.ndarray, exact: ExactNeighbours) -> None:
    exact.row_ids[query] = row_ids


def test_exact_neighbours_that_are_not_live_rows_in_order_are_found(good: Version) -> None:
    index = Index(good.store, good.manifest)
    exact = exact_neighbours(index, good.corpus.queries_Qd)
    deleted = int(np.flatnonzero(~good.live_N)[0])

    def problems(change: Callable[[ExactNeighbours], object]) -> list[str]:
        changed = ExactNeighbours([rows.copy() for rows in exact.row_ids], [scores.copy() for scores in exact.scores])
        change(changed)
        entry = write_exact(good.store, f"segments/wrong/exact-{new_attempt()}", changed)
        return check_exact(good.store, dataclasses.replace(good.manifest, exact=entry.to_json()))

    assert problems(lambda e: None) == []
    not_live = ["the exact neighbours of query 2 are not different rows of the version that are not deleted"]
    for row in (deleted, 10_000, -1, int(exact.row_ids[2][1])):
        wrong = exact.row_ids[2].copy()
        wrong[0] = row
        assert problems(partial(_with_rows, 2, wrong)) == not_live
    assert "query 3 do not fall" in problems(lambda e: e.scores[3].__setitem__(5, 9.0))[0]
    assert "those of 15 queries, the sample has 16" in problems(lambda e: (e.row_ids.pop(), e.scores.pop()))[0]
