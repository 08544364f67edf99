"""Search among the documents whose id begins with a prefix, against exhaustive search filtered afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from operators.artifact import index as index_module
from operators.artifact import list_scanner
from operators.artifact.index import Index
from tests.artifact_maker import add_delta, make_version

K = 7


@pytest.fixture(scope="module", params=["ip", "l2"])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """A base, a large delta that stays mapped and a small one in memory, with deleted rows in base and delta."""
    folder = tmp_path_factory.mktemp("prefix")
    version = make_version(folder, num_docs=300, metric=request.param)
    version = add_delta(version, 120, delete=[0, 5, 40, 41, 300], seed=1)
    version = add_delta(version, 20, delete=[7, 650], seed=2)
    # 20 documents are some 40 rows of (2 * 16 + 8 + 16) bytes.
    return Index(version.store, version.manifest, joined_bytes=3_000)


def _queries(index: Index) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((9, index.manifest.d)).astype(np.float32)


def _filtered(index: Index, queries: np.ndarray, prefix: str) -> list[list[int]]:
    everything = index.exact_search(queries, index.manifest.ntotal).entries_Qk
    ids = [index.doc_ids_of(entries) for entries in everything]
    return [
        [entry for entry, doc_id in zip(entries.tolist(), names, strict=True) if doc_id.startswith(prefix)][:K]
        for entries, names in zip(everything, ids, strict=True)
    ]


PREFIXES = ["doc-0000", "doc-00001", "doc-000299", "doc-", "d", "doc-0001", "delta", "nothing", "doc-0000 "]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("exact_among", [16_384, 40, 0])
def test_hits_are_the_best_rows_with_the_prefix(
    index: Index, prefix: str, exact_among: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "EXACT_AMONG", exact_among)
    queries = _queries(index)
    # All lists and a refine factor beyond what the codes can confuse: the hits must be the exact ones.
    found = index.search(queries, K, nprobe=index.manifest.nlist, refine_factor=64, prefix=prefix)
    assert [[e for e in entries if e >= 0] for entries in found.entries_Qk.tolist()] == _filtered(
        index, queries, prefix
    )
    assert (np.diff(found.scores_Qk, axis=1) <= 0).all()


@pytest.mark.parametrize("exact_among", [16_384, 40, 0])
def test_there_are_k_hits_whenever_k_rows_have_the_prefix_however_few_lists_are_probed(
    index: Index, exact_among: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "EXACT_AMONG", exact_among)
    for prefix in PREFIXES:
        expected = _filtered(index, _queries(index)[:1], prefix)
        found = index.search(_queries(index), K, nprobe=1, refine_factor=1, prefix=prefix)
        assert ((found.entries_Qk >= 0).sum(axis=1) == len(expected[0])).all()
        names = index.doc_ids_of(found.entries_Qk[found.entries_Qk >= 0])
        assert all(name.startswith(prefix) for name in names)
        for entries in found.entries_Qk:
            assert len(set(entries.tolist())) == len(entries)


@pytest.mark.parametrize("nprobe", [1, 3, 16])
def test_hits_do_not_depend_on_how_many_queries_are_scanned_at_once(
    index: Index, nprobe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "EXACT_AMONG", 0)
    queries = _queries(index)

    def found() -> list[np.ndarray]:
        hits = [index.search(queries, K, nprobe=nprobe, refine_factor=2, prefix=p).entries_Qk for p in PREFIXES]
        return [*hits, index.search(queries, 300, nprobe=nprobe, refine_factor=2).entries_Qk]

    together = found()
    monkeypatch.setattr(list_scanner, "TERMS_AT_ONCE", 60)
    assert all(np.array_equal(a, b) for a, b in zip(together, found(), strict=True))


def test_few_rows_are_scored_exactly_whatever_is_probed(index: Index) -> None:
    queries = _queries(index)
    found = index.search(queries, K, nprobe=1, refine_factor=0, prefix="doc-00001")
    assert [[e for e in entries if e >= 0] for entries in found.entries_Qk.tolist()] == _filtered(
        index, queries, "doc-00001"
    )


def test_deleted_rows_have_no_prefix(index: Index) -> None:
    # Row ids 0, 5, 40, ... were deleted with all rows of their documents: the first is doc-000000.
    assert not len(index.prefixes.entries("doc-000000"))
    assert len(index.prefixes.entries("")) == index.manifest.ntotal


def test_without_a_prefix_nothing_of_the_ledger_is_read(index: Index) -> None:
    fresh = Index(index.store, index.manifest)
    fresh.search(_queries(index), K)
    assert not fresh.prefixes.is_loaded
    fresh.search(_queries(index), K, prefix="doc")
    assert fresh.prefixes.is_loaded
