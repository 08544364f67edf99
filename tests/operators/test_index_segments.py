"""Search over versions of several segments with deleted rows, against plain models of the corpus.

N rows, Q queries, d dimensions, k hits, M sub-quantizers.
"""

from __future__ import annotations

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.assign import assign_nearest
from operators.artifact.index import Index, Neighbours
from tests.artifact_maker import Version, add_delta, delete_rows, make_version

K = 12
MAPPED = 0  # joined_bytes: all segments in their files
JOINED = 1 << 30  # all deltas in memory


@pytest.fixture(scope="module", params=["ip", "l2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("base"), metric=request.param, num_docs=150, part_rows=100)


def live_ids(version: Version) -> npt.NDArray[np.int64]:
    return np.flatnonzero(version.live_N)


def scores_of(queries_Qd: np.ndarray, vectors_Nd: np.ndarray, metric: str) -> np.ndarray:
    queries, vectors = queries_Qd.astype(np.float64), vectors_Nd.astype(np.float64)
    if metric == "ip":
        return queries @ vectors.T
    return -((queries[:, None] - vectors[None]) ** 2).sum(axis=2)


def decoded(version: Version) -> np.ndarray:
    """What the codes of all rows stand for, float64 [N, d]."""
    q = version.quantizer
    vectors = version.corpus.vectors_Nd.astype(np.float32)
    list_no = assign_nearest(vectors, q.centroids_Kd, metric=version.manifest.metric)
    residual_NMd = (vectors - q.centroids_Kd[list_no]).reshape(len(vectors), q.M, -1).astype(np.float64)
    out = np.empty_like(residual_NMd)
    for m in range(q.M):
        distance = ((residual_NMd[:, m, None] - q.codebooks_MKd[m][None]) ** 2).sum(axis=2)
        out[:, m] = q.codebooks_MKd[m][distance.argmin(axis=1)]
    return q.centroids_Kd[list_no] + out.reshape(len(vectors), -1)


def check_top(found: Neighbours, version: Version, vectors_Nd: np.ndarray, k: int) -> None:
    """The hits are the k best live rows by the scores of these vectors, in order, where scores are told apart."""
    live = live_ids(version)
    scores_QN = scores_of(version.corpus.queries_Qd, vectors_Nd, version.manifest.metric)
    k = min(k, len(live))
    assert found.row_ids_Qk.shape == (len(scores_QN), k)
    for q, scores_N in enumerate(scores_QN):
        ids = found.row_ids_Qk[q]
        assert len(set(ids.tolist())) == k
        assert version.live_N[ids].all()
        assert np.allclose(found.scores_Qk[q], scores_N[ids], atol=2e-5)
        assert np.allclose(found.scores_Qk[q], np.sort(scores_N[live])[::-1][:k], atol=2e-5)


def check_all(version: Version, joined_bytes: int) -> None:
    """Search by codes, refined search, exact search and what belongs to the hits."""
    index = Index(version.store, version.manifest, joined_bytes=joined_bytes)
    queries, num_live, nlist = version.corpus.queries_Qd, version.manifest.ntotal, version.manifest.nlist
    by_codes = index.search(queries, K, nprobe=nlist, refine_factor=0)
    check_top(by_codes, version, decoded(version), K)
    refined = index.search(queries, K, nprobe=nlist, refine_factor=-(-num_live // K))
    exact = index.exact_search(queries, K)
    check_top(refined, version, version.corpus.vectors_Nd, K)
    check_top(exact, version, version.corpus.vectors_Nd, K)
    assert np.allclose(refined.scores_Qk, exact.scores_Qk, atol=2e-6)
    every = index.search(queries[:2], num_live + 7, nprobe=nlist, refine_factor=0)
    assert [sorted(ids) for ids in every.row_ids_Qk.tolist()] == [live_ids(version).tolist()] * 2
    entries, row_ids = exact.entries_Qk[:4].ravel(), exact.row_ids_Qk[:4].ravel()
    assert np.array_equal(index.vectors_of(entries), version.corpus.vectors_Nd[row_ids])
    assert [line["row_id"] for line in index.rows_of(entries)] == row_ids.tolist()
    assert index.doc_ids_of(entries).tolist() == [version.corpus.doc_ids[row] for row in row_ids.tolist()]


@pytest.mark.parametrize("joined_bytes", [MAPPED, JOINED])
def test_deltas_and_deletions_search_like_a_plain_list_of_the_live_rows(base: Version, joined_bytes: int) -> None:
    rng = np.random.default_rng(5)
    version = add_delta(base, 25, delete=rng.choice(300, 40).tolist(), publish=False)
    version = add_delta(version, 40, num_pieces=2, part_rows=30, drifted=True, publish=False)
    version = delete_rows(version, rng.choice(version.manifest.next_row_id, 60).tolist(), publish=False)
    assert len(version.manifest.segments) == 3
    assert all(segment.num_deleted for segment in version.manifest.segments)
    check_all(version, joined_bytes)
    queries, first = version.corpus.queries_Qd, version.manifest.segments[1].first_row_id
    index = Index(version.store, version.manifest, joined_bytes=joined_bytes)
    in_deltas = np.flatnonzero(version.live_N[first:]) + first
    scores_QN = scores_of(queries, version.corpus.vectors_Nd[in_deltas], version.manifest.metric)
    found = index.exact_search(queries, K, from_row_id=first)
    assert np.array_equal(np.sort(found.row_ids_Qk), np.sort(in_deltas[np.argsort(-scores_QN)[:, :K]]))


@pytest.mark.parametrize("joined_bytes", [MAPPED, JOINED])
def test_threads_of_scans_change_no_answer(base: Version, joined_bytes: int) -> None:
    rng = np.random.default_rng(6)
    version = delete_rows(add_delta(base, 40, publish=False), rng.choice(300, 50).tolist(), publish=False)
    for made in (base, version):
        before = faiss.omp_get_max_threads()
        found = [
            Index(made.store, made.manifest, joined_bytes=joined_bytes, scan_threads=threads).search(
                made.corpus.queries_Qd, K, nprobe=nprobe, refine_factor=refine
            )
            for nprobe in (3, made.manifest.nlist)
            for refine in (0, 4)
            for threads in (0, 1, 2, 3, 8)
        ]
        assert faiss.omp_get_max_threads() == before
        for number, one in enumerate(found):
            first = found[number - number % 5]
            assert np.array_equal(one.entries_Qk, first.entries_Qk)
            assert np.array_equal(one.scores_Qk.view(np.int32), first.scores_Qk.view(np.int32))


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_any_sequence_of_deltas_and_deletions_searches_like_the_live_rows(base: Version, data: st.DataObject) -> None:
    version = base
    for _ in range(data.draw(st.integers(1, 3), label="steps")):
        num_docs = data.draw(st.sampled_from([0, 1, 12]), label="added")
        share = data.draw(st.sampled_from([0.0, 0.02, 0.5, 0.97]), label="deleted")
        rng = np.random.default_rng(data.draw(st.integers(0, 99), label="seed"))
        rows = np.flatnonzero(rng.random(version.manifest.next_row_id) < share)
        version = add_delta(version, num_docs, delete=rows.tolist(), publish=False)
    if version.manifest.ntotal:
        check_all(version, data.draw(st.sampled_from([MAPPED, JOINED]), label="joined_bytes"))


@pytest.mark.parametrize("joined_bytes", [MAPPED, JOINED])
def test_queries_whose_whole_neighbourhood_is_deleted_still_get_the_best_live_rows(
    base: Version, joined_bytes: int
) -> None:
    queries = base.corpus.queries_Qd
    near = Index(base.store, base.manifest).search(queries[:3], 60, nprobe=16, refine_factor=0).row_ids_Qk
    # Few of all rows are deleted, and all that these queries would find: they are asked again and again.
    version = delete_rows(add_delta(base, 60, publish=False), np.unique(near).tolist(), publish=False)
    check_all(version, joined_bytes)
    k, index = 30, Index(version.store, version.manifest, joined_bytes=joined_bytes)
    together = index.search(queries, k, nprobe=4, refine_factor=0)
    assert version.live_N[together.row_ids_Qk[together.row_ids_Qk >= 0]].all()
    for q in range(len(queries)):  # how often the others are asked again does not matter
        alone = index.search(queries[q : q + 1], k, nprobe=4, refine_factor=0)
        assert np.array_equal(alone.row_ids_Qk[0], together.row_ids_Qk[q])


@pytest.mark.parametrize("joined_bytes", [MAPPED, JOINED])
def test_segments_of_which_every_row_is_deleted_are_passed_over(base: Version, joined_bytes: int) -> None:
    two = add_delta(base, 20, publish=False)
    rows = two.manifest.next_row_id
    for dead in (range(base.manifest.next_row_id), range(base.manifest.next_row_id, rows)):
        version = delete_rows(two, list(dead), publish=False)
        assert version.manifest.ntotal == rows - len(dead)
        check_all(version, joined_bytes)
    empty = delete_rows(two, list(range(rows)), publish=False)
    assert empty.manifest.ntotal == 0
    index = Index(empty.store, empty.manifest, joined_bytes=joined_bytes)
    for found in (index.search(empty.corpus.queries_Qd, 5), index.exact_search(empty.corpus.queries_Qd, 5)):
        assert found.row_ids_Qk.shape == found.scores_Qk.shape == (16, 0)


def test_only_the_smallest_deltas_are_joined_and_the_answers_are_the_same(base: Version) -> None:
    version = add_delta(add_delta(add_delta(base, 40, publish=False), 10, publish=False), 25, delete=[3], publish=False)
    queries = version.corpus.queries_Qd
    expected = None
    for joined_bytes in (MAPPED, 2_000, 6_000, JOINED):
        index = Index(version.store, version.manifest, joined_bytes=joined_bytes)
        found = index.search(queries, K, nprobe=5)
        expected = expected or found
        assert np.array_equal(found.entries_Qk, expected.entries_Qk)
        assert np.array_equal(found.scores_Qk, expected.scores_Qk)
