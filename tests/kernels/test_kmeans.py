from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kmeans as kmeans_module
from kernels.assign import assign_nearest
from kernels.assign_two_level import assign_two_level
from kernels.kmeans import Checkpoint, group_centroids, kmeans, partial_sums, reduce_pairwise
from tests.kernels.array_paths import metrics, taken

# An iteration compares rows with every centroid ("exact"), or beyond MAX_EXACT centroids with near groups of them.
levels = pytest.mark.parametrize("max_exact", [1024, 20], ids=["one level", "two levels"])


def blobs(num_rows: int, num_blobs: int, num_dims: int, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((num_blobs, num_dims)) * 5
    return (centres[rng.integers(0, num_blobs, num_rows)] + rng.standard_normal((num_rows, num_dims))).astype(
        np.float32
    )


def started_at(x: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32]) -> Checkpoint:
    return Checkpoint(0, centroids, np.full(len(x), -1, np.int32))


def mean_distance(x: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32]) -> float:
    nearest = centroids[assign_nearest(x, centroids, metric="l2")]
    return float(np.square(x.astype(np.float64) - nearest).sum(axis=1).mean())


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_two_runs_give_the_same_bits(metric: str) -> None:
    x = blobs(70000, 50, 17)
    first, second = (kmeans(x, 60, metric=metric, seed=3, iterations=3) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != kmeans(x, 60, metric=metric, seed=4, iterations=3).tobytes()
    assert first.shape == (60, 17)
    assert first.dtype == np.float32


@levels
@metrics
def test_resuming_after_any_iteration_gives_the_bits_of_an_uninterrupted_run(
    metric: str, max_exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans_module, "MAX_EXACT", max_exact)
    x = blobs(6000, 30, 9)
    x[2000:3000] = x[0]  # duplicates empty clusters, so that the seeded split takes part
    saved: list[Checkpoint] = []
    final = kmeans(x, 100, metric=metric, seed=1, iterations=8, on_iteration=saved.append)
    assert [checkpoint.iteration for checkpoint in saved] == [*range(1, 9)]
    assert saved[-1].centroids_KD.tobytes() == final.tobytes()
    assert (saved[0].list_no_N[1::4] == -1).all()  # an early iteration uses every fourth row only
    assert (saved[0].list_no_N[::4] >= 0).all()
    assert (saved[-1].list_no_N >= 0).all()
    for checkpoint in saved:
        before = checkpoint.centroids_KD.tobytes(), checkpoint.list_no_N.tobytes()
        later: list[Checkpoint] = []
        resumed = kmeans(x, 100, metric=metric, seed=1, iterations=8, checkpoint=checkpoint, on_iteration=later.append)
        assert resumed.tobytes() == final.tobytes()
        assert [after.iteration for after in later] == [*range(checkpoint.iteration + 1, 9)]
        for after, first in zip(later, saved[checkpoint.iteration :], strict=True):
            np.testing.assert_array_equal(after.list_no_N, first.list_no_N)
        assert before == (checkpoint.centroids_KD.tobytes(), checkpoint.list_no_N.tobytes())


@levels
@metrics
def test_the_number_of_threads_does_not_change_a_bit(
    metric: str, max_exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans_module, "MAX_EXACT", max_exact)
    x = blobs(8000, 40, 33)
    threads = torch.get_num_threads()
    results = set()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.add(kmeans(x, 100, metric=metric, seed=0, iterations=6).tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 1


@levels
@metrics
def test_centroids_are_the_same_bits_without_numba(
    metric: str, max_exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans_module, "MAX_EXACT", max_exact)
    x = blobs(2500, 40, 21)
    x[500:700] = x[0]
    results = set()
    for path in ("compiled", "numpy"):
        with taken(path):
            results.add(kmeans(x, 60, metric=metric, seed=0, iterations=5).tobytes())
    assert len(results) == 1


# Measured: 0.93 and 0.89 of faiss's mean squared distance at 64 centroids, 0.69 and 0.65 at 150.
@levels
@pytest.mark.parametrize("num_centroids", [64, 150])
def test_quality_is_that_of_faiss_for_as_many_iterations(
    num_centroids: int, max_exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(kmeans_module, "MAX_EXACT", max_exact)
    x = blobs(8000, 100, 16)
    ours: list[float] = []
    theirs: list[float] = []
    for seed in range(3):
        ours.append(mean_distance(x, kmeans(x, num_centroids, metric="l2", seed=seed, iterations=10)))
        peer = faiss.Kmeans(16, num_centroids, niter=10, seed=seed)
        peer.train(x)
        theirs.append(mean_distance(x, peer.centroids))
    assert np.mean(ours) <= np.mean(theirs)


# Measured: 0.86 and 0.88 of faiss's mean cosine distance.
@metrics
def test_directions_are_as_near_as_those_of_faiss(metric: str) -> None:
    faiss = pytest.importorskip("faiss")
    x = blobs(8000, 100, 16)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    ours: list[float] = []
    theirs: list[float] = []
    for seed in range(3):
        peer = faiss.Kmeans(16, 80, niter=10, seed=seed, spherical=metric == "ip")
        peer.train(x)
        for found, centroids in (
            (ours, kmeans(x, 80, metric=metric, seed=seed, iterations=10)),
            (theirs, peer.centroids),
        ):
            found.append(1 - float((x * centroids[assign_nearest(x, centroids, metric=metric)]).sum(axis=1).mean()))
    assert np.mean(ours) <= np.mean(theirs)


def test_one_iteration_is_the_reference_step() -> None:
    x = blobs(5000, 8, 7)
    start = x[:10].copy()
    got = kmeans(x, 10, metric="l2", seed=0, iterations=1, checkpoint=started_at(x, start))
    list_no = np.square(x[:, None].astype(np.float64) - start[None]).sum(axis=2).argmin(axis=1)
    expected = np.stack([x[list_no == k].astype(np.float64).mean(axis=0) for k in range(10)])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_middle_iterations_go_past_the_means_and_the_last_one_does_not() -> None:
    x = blobs(5000, 8, 7)
    saved: list[Checkpoint] = []
    final = kmeans(x, 10, metric="l2", seed=0, iterations=3, on_iteration=saved.append)
    for number, factor in ((1, kmeans_module.OVERSHOOT), (2, 1.0)):
        before, after = saved[number - 1].centroids_KD.astype(np.float64), saved[number]
        means = np.stack([x[after.list_no_N == k].astype(np.float64).mean(axis=0) for k in range(10)])
        np.testing.assert_allclose(after.centroids_KD, before + factor * (means - before), rtol=1e-5, atol=1e-5)
    assert final.tobytes() == saved[-1].centroids_KD.tobytes()


def test_a_row_never_goes_to_a_farther_centroid_on_two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans_module, "MAX_EXACT", 20)
    x = blobs(4000, 60, 12)
    saved: list[Checkpoint] = []
    kmeans(x, 200, metric="l2", seed=0, iterations=3, on_iteration=saved.append)
    for before, after in itertools.pairwise(saved):
        kept, taken_now = (
            np.square(x - before.centroids_KD[lists].astype(np.float64)).sum(axis=1)
            for lists in (before.list_no_N, after.list_no_N)
        )
        assert (taken_now <= kept * (1 + 1e-12)).all()


def test_ip_centroids_have_unit_length() -> None:
    for num_centroids in (20, 3000):
        centroids = kmeans(blobs(2000, 10, 12), num_centroids, metric="ip", seed=0, iterations=4)
        np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@given(
    num_rows=st.integers(1, 60), num_centroids=st.integers(1, 60), num_dims=st.integers(1, 19), seed=st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_any_sizes_give_finite_centroids(
    metric: str, num_rows: int, num_centroids: int, num_dims: int, seed: int
) -> None:
    x = blobs(num_rows, 3, num_dims, seed)
    centroids = kmeans(x, num_centroids, metric=metric, seed=seed, iterations=2)
    assert centroids.shape == (num_centroids, num_dims)
    assert np.isfinite(centroids).all()
    if metric == "l2" and num_centroids >= num_rows:
        np.testing.assert_array_equal(centroids[:num_rows], x)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_sample_of_duplicates_gives_finite_centroids(metric: str, value: float) -> None:
    x = np.full((500, 6), value, np.float32)
    for num_centroids in (1, 16, 499, 500, 700):
        centroids = kmeans(x, num_centroids, metric=metric, seed=0, iterations=3)
        assert centroids.shape == (num_centroids, 6)
        assert np.isfinite(centroids).all()


def test_repeated_rows_differ_from_the_rows_they_repeat() -> None:
    x = blobs(3, 3, 8)
    centroids = kmeans(x, 8, metric="l2", seed=0)
    assert len(np.unique(centroids, axis=0)) == 8
    np.testing.assert_allclose(centroids, x[np.arange(8) % 3], atol=0.05)


def test_empty_clusters_are_filled_from_the_biggest() -> None:
    x = blobs(4000, 4, 5)
    start = np.concatenate([x[:4], np.full((12, 5), 1e4, np.float32)])
    centroids = kmeans(x, 16, metric="l2", seed=0, iterations=8, checkpoint=started_at(x, start))
    counts = np.bincount(assign_nearest(x, centroids, metric="l2"), minlength=16)
    assert counts.min() > 0


@metrics
@given(num_rows=st.integers(30, 120), num_centroids=st.integers(9, 60), num_dims=st.integers(1, 19))
@settings(max_examples=6, deadline=None)
def test_any_sizes_give_finite_centroids_on_two_levels(
    metric: str, num_rows: int, num_centroids: int, num_dims: int
) -> None:
    x = blobs(num_rows, 3, num_dims)
    x[: num_rows // 2] = x[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans_module, "MAX_EXACT", 8)
        centroids = kmeans(x, num_centroids, metric=metric, seed=0, iterations=3)
    assert centroids.shape == (num_centroids, num_dims)
    assert np.isfinite(centroids).all()


@levels
def test_beyond_max_exact_an_iteration_is_on_two_levels(max_exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []

    def spied(*arguments: object, **named: object) -> object:
        used.append(float(named["slack"]))  # type: ignore[arg-type]
        return assign_two_level(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(kmeans_module, "MAX_EXACT", max_exact)
    monkeypatch.setattr(kmeans_module, "assign_two_level", spied)
    kmeans(blobs(1000, 30, 8), 40, metric="l2", seed=0, iterations=3)
    assert len(used) == (3 if max_exact == 20 else 0)


@metrics
def test_groups_hold_every_centroid_once_each_with_its_nearest_group(metric: str) -> None:
    centroids = blobs(500, 30, 8)
    for num_groups, expected in ((0, 45), (7, 7), (500, 500), (900, 500)):
        groups = group_centroids(centroids, metric=metric, seed=3, num_groups=num_groups)
        assert groups.num_groups <= expected
        np.testing.assert_array_equal(np.sort(groups.members), np.arange(500))
        nearest = assign_nearest(centroids, groups.group_centroids_GD, metric=metric)
        for g in range(groups.num_groups):
            members = groups.members[groups.starts[g] : groups.starts[g + 1]]
            np.testing.assert_array_equal(members, np.flatnonzero(nearest == g))
            assert len(members) > 0


def test_partial_sums_add_up_to_the_reference_in_the_same_bits_whoever_computes_them() -> None:
    x = blobs(10000, 5, 11)
    list_no = assign_nearest(x, x[:7].copy(), metric="l2")
    chunks = [slice(start, start + 1500) for start in range(0, len(x), 1500)]
    partials = [partial_sums(x[chunk], list_no[chunk], 7) for chunk in chunks]
    sums, counts = reduce_pairwise(iter(partials))
    again = reduce_pairwise([partial_sums(x[chunk].copy(), list_no[chunk].copy(), 7) for chunk in chunks])
    assert sums.tobytes() == again[0].tobytes()
    np.testing.assert_array_equal(counts, np.bincount(list_no, minlength=7))
    np.testing.assert_allclose(sums, [x[list_no == k].astype(np.float64).sum(axis=0) for k in range(7)], rtol=1e-10)


def test_partial_sums_add_rows_in_order_for_any_number_of_threads() -> None:
    x = np.random.default_rng(0).standard_normal((20000, 385), dtype=np.float32)
    list_no = np.random.default_rng(1).integers(0, 5, len(x)).astype(np.int32)
    expected = np.stack([np.bincount(list_no, column, 5) for column in x.T.astype(np.float64)], axis=1)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            assert partial_sums(x, list_no, 5)[0].tobytes() == expected.tobytes()
    finally:
        torch.set_num_threads(threads)


def test_float16_and_float32_samples_of_the_same_values_give_the_same_bits() -> None:
    x = blobs(2000, 5, 6).astype(np.float16)
    assert (
        kmeans(x, 12, metric="l2", seed=0).tobytes() == kmeans(x.astype(np.float32), 12, metric="l2", seed=0).tobytes()
    )


def test_wrong_arguments_are_named() -> None:
    x = blobs(50, 3, 4)
    with pytest.raises(ValueError, match="at least one row, got 0"):
        kmeans(x[:0], 4, metric="l2", seed=0)
    with pytest.raises(ValueError, match="num_centroids must be at least 1, got 0"):
        kmeans(x, 0, metric="l2", seed=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        kmeans(x, 4, metric="l2", seed=-1)
    lists = np.zeros(50, np.int32)
    for checkpoint, message in (
        (Checkpoint(13, x[:4], lists), r"iteration must be in 0\.\.12, got 13"),
        (Checkpoint(1, x[:3], lists), r"centroids must be float32 \(4, 4\), got float32 \(3, 4\)"),
        (Checkpoint(1, x[:4], lists[:9]), r"lists must be int32 \(50,\), got int32 \(9,\)"),
        (Checkpoint(1, x[:4], lists.astype(np.int64)), r"lists must be int32 \(50,\), got int64"),
    ):
        with pytest.raises(ValueError, match=message):
            kmeans(x, 4, metric="l2", seed=0, iterations=12, checkpoint=checkpoint)
    x[20, 1] = np.nan
    for num_centroids in (4, 50):
        with pytest.raises(ValueError, match="row 20 holds"):
            kmeans(x, num_centroids, metric="l2", seed=0)
