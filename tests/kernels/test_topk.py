from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.topk import exact_search, merge_topk, rescore, topk


def integer_rows(seed: int, num_rows: int, num_dims: int) -> npt.NDArray[np.float32]:
    """Small integers: float32 scores are exact, so that ties are ties and references agree to the bit."""
    return np.random.default_rng(seed).integers(-3, 4, (num_rows, num_dims)).astype(np.float32)


def reference_scores(q: npt.NDArray[Any], x: npt.NDArray[Any], metric: str) -> npt.NDArray[np.float32]:
    q, x = q.astype(np.float64), x.astype(np.float64)
    scores = q @ x.T if metric == "ip" else -np.square(q[:, None] - x[None]).sum(axis=2)
    return scores.astype(np.float32)


def reference_topk(scores: npt.NDArray[np.float32], k: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    index = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    missing = ((0, 0), (0, k - index.shape[1]))
    best = np.take_along_axis(scores, index, axis=1)
    return np.pad(best, missing, constant_values=-np.inf), np.pad(index, missing, constant_values=-1)


def assert_same(got: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_array_equal(got[0], expected[0])
    assert got[0].dtype == np.float32
    assert got[1].dtype == np.int64


@given(seed=st.integers(0, 1000), num_queries=st.integers(0, 5), num_scores=st.integers(0, 50), k=st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_topk_is_a_stable_sort(seed: int, num_queries: int, num_scores: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.array([-np.inf, -1e30, -2.5, -0.0, 0.0, 1e-40, 3.25, np.inf], np.float32)
    scores = rng.choice(values, (num_queries, num_scores))
    assert_same(topk(scores, k), reference_topk(scores, k))
    scores = rng.standard_normal((num_queries, num_scores), dtype=np.float32)
    assert_same(topk(scores, k), reference_topk(scores, k))


@given(seed=st.integers(0, 1000), num_lists=st.integers(1, 5), k=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_merged_lists_are_the_topk_of_all_in_any_order(seed: int, num_lists: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, (3, 40)).astype(np.float32)
    owner = rng.integers(0, num_lists, 40)
    lists = []
    for part in range(num_lists):
        ids = np.flatnonzero(owner == part)
        found, index = topk(scores[:, ids], k)
        padded_ids = np.append(ids, -1)
        lists.append((found, padded_ids[index].astype(np.int64)))
    assert_same(merge_topk(lists, k), reference_topk(scores, k))
    assert_same(merge_topk(lists[::-1], k), reference_topk(scores, k))


def test_merge_keeps_ids_beyond_32_bits_and_drops_absent_results() -> None:
    big = 1 << 40
    first = (np.array([[2.0, -np.inf]], np.float32), np.array([[big + 1, -1]]))
    second = (np.array([[2.0, -np.inf]], np.float32), np.array([[big, 7]]))
    assert_same(
        merge_topk([first, second], 5),
        (np.array([[2, 2, -np.inf, -np.inf, -np.inf]]), np.array([[big, big + 1, 7, -1, -1]])),
    )


@pytest.mark.parametrize("metric", ["ip", "l2"])
@given(
    seed=st.integers(0, 1000),
    num_queries=st.integers(0, 70),
    num_rows=st.integers(0, 90),
    num_dims=st.integers(1, 20),
    k=st.integers(1, 40),
    cut=st.integers(1, 90),
)
@settings(max_examples=30, deadline=None)
def test_exact_search_is_the_topk_of_all_scores_however_rows_are_cut(
    metric: str, seed: int, num_queries: int, num_rows: int, num_dims: int, k: int, cut: int
) -> None:
    queries, x = integer_rows(seed, num_queries, num_dims), integer_rows(seed + 1, num_rows, num_dims)
    expected = reference_topk(reference_scores(queries, x, metric), k)
    blocks = [(start, x[start : start + cut]) for start in range(0, num_rows, cut)]
    assert_same(exact_search(queries, blocks, k, metric=metric), expected)
    halves = [(start, block.astype(np.float16)) for start, block in reversed(blocks)]
    assert_same(exact_search(queries.astype(np.float16), iter(halves), k, metric=metric), expected)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_exact_search_finds_what_faiss_finds(metric: str) -> None:
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    x, queries = rng.standard_normal((12000, 33), dtype=np.float32), rng.standard_normal((70, 33), dtype=np.float32)
    scores, rows = exact_search(queries, [(0, x[:5000]), (5000, x[5000:])], 20, metric=metric)
    kind = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
    their_scores, their_rows = faiss.knn(queries, x, 20, metric=kind)
    assert (rows == their_rows).mean() > 0.999
    np.testing.assert_allclose(scores, their_scores if metric == "ip" else -their_scores, rtol=1e-4, atol=1e-4)
    one_row_later = exact_search(queries, [(9, x[:1]), (10, x[1:7001]), (7010, x[7001:])], 20, metric=metric)
    assert_same(one_row_later, (scores, rows + 9))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@given(num_queries=st.integers(0, 4), num_candidates=st.integers(0, 9), num_dims=st.integers(1, 70), half=st.booleans())
@settings(max_examples=40, deadline=None)
def test_rescore_agrees_with_the_reference_and_scores_each_pair_alone(
    metric: str, num_queries: int, num_candidates: int, num_dims: int, half: bool
) -> None:
    rng = np.random.default_rng(num_dims)
    queries = rng.standard_normal((num_queries, num_dims), dtype=np.float32)
    candidates = rng.standard_normal((num_queries, num_candidates, num_dims), dtype=np.float32)
    if half:
        candidates = candidates.astype(np.float16).astype(np.float32)
    got = rescore(queries, candidates.astype(np.float16) if half else candidates, metric=metric)
    assert got.dtype == np.float32
    assert got.shape == (num_queries, num_candidates)
    for query in range(num_queries):
        expected = reference_scores(queries[query : query + 1], candidates[query], metric)[0]
        np.testing.assert_allclose(got[query], expected, rtol=1e-5, atol=1e-5 * num_dims)
        for place in range(num_candidates):
            alone = rescore(queries[query : query + 1], candidates[query : query + 1, place : place + 1], metric=metric)
            assert alone[0, 0] == got[query, place]


def test_wrong_arguments_are_named() -> None:
    x = integer_rows(0, 10, 4)
    scores = reference_scores(x, x, "ip")
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        topk(scores, 0)
    with pytest.raises(ValueError, match="at least one list"):
        merge_topk([], 3)
    with pytest.raises(ValueError, match=r"D of queries_QD \(4\), got 3"):
        exact_search(x, [(0, x[:, :3])], 3, metric="ip")
    with pytest.raises(ValueError, match="got 'cosine'"):
        rescore(x, x[:, None], metric="cosine")
    with pytest.raises(ValueError, match=r"candidates_QCD must be \[10, C, 4\]"):
        rescore(x, x[:5, None], metric="ip")
    scores[2, 3] = np.nan
    with pytest.raises(ValueError, match="query 2 has a NaN"):
        topk(scores, 3)
    bad = x.copy()
    bad[6, 1] = np.nan
    with pytest.raises(ValueError, match="row 106 holds"):
        exact_search(x, [(0, x), (100, bad)], 3, metric="ip")
    with pytest.raises(ValueError, match="query 6 holds"):
        exact_search(bad, [(0, x)], 3, metric="ip")
    for metric in ("ip", "l2"):
        with pytest.raises(ValueError, match="within float32: row 0"):
            exact_search(x + np.float32(1e30), [(0, x + np.float32(1e30))], 3, metric=metric)
