"""Lists found on two levels are those of the definition at the top of kernels/assign_two_level.py, and only those."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import assign_two_level as module
from kernels import reference
from kernels.assign import assign_nearest
from kernels.assign_two_level import CentroidGroups, assign_two_level, form_groups, measure_slack
from kernels.kmeans import group_centroids
from tests.kernels.array_paths import dims, few, matrices, metrics, on_the_host, taken

Float32Array = npt.NDArray[np.float32]


def directions(num_rows: int, num_dims: int, seed: int = 0) -> Float32Array:
    """Rows of unit length around 40 centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, num_dims))
    x = centres[rng.integers(0, 40, num_rows)] + 0.8 * rng.standard_normal((num_rows, num_dims))
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def expected(x_ND: npt.NDArray[Any], groups: CentroidGroups, slack: float) -> npt.NDArray[np.int32]:
    group_K = np.empty(len(groups.members), np.int64)
    group_K[groups.members] = np.repeat(np.arange(groups.num_groups), np.diff(groups.starts))
    return reference.assign_two_level(
        x_ND, group_K, groups.centroids_KD, groups.group_centroids_GD, groups.metric, slack
    )


@on_the_host
@metrics
@given(
    data=st.data(),
    num_rows=st.integers(0, 50),
    num_centroids=st.integers(1, 60),
    num_groups=st.integers(1, 12),
    num_dims=dims,
    slack=st.sampled_from([0.0, 0.01, 1.0, 30.0, float("inf")]),
)
@few
def test_lists_are_those_of_the_definition(
    path: str,
    metric: str,
    data: st.DataObject,
    num_rows: int,
    num_centroids: int,
    num_groups: int,
    num_dims: int,
    slack: float,
) -> None:
    # Ordinary numbers and large ones: none whose distance from the slack's edge float64 could not tell.
    x = data.draw(matrices(num_rows, num_dims, kinds="normal big"))
    centroids = data.draw(matrices(num_centroids, num_dims, kinds="normal repeated")).astype(np.float32)
    groups_GD = data.draw(matrices(num_groups, num_dims, kinds="normal")).astype(np.float32)
    groups = form_groups(centroids, groups_GD, metric=metric)
    with taken(path):
        got = assign_two_level(x, groups, slack=slack)
    np.testing.assert_array_equal(got, expected(x, groups, slack), strict=True)


@metrics
@pytest.mark.parametrize("slack", [0.02, 0.1, 0.4])
def test_lists_of_many_rows_are_those_of_the_definition(metric: str, slack: float) -> None:
    x, centroids = directions(5000, 48), directions(900, 48, seed=1)
    groups = group_centroids(centroids, metric=metric, seed=0)
    got = assign_two_level(x, groups, slack=slack)
    np.testing.assert_array_equal(got[::7], expected(x[::7], groups, slack))
    with taken("numpy"):
        np.testing.assert_array_equal(assign_two_level(x[:600], groups, slack=slack), got[:600])


@on_the_host
@metrics
def test_a_group_at_the_edge_of_the_slack_is_decided_in_float64(path: str, metric: str) -> None:
    # Two groups, whose scores differ by a power of two that is the slack, or less by what float32 does not see.
    groups_GD = np.array([[2.0, 0.0], [0.0, 2.0]], np.float32)
    centroids = np.array([[2.0, 0.0], [0.5, 1.9375]], np.float32)
    groups = form_groups(centroids, groups_GD, metric=metric)
    x = np.array([[1.0, 0.875]], np.float32)
    gap = 0.25 if metric == "ip" else 0.5
    for slack, list_no in ((gap, 1), (gap * (1 - 2.0**-40), 0), (gap * (1 + 2.0**-40), 1)):
        x_ND = np.repeat(x, 3, axis=0)
        with taken(path):
            got = assign_two_level(x_ND, groups, slack=slack)
        best = expected(x_ND, groups, slack)
        np.testing.assert_array_equal(got, best)
        assert metric == "l2" or best[0] == list_no


@metrics
def test_lists_do_not_depend_on_the_cut_of_the_rows_or_threads(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, centroids = directions(9000, 33), directions(700, 33, seed=1)
    groups = group_centroids(centroids, metric=metric, seed=0)
    whole = assign_two_level(x, groups, slack=0.05)
    for cut in (1, 7, 777, 4097):
        pieces = [assign_two_level(x[i : i + cut], groups, slack=0.05) for i in range(0, min(len(x), 3 * cut), cut)]
        joined = np.concatenate(pieces)
        np.testing.assert_array_equal(joined, whole[: len(joined)])
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            np.testing.assert_array_equal(assign_two_level(x, groups, slack=0.05), whole)
    finally:
        torch.set_num_threads(threads)
    for name, value in (("BLOCK_BYTES", 1), ("MIN_BLOCK_ROWS", 500), ("BLOCKS_PER_THREAD", 50)):
        monkeypatch.setattr(module, name, value)
        np.testing.assert_array_equal(assign_two_level(x[:3000], groups, slack=0.05), whole[:3000])


@metrics
def test_lists_do_not_depend_on_whether_the_processorhas_bfloat16(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, centroids = directions(4000, 64), directions(500, 64, seed=1)
    groups = group_centroids(centroids, metric=metric, seed=0)
    found = []
    for has in (False, True):
        monkeypatch.setattr(module, "has_bfloat16", lambda has=has: has)
        found.append(assign_two_level(x, groups, slack=0.05))
    np.testing.assert_array_equal(found[0], found[1])


@metrics
@pytest.mark.parametrize("slack", [1e3, float("inf")])
def test_a_slack_that_reaches_every_group_gives_the_exact_lists(metric: str, slack: float) -> None:
    x, centroids = directions(4000, 32), directions(300, 32, seed=1)
    groups = group_centroids(centroids, metric=metric, seed=0)
    np.testing.assert_array_equal(assign_two_level(x, groups, slack=slack), assign_nearest(x, centroids, metric=metric))


@metrics
def test_one_group_gives_the_exact_lists(metric: str) -> None:
    x, centroids = directions(1000, 32), directions(100, 32, seed=1)
    groups = group_centroids(centroids, metric=metric, seed=0, num_groups=1)
    assert groups.num_groups == 1
    np.testing.assert_array_equal(assign_two_level(x, groups, slack=0.0), assign_nearest(x, centroids, metric=metric))


@metrics
def test_groups_of_one_centroid_give_the_exact_lists(metric: str) -> None:
    x, centroids = directions(1000, 32), directions(100, 32, seed=1)
    groups = group_centroids(centroids, metric=metric, seed=0, num_groups=100)
    assert groups.num_groups == 100
    np.testing.assert_array_equal(assign_two_level(x, groups, slack=0.0), assign_nearest(x, centroids, metric=metric))


@on_the_host
@metrics
def test_ties_go_to_the_lowest_id_in_whatever_group_it_is(path: str, metric: str) -> None:
    centroids = np.tile(directions(10, 24), (6, 1))
    groups = form_groups(centroids, directions(4, 24, seed=1), metric=metric)
    with taken(path):
        assert assign_two_level(directions(300, 24, seed=2), groups, slack=10.0).max() < 10


def test_groups_that_stay_empty_are_left_out() -> None:
    centroids = directions(50, 8)
    groups = form_groups(centroids, np.concatenate([centroids[:3], centroids[:3], 9 + centroids[:2]]), metric="l2")
    assert groups.num_groups == 3
    assert groups.starts.tolist() == [0, *np.cumsum(np.diff(groups.starts))]
    np.testing.assert_array_equal(np.sort(groups.members), np.arange(50))


@metrics
@pytest.mark.parametrize("target", [0.5, 0.9, 0.97, 1.0])
def test_the_measured_share_holds_on_the_sample_and_about_so_elsewhere(metric: str, target: float) -> None:
    rng = np.random.default_rng(0)  # without clusters, so that few rows are content with their best group
    x, centroids = (rng.standard_normal((rows, 16), dtype=np.float32) for rows in (6000, 800))
    groups = group_centroids(centroids, metric=metric, seed=0)
    sample, held_out = x[:3000], x[3000:]
    slack, share = measure_slack(sample, groups, target=target)
    assert target <= share <= target + 0.002
    shares = [
        float((assign_two_level(rows, groups, slack=slack) == assign_nearest(rows, centroids, metric=metric)).mean())
        for rows in (sample, held_out)
    ]
    # A row may also find its nearest in a group that it does not need, by a tie; here there are none.
    assert shares[0] == pytest.approx(share, abs=1e-9)
    # Four standard deviations of a share of 3,000 rows, twice: the sample's own, and that of the rows held out.
    assert shares[1] >= target - 4 * (2 * target * (1 - target) / 3000) ** 0.5 - 0.002
    # It is the least: a little less leads fewer to their nearest.
    less = assign_two_level(sample, groups, slack=slack * (1 - 1e-6))
    assert (less == assign_nearest(sample, centroids, metric=metric)).mean() < share


@on_the_host
@metrics
def test_a_row_keeps_its_list_where_that_is_strictly_nearer(path: str, metric: str) -> None:
    x, centroids = directions(600, 24), directions(200, 24, seed=1)
    centroids[150:] = centroids[:50]  # as near, so not strictly nearer
    groups = group_centroids(centroids, metric=metric, seed=0, num_groups=20)
    current = np.random.default_rng(0).integers(-1, 200, len(x)).astype(np.int32)
    current[::3] = assign_nearest(x[::3], centroids, metric=metric)
    current[1::9] = assign_nearest(x[1::9], centroids, metric=metric) % 150 + 150 * (
        assign_nearest(x[1::9], centroids, metric=metric) < 50
    )
    given = current.copy()
    with taken(path):
        found = assign_two_level(x, groups, slack=0.0)
        got = assign_two_level(x, groups, slack=0.0, current_N=current)
    scores = reference.scores(x, centroids, metric)
    rows = np.arange(len(x))
    kept = (current >= 0) & (scores[rows, current] > scores[rows, found])
    assert 0 < kept.sum() < len(x)
    np.testing.assert_array_equal(got, np.where(kept, current, found))
    np.testing.assert_array_equal(current, given)


@on_the_host
@metrics
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("slack", [0.1, float("inf")])
def test_the_first_row_that_is_not_finite_is_named(path: str, metric: str, bad: float, slack: float) -> None:
    x = directions(9000, 8)
    groups = group_centroids(directions(60, 8, seed=1), metric=metric, seed=0)
    x[8500, 2] = x[8700, 0] = bad
    with taken(path), pytest.raises(ValueError, match="row 8500 holds"):
        assign_two_level(x if path == "compiled" else x[:8501], groups, slack=slack)


def test_scores_beyond_float32_are_refused() -> None:
    x, groups = directions(50, 8), group_centroids(directions(60, 8), metric="ip", seed=0)
    x[7] = 3e38
    for slack in (0.1, float("inf")):
        with pytest.raises(ValueError, match=r"row 7 .*too large"):
            assign_two_level(x, groups, slack=slack)


def test_wrong_arguments_are_named() -> None:
    x = directions(50, 8)
    groups = group_centroids(x[:20], metric="ip", seed=0)
    for slack in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="slack must be at least 0, got"):
            assign_two_level(x, groups, slack=slack)
    with pytest.raises(ValueError, match=r"D of the centroids \(8\), got 7"):
        assign_two_level(x[:, :7], groups, slack=0.1)
    with pytest.raises(ValueError, match="float64"):
        assign_two_level(x.astype(np.float64), groups, slack=0.1)
    with pytest.raises(ValueError, match="at least one row, got 0"):
        measure_slack(x[:0], groups, target=0.9)
    for target in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"target must be in \(0, 1\], got"):
            measure_slack(x, groups, target=target)
