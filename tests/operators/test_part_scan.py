"""Exact neighbours found by groups of parts, each read alone, are to the bit those of a scan of the whole index."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from operators.artifact import part_scan
from operators.artifact.exact_neighbours import KEPT, exact_neighbours
from operators.artifact.index import Index
from operators.artifact.manifest import read_part_record
from operators.artifact.part_scan import best_of_groups, scan_groups, scan_parts
from operators.errors import IntegrityError
from tests.artifact_maker import Version, add_delta, delete_rows, flip_bit, make_version

GROUPS = (1, 60, 150, 10**6)  # rows of a group: each part alone, some together, all


def equal_pairs(version: Version) -> Version:
    """The same version with a corpus whose queries tell few rows apart: whole numbers of few values."""
    rng = np.random.default_rng(9)
    d = version.manifest.d
    queries = rng.integers(-1, 2, (100, d)).astype(np.float32)  # more than one block of the kernel
    return dataclasses.replace(version, corpus=dataclasses.replace(version.corpus, queries_Qd=queries))


@pytest.fixture(scope="module", params=["ip", "l2"])
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Three segments, rows deleted in each, every part of about 50 rows; many rows stored several times."""
    base = make_version(tmp_path_factory.mktemp("scan"), metric=request.param, num_docs=150, part_rows=50)
    rng = np.random.default_rng(5)
    two = add_delta(base, 25, delete=rng.choice(300, 40).tolist(), publish=False)
    three = add_delta(two, 40, num_pieces=2, part_rows=30, publish=False)
    return delete_rows(three, rng.choice(three.manifest.next_row_id, 60).tolist(), publish=False)


def check(version: Version, k: int, group_rows: int, from_row_id: int = 0) -> int:
    """Compares the groups' answer with that of the index, and returns how many groups there were."""
    manifest, queries = version.manifest, version.corpus.queries_Qd
    index = Index(version.store, manifest)
    expected = index.exact_search(queries, k, from_row_id=from_row_id)
    k = expected.entries_Qk.shape[1]
    groups = [pickle.loads(pickle.dumps(group)) for group in scan_groups(manifest, from_row_id, group_rows)]
    if k:
        found = [scan_parts(version.store, group, queries, k, manifest.metric) for group in groups]
        scores, entries = best_of_groups(found, k)
        np.testing.assert_array_equal(entries, expected.entries_Qk)
        np.testing.assert_array_equal(scores.view(np.int32), expected.scores_Qk.view(np.int32))
        np.testing.assert_array_equal(index.row_ids_of(entries), expected.row_ids_Qk)
    return len(groups)


@pytest.mark.parametrize("group_rows", GROUPS)
def test_groups_of_parts_find_what_a_scan_of_the_index_finds(version: Version, group_rows: int) -> None:
    assert len(version.manifest.segments) == 3
    assert all(segment.num_deleted for segment in version.manifest.segments)
    for k in (1, KEPT, 10**4):
        num_groups = check(version, k, group_rows)
    num_parts = sum(len(segment.parts) for segment in version.manifest.segments)
    assert num_groups == {1: num_parts, 10**6: 1}.get(group_rows, num_groups)
    assert num_parts > 8
    first = version.manifest.segments[1].first_row_id
    check(version, KEPT, group_rows, from_row_id=first)


def test_equal_scores_go_to_the_lowest_entry_whatever_the_groups(version: Version, monkeypatch: Any) -> None:
    tied = equal_pairs(version)
    index = Index(tied.store, tied.manifest)
    zero = dataclasses.replace(tied.corpus, queries_Qd=np.zeros_like(tied.corpus.queries_Qd))
    expected = index.exact_search(zero.queries_Qd, KEPT)
    if tied.manifest.metric == "ip":  # then every row scores 0, and the lowest live entries win
        assert (expected.scores_Qk == 0).all()
        assert (np.diff(expected.entries_Qk) > 0).all()
    for queries in (tied, dataclasses.replace(tied, corpus=zero)):
        for group_rows in GROUPS:
            check(queries, KEPT, group_rows)
    monkeypatch.setattr(part_scan, "MERGED_AT_ONCE", 2)
    monkeypatch.setattr(part_scan, "BLOCK_ROWS", 7)
    check(tied, KEPT, 1)
    monkeypatch.setattr(part_scan, "MOST_GROUPS", 3)
    assert 3 <= check(tied, KEPT, 1) <= 4 + len(tied.manifest.segments)


def test_the_neighbours_of_a_version_are_the_same_from_both(version: Version) -> None:
    index, queries = Index(version.store, version.manifest), version.corpus.queries_Qd
    groups = scan_groups(version.manifest, group_rows=60)
    found = [scan_parts(version.store, group, queries, KEPT, version.manifest.metric) for group in groups]
    one, other = exact_neighbours(index, queries), exact_neighbours(index, queries, best_of_groups(found, KEPT))
    for name in ("row_ids", "scores"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_segments_without_live_rows_are_not_read(version: Version, tmp_path: Path) -> None:
    first = version.manifest.segments[1]
    rows = list(range(first.first_row_id, first.first_row_id + first.num_rows))
    emptied = delete_rows(version, rows, publish=False)
    names = {parts.segment.name for group in scan_groups(emptied.manifest, group_rows=60) for parts in group}
    assert names == {segment.name for segment in emptied.manifest.segments} - {first.name}
    check(emptied, KEPT, 60)


def test_a_damaged_vector_is_found_by_the_scan_that_reads_it(tmp_path: Path) -> None:
    version = make_version(tmp_path / "root", num_docs=150, part_rows=50)
    ref = version.manifest.segments[0].parts[1]
    flip_bit(version.store, read_part_record(version.store, ref).objects["vectors"].key, 500)
    groups = scan_groups(version.manifest, group_rows=1)
    scan_parts(version.store, groups[0], version.corpus.queries_Qd, 5, "ip")
    with pytest.raises(IntegrityError, match="is damaged"):
        scan_parts(version.store, groups[1], version.corpus.queries_Qd, 5, "ip")


def test_parts_in_a_bucket_are_scanned_like_those_on_a_disk(bucket: str) -> None:
    base = make_version(f"{bucket}/root", num_docs=80, part_rows=50)
    check(delete_rows(base, list(range(0, 80, 3)), publish=False), KEPT, 60)
