from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import assign, assign_bf16, reference
from kernels.assign import assign_nearest, assign_topk
from tests.kernels.array_paths import dims, few, matrices

sizes = st.integers(1, 70)


def random_matrix(seed: int, num_rows: int, num_dims: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((num_rows, num_dims), dtype=np.float32)


def unit_rows(seed: int, num_rows: int, num_dims: int) -> npt.NDArray[np.float32]:
    x = random_matrix(seed, num_rows, num_dims)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def reference_scores(x_ND: npt.NDArray[Any], centroids_KD: npt.NDArray[Any], metric: str) -> npt.NDArray[np.float64]:
    x, c = x_ND.astype(np.float64), centroids_KD.astype(np.float64)
    if metric == "ip":
        return np.asarray(x @ c.T)
    return np.asarray(-np.square(x[:, None] - c[None]).sum(axis=2))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@given(seed=st.integers(0, 1000), num_rows=st.integers(0, 70), num_centroids=sizes, num_dims=sizes)
@settings(max_examples=40, deadline=None)
def test_nearest_is_as_good_as_the_float64_reference(
    metric: str, seed: int, num_rows: int, num_centroids: int, num_dims: int
) -> None:
    x, centroids = random_matrix(seed, num_rows, num_dims), random_matrix(seed + 1, num_centroids, num_dims)
    got = assign_nearest(x, centroids, metric=metric, block_rows=32)
    assert got.dtype == np.int32
    assert got.shape == (num_rows,)
    scores = reference_scores(x, centroids, metric)
    tolerance = 1e-5 * num_dims * 10
    assert (scores[np.arange(num_rows), got] >= scores.max(axis=1, initial=-np.inf) - tolerance).all()


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("num_dims", [33, 384])
def test_a_row_gets_the_same_list_in_whatever_piece_it_comes(metric: str, num_dims: int) -> None:
    x, centroids = random_matrix(1, 5000, num_dims), random_matrix(2, 300, num_dims)
    whole = assign_nearest(x, centroids, metric=metric)
    for cut in (1, 7, 777, 4097):
        pieces = [assign_nearest(x[i : i + cut], centroids, metric=metric) for i in range(0, min(len(x), 3 * cut), cut)]
        joined = np.concatenate(pieces)
        np.testing.assert_array_equal(joined, whole[: len(joined)])


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_rows_that_float32_cannot_decide_go_where_float64_says(metric: str, scale: float) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(200) * scale
    # Centroids a few float32 units apart, so that rounding decides in a plain float32 product.
    centroids = (base * (1 + rng.integers(-3, 4, (300, 200)) * 2.0**-23)).astype(np.float32)
    x = (base + rng.standard_normal((500, 200)) * scale).astype(np.float32)
    expected = reference_scores(x, centroids, metric).argmax(axis=1)
    plain_scores = x @ centroids.T
    if metric == "l2":
        plain_scores = 2 * plain_scores - np.square(centroids).sum(axis=1)
    assert (plain_scores.argmax(axis=1) != expected).mean() > 0.1
    np.testing.assert_array_equal(assign_nearest(x, centroids, metric=metric), expected)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_threads_and_block_sizes_do_not_change_the_lists(metric: str) -> None:
    x, centroids = random_matrix(1, 6000, 100), random_matrix(2, 500, 100)
    centroids[250:] = centroids[:250] * np.float32(1 + 2.0**-20)
    whole = assign_nearest(x, centroids, metric=metric)
    threads = torch.get_num_threads()
    try:
        for num_threads, block_rows in ((1, 4096), (2, 4096), (3, 1000), (2, 17)):
            torch.set_num_threads(num_threads)
            np.testing.assert_array_equal(assign_nearest(x, centroids, metric=metric, block_rows=block_rows), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_tiles_of_columns_do_not_change_the_result(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, centroids = random_matrix(1, 200, 20), random_matrix(2, 1000, 20)
    whole = assign_nearest(x, centroids, metric=metric)
    monkeypatch.setattr(assign, "COLUMN_TILE", 64)
    np.testing.assert_array_equal(assign_nearest(x, centroids, metric=metric), whole)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("tile", [16, 2048])
def test_ties_go_to_the_lowest_id(metric: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign, "COLUMN_TILE", tile)
    centroids = np.tile(random_matrix(3, 10, 24), (6, 1))
    x = random_matrix(4, 100, 24)
    assert assign_nearest(x, centroids, metric=metric).max() < 10
    scores, lists = assign_topk(x, centroids, 12, metric=metric)
    np.testing.assert_array_equal(lists[:, :6] // 10, np.tile(np.arange(6), (100, 1)))
    np.testing.assert_array_equal(lists[:, 0], assign_nearest(x, centroids, metric=metric))
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_topk_agrees_with_the_reference_and_is_the_same_for_each_query_alone(metric: str) -> None:
    queries, centroids = random_matrix(5, 45, 50), random_matrix(6, 120, 50)
    scores, lists = assign_topk(queries, centroids, 9, metric=metric)
    reference = reference_scores(queries, centroids, metric)
    np.testing.assert_array_equal(lists, np.argsort(-reference, axis=1, kind="stable")[:, :9])
    np.testing.assert_allclose(
        scores, np.take_along_axis(reference, lists.astype(np.int64), axis=1), rtol=1e-4, atol=1e-4
    )
    assert scores.dtype == np.float32
    assert lists.dtype == np.int32
    for query in (0, 31, 44):
        alone = assign_topk(queries[query : query + 1], centroids, 9, metric=metric)
        np.testing.assert_array_equal(alone[0][0], scores[query])
        np.testing.assert_array_equal(alone[1][0], lists[query])


def test_distance_to_itself_is_never_positive() -> None:
    x = random_matrix(7, 50, 40) * 100
    assert (assign_topk(x, x, 1, metric="l2")[0] <= 0).all()


def test_float16_rows_are_assigned_as_their_float32_values() -> None:
    x, centroids = random_matrix(8, 100, 16).astype(np.float16), random_matrix(9, 12, 16)
    np.testing.assert_array_equal(
        assign_nearest(x, centroids, metric="l2", block_rows=30),
        assign_nearest(x.astype(np.float32), centroids, metric="l2"),
    )


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tile", [4, 2048])
def test_the_first_row_that_is_not_finite_is_named(
    metric: str, bad: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assign, "COLUMN_TILE", tile)
    x, centroids = random_matrix(1, 50, 8), random_matrix(2, 10, 8)
    centroids[3, 2] = 0.0
    x[37, 2] = x[41, 0] = bad
    with pytest.raises(ValueError, match="row 37 holds"):
        assign_nearest(x, centroids, metric=metric, block_rows=16)
    with pytest.raises(ValueError, match="row 37 holds"):
        assign_topk(x, centroids, 3, metric=metric)


def test_scores_beyond_float32_are_refused_and_not_guessed() -> None:
    x = np.full((3, 4), 1e30, np.float32)
    with pytest.raises(ValueError, match=r"row 0 .*too large"):
        assign_nearest(x, x, metric="ip")
    with pytest.raises(ValueError, match="centroid 0"):
        assign_nearest(x, x, metric="l2")


def test_wrong_arguments_are_named() -> None:
    x = random_matrix(1, 5, 8)
    with pytest.raises(ValueError, match="metric must be one of ip, l2, got 'cosine'"):
        assign_nearest(x, x, metric="cosine")
    with pytest.raises(ValueError, match=r"D of centroids_KD \(7\), got 8"):
        assign_nearest(x, x[:, :7], metric="ip")
    with pytest.raises(ValueError, match="at least one row"):
        assign_nearest(x, x[:0], metric="ip")
    with pytest.raises(ValueError, match=r"k must be in 1..K \(5\), got 6"):
        assign_topk(x, x, 6, metric="ip")
    with pytest.raises(ValueError, match="float64"):
        assign_nearest(x.astype(np.float64), x, metric="ip")
    with pytest.raises(ValueError, match="precision must be one of auto, float32, bf16, tf32, got 'fp8'"):
        assign_nearest(x, x, metric="ip", precision="fp8")
    with pytest.raises(ValueError, match=r"D of centroids_KD \(7\), got 8"):
        assign_nearest(x, x[:, :7], metric="ip", precision="bf16")


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("metric", ["ip", "l2"])
@given(data=st.data(), num_rows=st.integers(0, 60), num_centroids=st.integers(1, 90), num_dims=dims)
@few
def test_bfloat16_products_lead_to_the_lists_of_the_reference(
    precision: str, metric: str, data: st.DataObject, num_rows: int, num_centroids: int, num_dims: int
) -> None:
    x, centroids = data.draw(matrices(num_rows, num_dims)), data.draw(matrices(num_centroids, num_dims))
    got = assign_nearest(x, centroids, metric=metric, precision=precision)
    np.testing.assert_array_equal(got, reference.assign_nearest(x, centroids, metric=metric), strict=True)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_bfloat16_scores_alone_would_miss_what_the_bf16_mode_finds(metric: str) -> None:
    x, centroids = unit_rows(1, 3000, 384), unit_rows(2, 2000, 384)
    expected = assign_nearest(x, centroids, metric=metric)
    plain = torch.from_numpy(x).bfloat16() @ torch.from_numpy(centroids).bfloat16().t()
    assert (plain.float().numpy().argmax(axis=1) != expected).mean() > 0.005
    np.testing.assert_array_equal(assign_nearest(x, centroids, metric=metric, precision="bf16"), expected)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_bf16_lists_do_not_depend_on_threads_pieces_or_the_processor(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, centroids = unit_rows(1, 2500, 96), unit_rows(2, 700, 96)
    whole = assign_nearest(x, centroids, metric=metric, precision="bf16")
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            again = assign_nearest(x, centroids, metric=metric, precision="bf16")
            np.testing.assert_array_equal(again, whole)
    finally:
        torch.set_num_threads(threads)
    pieces = [assign_nearest(x[i : i + 37], centroids, metric=metric, precision="bf16") for i in range(0, len(x), 37)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    monkeypatch.setattr(assign_bf16, "has_bfloat16", lambda: False)
    np.testing.assert_array_equal(assign_nearest(x, centroids, metric=metric, precision="bf16"), whole)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_blocks_that_bfloat16_leaves_undecided_are_decided_by_float32(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    centroids = np.tile(unit_rows(3, 10, 24), (60, 1)) + unit_rows(4, 1, 24)
    x = np.concatenate([unit_rows(5, 1024, 24), np.zeros((1024, 24), np.float32), 1e4 + unit_rows(6, 500, 24)])
    left: list[bool] = []
    candidates = assign_bf16._candidates

    def spied(*arguments: Any) -> Any:
        found = candidates(*arguments)
        left.append(found is None)
        return found

    monkeypatch.setattr(assign_bf16, "_candidates", spied)
    got = assign_nearest(x, centroids, metric=metric, precision="bf16")
    np.testing.assert_array_equal(got, assign_nearest(x, centroids, metric=metric))
    assert got.max() < 10
    assert not assign_bf16.has_bfloat16() or any(left)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_bf16_mode_names_the_first_row_that_is_not_finite(metric: str, bad: float) -> None:
    x, centroids = random_matrix(1, 2100, 8), random_matrix(2, 10, 8)
    x[1037, 2] = x[1041, 0] = x[2090, 1] = bad
    for each in (centroids, np.round(centroids)):  # also without any rounding
        with pytest.raises(ValueError, match="row 1037 holds"):
            assign_nearest(x, each, metric=metric, precision="bf16")
    x[1037, 2] = x[1041, 0] = x[2090, 1] = 0.0
    x[2077] = 3e38
    with pytest.raises(ValueError, match=r"row 2077 .*too large"):
        assign_nearest(x, centroids, metric=metric, precision="bf16")
    centroids[4, 1] = bad
    with pytest.raises(ValueError, match="centroid 4 holds"):
        assign_nearest(x, centroids, metric=metric, precision="bf16")
