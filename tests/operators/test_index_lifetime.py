"""What an open index holds of the machine, it gives back with its last reference, without a garbage collection."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from operators.artifact import doc_id_prefixes
from operators.artifact.index import Index
from tests.artifact_maker import Version, add_delta, make_version


@pytest.fixture
def version(tmp_path: Path) -> Version:
    """A base and a delta, both mapped by `joined_bytes=0`, with deleted rows."""
    return add_delta(make_version(tmp_path, num_docs=300), 60, delete=[0, 5, 300], seed=1)


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _held(folder: Path) -> tuple[int, int]:
    """Mappings of files of the folder, and open files, of this process."""
    mapped = sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())
    return mapped, len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("joined_bytes", [0, 1 << 30])
def test_an_index_that_is_let_go_unmaps_and_closes_its_files(
    version: Version, tmp_path: Path, joined_bytes: int, no_collection: None
) -> None:
    queries = version.corpus.queries_Qd
    kept = Index(version.store, version.manifest, joined_bytes=joined_bytes)
    expected = kept.search(queries, 5)
    before = _held(tmp_path)
    assert before[0] >= 2
    for _ in range(20):
        index = Index(version.store, version.manifest, joined_bytes=joined_bytes)
        assert np.array_equal(index.search(queries, 5).row_ids_Qk, expected.row_ids_Qk)
        index.search(queries, 5, prefix="doc-0001")
        index.rows_of(np.arange(3))
        gone = weakref.ref(index)
        del index
        assert gone() is None
        # The one that lives is not touched by the end of the others.
        assert np.array_equal(kept.search(queries, 5).row_ids_Qk, expected.row_ids_Qk)
    assert _held(tmp_path) == before


def test_lists_outlive_their_index_as_long_as_faiss_may_read_them(version: Version, no_collection: None) -> None:
    index = Index(version.store, version.manifest, joined_bytes=0)
    lists = index._mapped[0].inverted_lists
    sizes = [lists.list_size(number) for number in range(version.manifest.nlist)]
    del index
    assert [lists.list_size(number) for number in range(version.manifest.nlist)] == sizes


def test_the_prefixes_that_are_kept_are_bounded_in_number_and_bytes(
    version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doc_id_prefixes, "KEPT_PREFIXES", 10)
    index = Index(version.store, version.manifest)
    for number in range(50):
        index.prefixes.entries(f"nothing begins like this {number}")
    assert len(index.prefixes._kept) == 10
    monkeypatch.setattr(doc_id_prefixes, "KEPT_BYTES", index.prefixes.entries("doc-").nbytes + 8)
    for prefix in ("doc-00000", "doc-00001", "doc-0"):
        index.prefixes.entries(prefix)
    kept = index.prefixes._kept
    assert index.prefixes._kept_bytes == sum(entries.nbytes for entries in kept.values()) <= doc_id_prefixes.KEPT_BYTES
