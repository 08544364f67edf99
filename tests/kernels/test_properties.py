"""Every path of every kernel against kernels/reference.py: with numba, without it and, with -m gpu, CuPy arrays.

What compares is exact where the kernel promises so; elsewhere tolerances are rounding bounds of the dtype: n additions
of products give at most n + 1 units of roundoff of the sum of their magnitudes, in whatever order they are added.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import assign, hamming, kmeans, minhash, pool, pq, reference, topk
from tests.kernels.array_paths import (
    GPU,
    UNDERFLOW,
    UNIT_ROUNDOFF,
    Array,
    assert_same,
    dims,
    everywhere,
    fetched,
    few,
    matrices,
    metrics,
    moved,
    on_the_host,
    segments,
    taken,
)


@everywhere
@metrics
@given(data=st.data(), num_rows=st.integers(0, 60), num_centroids=st.integers(1, 90), num_dims=dims)
@few
def test_nearest_centroids(
    path: str, metric: str, data: st.DataObject, num_rows: int, num_centroids: int, num_dims: int
) -> None:
    x, centroids = data.draw(matrices(num_rows, num_dims)), data.draw(matrices(num_centroids, num_dims))
    with taken(path):
        got = fetched(assign.assign_nearest(moved(path, x), moved(path, centroids), metric=metric))
    assert_same((got,), (reference.assign_nearest(x, centroids, metric=metric),))


@metrics
@given(data=st.data(), num_rows=st.integers(0, 30), num_centroids=st.integers(1, 40), num_dims=dims)
@few
def test_nearest_centroids_of_queries(
    metric: str, data: st.DataObject, num_rows: int, num_centroids: int, num_dims: int
) -> None:
    # Normal numbers have no ties that a rounding of the float64 scores to float32 could make or break.
    q, centroids = (
        data.draw(matrices(num_rows, num_dims, kinds="normal integers repeated")),
        data.draw(matrices(num_centroids, num_dims, kinds="integers")),
    )
    k = data.draw(st.integers(1, num_centroids))
    scores, list_no = assign.assign_topk(q, centroids, k, metric=metric)
    expected, _ = reference.assign_topk(q, centroids, k, metric=metric)
    magnitudes = score_magnitudes(q, centroids, metric)
    error = UNIT_ROUNDOFF["float32"] * np.abs(expected) + (num_dims + 4) * 2.0**-50 * magnitudes.max(initial=0.0)
    assert (np.abs(scores - expected) <= 2.0 * error).all()
    own = np.take_along_axis(reference.scores(q, centroids, metric), list_no.astype(np.int64), axis=1)
    assert (np.abs(own - scores) <= 2.0 * error).all()
    assert (np.diff(scores, axis=1) <= 0).all()
    assert ((np.diff(list_no, axis=1) > 0) | (np.diff(scores, axis=1) < 0)).all()


def score_magnitudes(q: Array, x: Array, metric: str) -> Array:
    """Sum [Q, N] of the magnitudes of what is added up for a score."""
    q, x = np.abs(q.astype(np.float64)), np.abs(x.astype(np.float64))
    products = q @ x.T
    if metric == "ip":
        return np.asarray(products)
    return np.asarray(2.0 * products + np.square(q).sum(axis=1)[:, None] + np.square(x).sum(axis=1))


@on_the_host
@given(data=st.data(), num_rows=st.integers(0, 80), num_lists=st.integers(1, 12), num_dims=dims)
@few
def test_partial_sums(path: str, data: st.DataObject, num_rows: int, num_lists: int, num_dims: int) -> None:
    rows = data.draw(matrices(num_rows, num_dims))
    list_no = np.random.default_rng(num_rows).integers(0, num_lists, num_rows).astype(np.int32)
    with taken(path):
        got = kmeans.partial_sums(rows, list_no, num_lists)
    assert_same(got, reference.partial_sums(rows, list_no, num_lists))


@pytest.mark.gpu
@given(data=st.data(), num_rows=st.integers(0, 80), num_lists=st.integers(1, 12), num_dims=dims)
@few
def test_partial_sums_on_a_device(data: st.DataObject, num_rows: int, num_lists: int, num_dims: int) -> None:
    pytest.importorskip("cupy")
    from kernels.cuda.kmeans import partial_sums

    rows = data.draw(matrices(num_rows, num_dims))
    list_no = np.random.default_rng(num_rows).integers(0, num_lists, num_rows).astype(np.int32)
    sums, counts = fetched(partial_sums(moved("cupy", rows), moved("cupy", list_no), num_lists))
    expected, expected_counts = reference.partial_sums(rows, list_no, num_lists)
    magnitudes, _ = reference.partial_sums(np.abs(rows), list_no, num_lists)
    np.testing.assert_array_equal(counts, expected_counts)
    assert (np.abs(sums - expected) <= 2.0 * num_rows * 2.0**-53 * magnitudes).all()


@on_the_host
@metrics
@given(data=st.data(), num_rows=st.integers(2, 80), num_dims=dims)
@few
def test_an_iteration_of_kmeans(path: str, metric: str, data: st.DataObject, num_rows: int, num_dims: int) -> None:
    sample = data.draw(matrices(num_rows, num_dims, kinds="normal"))
    num_centroids = data.draw(st.integers(1, num_rows - 1))
    start = sample[:num_centroids].astype(np.float32)
    expected, counts = reference.lloyd_iteration(sample, start, metric=metric)
    begun = kmeans.Checkpoint(0, start, np.full(num_rows, -1, np.int32))
    with taken(path):
        got = kmeans.kmeans(sample, num_centroids, metric=metric, seed=0, iterations=1, checkpoint=begun)
    if counts.all():
        # Sums in float64 in another order than the reference's, then one rounding to float32.
        tolerance = UNIT_ROUNDOFF["float32"] * np.abs(expected) + 1e-12 * np.abs(sample.astype(np.float64)).max()
        assert (np.abs(got - expected) <= 1.01 * tolerance + UNDERFLOW["float32"]).all()
    assert np.isfinite(got).all()


@metrics
@given(data=st.data(), num_rows=st.integers(1, 20), num_dims=dims)
@few
def test_kmeans_of_fewer_rows_than_centroids_starts_with_the_rows(
    metric: str, data: st.DataObject, num_rows: int, num_dims: int
) -> None:
    sample = data.draw(matrices(num_rows, num_dims))
    num_centroids = data.draw(st.integers(num_rows, 50))
    got = kmeans.kmeans(sample, num_centroids, metric=metric, seed=0)
    rows = sample.astype(np.float64)
    if metric == "ip":
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(norms > 0, norms, 1.0)
    assert got.shape == (num_centroids, num_dims)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[:num_rows], rows, rtol=2.0**-23, atol=2.0**-126)


@everywhere
@pytest.mark.parametrize("nbits", [4, 8])
@given(data=st.data(), num_rows=st.integers(0, 40), M=st.integers(1, 7), sub_dims=st.integers(1, 11))
@few
def test_codes_and_what_they_stand_for(
    path: str, nbits: int, data: st.DataObject, num_rows: int, M: int, sub_dims: int
) -> None:
    residuals = data.draw(matrices(num_rows, M * sub_dims))
    words = data.draw(matrices((1 << nbits) * M, sub_dims)).astype(np.float32)
    codebooks = words.reshape(M, 1 << nbits, sub_dims)
    with taken(path):
        codes = fetched(pq.pq_encode(moved(path, residuals), moved(path, codebooks)))
    assert_same((codes,), (reference.pq_encode(residuals, codebooks),))
    assert_same((pq.pq_decode(codes, codebooks),), (reference.pq_decode(codes, codebooks),))


@pytest.mark.parametrize("path", ["numpy", GPU])
@given(data=st.data(), num_queries=st.integers(0, 6), num_scores=st.integers(0, 70), k=st.integers(1, 80))
@few
def test_best_scores(path: str, data: st.DataObject, num_queries: int, num_scores: int, k: int) -> None:
    scores = data.draw(matrices(num_queries, num_scores)).astype(np.float32)
    assert_same(fetched(topk.topk(moved(path, scores), k)), reference.topk(scores, k))


@given(data=st.data(), sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5), k=st.integers(1, 30))
@few
def test_merged_results(data: st.DataObject, sizes: list[int], k: int) -> None:
    rng = np.random.default_rng(k)
    lists = []
    for size in sizes:
        scores = data.draw(matrices(3, size)).astype(np.float32)
        lists.append((scores, rng.integers(-1, 20, scores.shape)))
    assert_same(topk.merge_topk(lists, k), reference.merge_topk(lists, k))


@metrics
@given(data=st.data(), num_queries=st.integers(0, 5), num_rows=st.integers(0, 60), num_dims=dims, k=st.integers(1, 70))
@few
def test_exact_search(metric: str, data: st.DataObject, num_queries: int, num_rows: int, num_dims: int, k: int) -> None:
    q, x = data.draw(matrices(num_queries, num_dims)), data.draw(matrices(num_rows, num_dims))
    cut = data.draw(st.integers(0, num_rows))
    scores, rows = topk.exact_search(q, [(0, x[:cut]), (cut, x[cut:])], k, metric=metric)
    expected, expected_rows = reference.exact_search(q, x, k, metric=metric)
    found = min(k, num_rows)
    np.testing.assert_array_equal(rows[:, found:], -1)
    np.testing.assert_array_equal(scores[:, found:], -np.inf)
    if not num_queries or not num_rows:
        return
    error = 2.0 * (num_dims + 4) * UNIT_ROUNDOFF["float32"] * score_magnitudes(q, x, metric) + 2.0**-126
    most = error.max(axis=1, keepdims=True)
    own = np.take_along_axis(reference.scores(q, x, metric), rows[:, :found], axis=1)
    assert (np.abs(scores[:, :found] - own) <= most).all()
    assert (np.abs(scores[:, :found] - expected[:, :found]) <= most).all()
    assert all(len(set(row)) == found for row in rows[:, :found].tolist())
    if np.abs(x).max() <= 2 and (x == np.rint(x)).all() and np.abs(q).max() <= 2 and (q == np.rint(q)).all():
        assert_same((scores, rows), (expected, expected_rows))  # integers: nothing is rounded


@metrics
@given(data=st.data(), num_queries=st.integers(0, 5), num_candidates=st.integers(0, 9), num_dims=dims)
@few
def test_scores_of_own_candidates(
    metric: str, data: st.DataObject, num_queries: int, num_candidates: int, num_dims: int
) -> None:
    q = data.draw(matrices(num_queries, num_dims))
    candidates = data.draw(matrices(num_queries * num_candidates, num_dims))
    candidates = candidates.reshape(num_queries, num_candidates, num_dims)
    got = topk.rescore(q, candidates, metric=metric)
    expected = reference.rescore(q, candidates, metric=metric)
    for query in range(num_queries):
        magnitudes = score_magnitudes(q[query : query + 1], candidates[query], metric)[0]
        error = 2.0 * (num_dims + 4) * UNIT_ROUNDOFF["float32"] * magnitudes + 2.0**-126
        assert (np.abs(got[query] - expected[query]) <= error).all()
    assert got.shape == expected.shape
    assert got.dtype == np.float32


@everywhere
@given(
    seed=st.integers(0, 2**32),
    num_queries=st.integers(0, 6),
    num_rows=st.integers(0, 50),
    num_bytes=st.integers(1, 33),
    k=st.integers(1, 60),
)
@few
def test_hamming(path: str, seed: int, num_queries: int, num_rows: int, num_bytes: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    values = 256 if seed % 2 else 2  # two different bytes give many ties
    q, x = (rng.integers(0, values, (n, num_bytes)).astype(np.uint8) for n in (num_queries, num_rows))
    with taken(path):
        got = fetched(hamming.hamming_distances(moved(path, q), moved(path, x)))
        assert_same((got,), (reference.hamming_distances(q, x),))
        if path != "cupy":
            assert_same(hamming.hamming_search(q, x, k), reference.hamming_search(q, x, k))


@everywhere
@given(offsets=segments(), seed=st.integers(0, 2**64 - 1), shingle=st.integers(1, 12), num_hashes=st.integers(1, 40))
@few
def test_signatures(path: str, offsets: npt.NDArray[np.int64], seed: int, shingle: int, num_hashes: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 2**31, int(offsets[-1])).astype(np.int32)
    arguments: Any = {"num_hashes": num_hashes, "shingle": shingle, "seed": seed}
    with taken(path):
        got = fetched(minhash.minhash(moved(path, tokens), moved(path, offsets), **arguments))
    assert_same((got,), (reference.minhash(tokens, offsets, **arguments),))


@everywhere
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@given(num_rows=st.integers(1, 40), num_dims=dims, data=st.data())
@few
def test_a_value_that_is_not_finite_is_an_error_that_names_its_row(
    path: str, value: float, num_rows: int, num_dims: int, data: st.DataObject
) -> None:
    bad = data.draw(st.integers(0, num_rows - 1))
    x = np.random.default_rng(0).standard_normal((num_rows, num_dims), dtype=np.float32)
    good, offsets = x.copy(), np.arange(num_rows + 1)
    x[bad, data.draw(st.integers(0, num_dims - 1))] = value
    codebooks = np.random.default_rng(1).standard_normal((1, 16, num_dims), dtype=np.float32)
    device_x, device_good = moved(path, x), moved(path, good)
    with taken(path):
        for metric in ("ip", "l2"):
            with pytest.raises(ValueError, match=f"row {bad} "):
                assign.assign_nearest(device_x, device_good, metric=metric)
            with pytest.raises(ValueError, match=f"centroid {bad} "):
                assign.assign_nearest(device_good, device_x, metric=metric)
        with pytest.raises(ValueError, match=f"row {bad} "):
            pq.pq_encode(device_x, moved(path, codebooks))
        for dtype in pool.DTYPES:
            arguments: Any = {"mode": "mean", "dtype": dtype}
            with pytest.raises(ValueError, match=f"segment {bad} is not"):
                pool.pool_normalize(device_x, moved(path, offsets), **arguments)
        if np.isnan(value):
            with pytest.raises(ValueError, match=f"query {bad} has a NaN"):
                topk.topk(device_x, 3)
        if path != "cupy":
            with pytest.raises(ValueError, match=f"row {bad} "):
                kmeans.kmeans(x, num_rows, metric="l2", seed=0)
            with pytest.raises(ValueError, match=f"row {bad} "):
                topk.exact_search(good, [(0, x)], 3, metric="l2")
            with pytest.raises(ValueError, match=f"query {bad} "):
                topk.exact_search(x, [(0, good)], 3, metric="l2")


@everywhere
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), data=st.data())
@few
def test_an_empty_segment_is_an_error_that_names_it(path: str, lengths: list[int], data: st.DataObject) -> None:
    empty = data.draw(st.integers(0, len(lengths)))
    lengths = [*lengths[:empty], 0, *lengths[empty:]]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    with taken(path):
        with pytest.raises(ValueError, match=f"segment {empty} holds 0"):
            pool.pool_normalize(moved(path, np.ones((sum(lengths), 3), np.float32)), moved(path, offsets), mode="mean")
        with pytest.raises(ValueError, match=f"segment {empty} holds 0"):
            minhash.minhash(moved(path, np.ones(sum(lengths), np.int32)), moved(path, offsets), seed=0)
