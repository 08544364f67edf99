"""Exact neighbours carried from version to version are those that a scan of all rows finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from operators.artifact.deletions import live_rows
from operators.artifact.exact_neighbours import (
    KEPT,
    ExactNeighbours,
    exact_after_update,
    exact_neighbours,
    read_exact,
    write_exact,
)
from operators.artifact.index import Index
from tests.artifact_maker import Version, add_delta, delete_rows, make_version

K = 10


def with_exact(version: Version, exact: ExactNeighbours) -> Version:
    entry = write_exact(version.store, f"segments/exact-{version.manifest.version}.parquet", exact)
    return dataclasses.replace(version, manifest=dataclasses.replace(version.manifest, exact=entry.to_json()))


def scanned(version: Version) -> ExactNeighbours:
    return exact_neighbours(Index(version.store, version.manifest), version.corpus.queries_Qd)


def carried(version: Version, parent: Version) -> ExactNeighbours | None:
    return exact_after_update(Index(version.store, version.manifest), version.corpus.queries_Qd, parent.manifest, K)


def assert_best(found: ExactNeighbours, version: Version) -> None:
    """`found` are the first of what a scan finds; equal scores may be in another order."""
    expected = scanned(version)
    for rows, scores, all_rows, all_scores in zip(
        found.row_ids, found.scores, expected.row_ids, expected.scores, strict=True
    ):
        assert len(rows) >= min(K, version.manifest.ntotal)
        np.testing.assert_array_equal(scores, all_scores[: len(rows)])
        assert set(rows.tolist()) <= set(all_rows[all_scores >= scores[-1]].tolist())


@pytest.mark.parametrize("seed", range(2))
def test_they_follow_from_the_parents_over_many_random_updates(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    version = with_exact(make := make_version(tmp_path / "root", num_docs=150, seed=seed), scanned(make))
    certain = 0
    for _ in range(8):
        parent = version
        live = np.flatnonzero(live_rows(parent.store, parent.manifest))
        gone = rng.choice(live, size=rng.integers(0, 12), replace=False).tolist()
        version = add_delta(parent, int(rng.integers(0, 25)), delete=gone)
        found = carried(version, parent)
        certain += found is not None
        if found is not None:
            assert_best(found, version)
        version = with_exact(version, found or scanned(version))
    assert certain >= 3


def test_a_query_that_loses_too_many_neighbours_needs_a_scan(tmp_path: Path) -> None:
    base = make_version(tmp_path / "root", num_docs=300)
    parent = with_exact(base, scanned(base))
    best = scanned(parent).row_ids[0]
    assert len(best) == KEPT
    assert carried(delete_rows(parent, best.tolist()), parent) is None


def test_without_the_parents_neighbours_there_is_a_scan(tmp_path: Path) -> None:
    parent = make_version(tmp_path / "root")
    assert carried(add_delta(parent, 5), parent) is None


def test_rows_that_live_again_need_a_scan(tmp_path: Path) -> None:
    base = make_version(tmp_path / "root")
    gone = delete_rows(base, [3])
    parent = with_exact(gone, scanned(gone))
    assert carried(base, parent) is None


def test_they_are_stored_and_read_back(tmp_path: Path) -> None:
    version = make_version(tmp_path / "root")
    exact = scanned(version)
    again = read_exact(version.store, write_exact(version.store, "segments/exact.parquet", exact))
    for name in ("row_ids", "scores"):
        for one, other in zip(getattr(exact, name), getattr(again, name), strict=True):
            np.testing.assert_array_equal(one, other)
