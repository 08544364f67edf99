from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kmeans, reference, topk
from kernels.cuda import kmeans as cuda_kmeans
from kernels.cuda.assign import assign_nearest
from kernels.cuda.assign_fused import COMPUTE_CAPABILITY

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu

FLOATS = ("float32", "float16")
MODES = [("bf16", None), ("bf16", "tiled"), ("bf16", "fused"), ("tf32", None)]


def rows(num_rows: int, num_dims: int, seed: int, dtype: str = "float32") -> npt.NDArray[Any]:
    return np.random.default_rng(seed).standard_normal((num_rows, num_dims), dtype=np.float32).astype(dtype)


def skip_if_absent(path: str | None) -> None:
    if path == "fused" and cupy.cuda.Device().compute_capability != COMPUTE_CAPABILITY:
        pytest.skip("the fused kernel is for compute capability 9.0")


@pytest.mark.parametrize("metric", ["ip", "l2"])
@given(
    num_rows=st.integers(0, 70),
    num_centroids=st.sampled_from([1, 2, 7, 8, 9, 255, 257, 1500]),
    num_dims=st.sampled_from([1, 3, 8, 17, 64, 130]),
    dtype=st.sampled_from(FLOATS),
)
@settings(max_examples=40, deadline=None)
def test_float32_gives_the_references_lists(
    metric: str, num_rows: int, num_centroids: int, num_dims: int, dtype: str
) -> None:
    x, centroids = rows(num_rows, num_dims, 1, dtype), rows(num_centroids, num_dims, 2)
    centroids[num_centroids // 2] = centroids[0]  # a tie
    found = assign_nearest(cupy.asarray(x), cupy.asarray(centroids), metric=metric)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found.get(), reference.assign_nearest(x, centroids, metric=metric))


@pytest.mark.parametrize(("precision", "path"), MODES)
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_whole_numbers_are_exact_in_every_mode(metric: str, precision: str, path: str | None) -> None:
    skip_if_absent(path)
    rng = np.random.default_rng(3)
    for num_rows, num_centroids, num_dims in ((1, 1, 1), (130, 300, 70), (257, 1025, 192), (300, 255, 64)):
        x, centroids = (rng.integers(-4, 5, (n, num_dims)).astype(np.float32) for n in (num_rows, num_centroids))
        found = assign_nearest(
            cupy.asarray(x), cupy.asarray(centroids), metric=metric, precision=precision, path=path
        ).get()
        scores = reference.scores(x, centroids, metric)
        # Equal scores in other classes than the lowest one's are candidates too, and the lowest of them is taken.
        np.testing.assert_array_equal(found, scores.argmax(axis=1))


@pytest.mark.parametrize(("precision", "path"), MODES)
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_rounded_products_seldom_miss_the_nearest(metric: str, precision: str, path: str | None) -> None:
    skip_if_absent(path)
    x, centroids = rows(1000, 96, 4), rows(700, 96, 5)
    found = assign_nearest(cupy.asarray(x), cupy.asarray(centroids), metric=metric, precision=precision, path=path)
    expected = reference.assign_nearest(x, centroids, metric=metric)
    # Emulated: all of them. Missed is only who has a better rounded score in the same one of eight classes.
    assert (found.get() == expected).mean() >= 0.99


def test_wrong_rows_and_arguments_are_named() -> None:
    x, centroids = rows(40, 16, 6), rows(20, 16, 7)
    on_device = cupy.asarray(centroids)
    modes: list[tuple[str, str | None]] = [("float32", None), ("tf32", None), ("bf16", "tiled")]
    if cupy.cuda.Device().compute_capability == COMPUTE_CAPABILITY:
        modes.append(("bf16", "fused"))
    for precision, path in modes:
        for value in (np.nan, np.inf):
            wrong = x.copy()
            wrong[17, 15] = wrong[30, 2] = value
            with pytest.raises(ValueError, match="row 17 holds a NaN or an infinity"):
                assign_nearest(cupy.asarray(wrong), on_device, metric="l2", precision=precision, path=path)
        wrong = x.copy()
        wrong[5] = 3e38
        with pytest.raises(ValueError, match="those of row 5 are not"):
            assign_nearest(cupy.asarray(wrong), on_device * 100, metric="ip", precision=precision, path=path)
    with pytest.raises(ValueError, match="x_ND must be on the device"):
        assign_nearest(x, on_device, metric="l2")
    with pytest.raises(ValueError, match="got 'cosine'"):
        assign_nearest(cupy.asarray(x), on_device, metric="cosine")
    with pytest.raises(ValueError, match="got 'int8'"):
        assign_nearest(cupy.asarray(x), on_device, metric="l2", precision="int8")
    with pytest.raises(ValueError, match="path must be"):
        assign_nearest(cupy.asarray(x), on_device, metric="l2", path="fused")
    with pytest.raises(ValueError, match=r"D of centroids_KD \(16\), got 15"):
        assign_nearest(cupy.asarray(x[:, :15]), on_device, metric="l2")
    with pytest.raises(ValueError, match="at least one row"):
        assign_nearest(cupy.asarray(x), on_device[:0], metric="l2")
    on_device[3, 3] = np.nan
    with pytest.raises(ValueError, match="centroid 3 holds"):
        assign_nearest(cupy.asarray(x), on_device, metric="l2")


@given(
    num_rows=st.integers(0, 300),
    num_clusters=st.integers(1, 40),
    num_dims=st.sampled_from([1, 5, 128, 130]),
    dtype=st.sampled_from(FLOATS),
)
@settings(max_examples=30, deadline=None)
def test_cluster_sums_have_the_hosts_bits(num_rows: int, num_clusters: int, num_dims: int, dtype: str) -> None:
    x = rows(num_rows, num_dims, 8, dtype)
    list_no = np.random.default_rng(9).integers(0, num_clusters, num_rows).astype(np.int32)
    sums, counts = cuda_kmeans.partial_sums(cupy.asarray(x), cupy.asarray(list_no), num_clusters)
    expected_sums, expected_counts = kmeans.partial_sums(x, list_no, num_clusters)
    assert sums.get().tobytes() == expected_sums.tobytes()
    np.testing.assert_array_equal(counts.get(), expected_counts)


def test_a_list_number_out_of_range_is_named() -> None:
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=rf"must be in 0..2, got .*{wrong}"):
            cuda_kmeans.partial_sums(cupy.zeros((2, 4), cupy.float32), cupy.asarray(np.array([1, wrong], np.int32)), 3)


@given(num_queries=st.integers(0, 5), num_scores=st.integers(0, 60), k=st.integers(1, 70))
@settings(max_examples=30, deadline=None)
def test_topk_is_the_hosts(num_queries: int, num_scores: int, k: int) -> None:
    scores = np.random.default_rng(k).integers(-3, 4, (num_queries, num_scores)).astype(np.float32)
    scores[scores == 3] = -np.inf
    scores[scores == 0] *= -1
    found: tuple[Any, ...] = topk.topk(cupy.asarray(scores), k)
    assert all(isinstance(array, cupy.ndarray) for array in found)
    for ours, expected in zip(found, topk.topk(scores, k), strict=True):
        np.testing.assert_array_equal(ours.get(), expected)
