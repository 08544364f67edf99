from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.artifact.deletions import write_deleted
from operators.artifact.manifest import Segment
from operators.errors import IntegrityError
from operators.merger import entry_checksum
from operators.renumbering import Renumbering
from operators.storage.store import Store, open_store


def made_segments(store: Store, deleted: list[np.ndarray]) -> list[Segment]:
    """Segments with these deleted rows (bool [num_rows] each); one without any has no bitmap."""
    segments: list[Segment] = []
    first = 0
    for number, deleted_N in enumerate(deleted):
        count = int(deleted_N.sum())
        entry = (
            write_deleted(store, f"segments/s{number}/deleted-{count}-{first}", deleted_N).to_json() if count else None
        )
        segments.append(Segment(f"s{number}", first, len(deleted_N), [], entry, count))
        first += len(deleted_N)
    return segments


@given(sizes=st.lists(st.integers(0, 200), min_size=1, max_size=5), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_a_row_gets_the_number_of_live_rows_before_it(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    store = open_store(str(tmp_path_factory.mktemp("rows")))
    deleted = [rng.random(size) < share for size in sizes]
    found = Renumbering(store, made_segments(store, deleted))
    live_N = ~np.concatenate(deleted)
    assert found.num_live == live_N.sum()
    assert found.num_deleted == len(live_N) - live_N.sum()
    row_ids = rng.permutation(len(live_N))
    live, new_ids = found.find(row_ids)
    assert np.array_equal(live, live_N[row_ids])
    assert np.array_equal(new_ids[live], (np.cumsum(live_N) - 1)[row_ids][live])


def test_a_row_id_of_no_segment_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    found = Renumbering(store, made_segments(store, [np.zeros(10, bool), np.ones(3, bool)]))
    found.find(np.array([0, 12]))
    for row_id in (-1, 13):
        with pytest.raises(IntegrityError, match=r"row ids must be in 0\.\.12"):
            found.find(np.array([row_id, 5]))


def test_the_checksum_of_entries_sees_any_two_values_exchanged() -> None:
    rng = np.random.default_rng(0)
    row_ids, codes = np.arange(50), rng.integers(0, 256, (50, 5)).astype(np.uint8)
    vectors = rng.standard_normal((50, 7)).astype(np.float16)
    expected = entry_checksum(row_ids, codes, vectors)
    order = rng.permutation(50)
    assert entry_checksum(row_ids[order], codes[order], vectors[order]) == expected
    halves = [entry_checksum(row_ids[s], codes[s], vectors[s]) for s in (slice(0, 20), slice(20, 50))]
    assert sum(halves) % 2**64 == expected
    for a, b in [(0, 1), (7, 40), (48, 49)]:
        exchanged = np.arange(50)
        exchanged[[a, b]] = b, a
        assert entry_checksum(row_ids, codes[exchanged], vectors) != expected
        assert entry_checksum(row_ids, codes, vectors[exchanged]) != expected
        assert entry_checksum(row_ids[exchanged], codes, vectors) != expected
