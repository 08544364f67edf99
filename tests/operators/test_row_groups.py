"""Rows of the row store by their entries: those of the store, from decoded row groups that are kept in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest

from operators.artifact.index import Index
from operators.artifact.row_groups import RowGroups
from operators.schemas import ROW_STORE
from tests.artifact_maker import Version, make_version

COLUMNS = ("doc_id", "chunk_no", "text")


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Some 2,000 rows in two parts of several row groups each."""
    return make_version(tmp_path_factory.mktemp("rows"), num_docs=700, d=8, nlist=6, M=4, part_rows=1100)


def test_rows_are_those_of_the_store_in_the_order_asked_for(version: Version) -> None:
    index = Index(version.store, version.manifest)
    assert len(index.parts) > 1 and max(len(part.row_group_starts) for part in index.parts) > 2
    stored = [line for part in index.parts for line in part.read_rows(0, part.facts["num_entries"]).to_pylist()]
    entries = np.random.default_rng(0).permutation(len(stored))
    assert index.rows_of(entries) == [{name: stored[n][name] for name in ROW_STORE.names} for n in entries]


def test_after_warming_no_row_group_is_read_again(version: Version) -> None:
    groups = RowGroups(Index(version.store, version.manifest).parts, 1 << 30)
    groups.warm(COLUMNS)
    held = groups.held_bytes
    groups.warm(COLUMNS)
    assert groups.held_bytes == held > 0
    groups.rows(0, np.arange(600), COLUMNS)
    assert groups.take_counts() == (600, 0)


def test_what_is_kept_is_bounded_and_the_last_used_stay(version: Version) -> None:
    parts = Index(version.store, version.manifest).parts
    whole = RowGroups(parts, 1 << 30)
    whole.warm(COLUMNS)
    num_groups, room = sum(len(part.row_group_starts) - 1 for part in parts), whole.held_bytes // 2
    groups = RowGroups(parts, room)
    groups.warm(COLUMNS)
    assert 0 < len(groups._kept) < num_groups
    assert (0, 0, COLUMNS) in groups._kept  # warming leaves off, and drops nothing
    starts = parts[0].row_group_starts
    for first in starts[:-1].tolist():
        groups.rows(0, np.array([first]), COLUMNS)
        assert groups.held_bytes <= room
    groups.take_counts()
    groups.rows(0, starts[-2:-1], COLUMNS)
    assert groups.take_counts() == (1, 0)
