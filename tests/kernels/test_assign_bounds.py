"""Bounds that lists rest on hold where bfloat16 rounds worst: kernels/assign.py, assign_bf16.py, assign_two_level.py.

Shapes: C cases of one row and four centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kernels import assign_two_level as two_level_module
from kernels import reference
from kernels.assign import assign_nearest, row_norms
from kernels.assign_bf16 import _Centroids
from kernels.assign_two_level import PRODUCT_ROUNDING, assign_two_level, form_groups
from tests.kernels.array_paths import metrics

Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]


def two_level(x_ND: Float32Array, centroids_KD: Float32Array, metric: str) -> Array:
    """Two levels, with one group about zero: the deviations from it are the centroids."""
    groups = form_groups(centroids_KD, np.zeros((1, x_ND.shape[1]), np.float32), metric=metric)
    return assign_two_level(x_ND, groups, slack=0.0)


WAYS: list[Callable[[Float32Array, Float32Array, str], Array]] = [
    lambda x_ND, centroids_KD, metric: assign_nearest(x_ND, centroids_KD, metric=metric, precision="float32"),
    lambda x_ND, centroids_KD, metric: assign_nearest(x_ND, centroids_KD, metric=metric, precision="bf16"),
    two_level,
]
ways = pytest.mark.parametrize("assigned", WAYS, ids=["float32", "bf16", "two_level"])


def rounded(values: Array) -> Array:
    """The nearest bfloat16 numbers, as float64."""
    return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16).double().numpy()


@cache
def hardest_cases(metric: str, repeat: int, scale: float, num_cases: int) -> list[tuple[Float32Array, Float32Array]]:
    """(row [1, D], centroids [4, D] about zero) whose two best scores nearly tie and round apart the most.

    A case has two values for "ip" and one for "l2", repeated, so all dimensions round alike; and they are a little
    above a power of two, where roundings are the largest.
    """
    rng = np.random.default_rng(0)
    num_values = 2 if metric == "ip" else 1
    first_CD, second_CD = rng.uniform(1.0, 1.1, (2, 300_000, num_values)).astype(np.float32).astype(np.float64)
    if metric == "l2":
        x_CD = 0.5 * (first_CD + second_CD)
    else:
        x_CD = rng.uniform(1.0, 1.1, first_CD.shape)
        gap_C = ((second_CD - first_CD) * x_CD).sum(axis=1) / np.square(x_CD).sum(axis=1)
        second_CD -= gap_C[:, None] * x_CD
    # A row a little nearer to the first of the two.
    if metric == "l2":
        x_CD += 1e-6 * np.sign(first_CD - second_CD)
    else:
        first_CD += 1e-6 * x_CD
    factor = 2.0 if metric == "l2" else 1.0
    errors = [
        rounded((rounded(x_CD) * rounded(factor * c_CD)).sum(axis=1)) - factor * (x_CD * c_CD).sum(axis=1)
        for c_CD in (first_CD, second_CD)
    ]
    cases = []
    for case in np.argsort(errors[0] - errors[1])[:num_cases]:
        pair = np.tile(np.stack([second_CD[case], first_CD[case]]), repeat)
        centroids_KD = (scale * np.concatenate([pair, -pair])).astype(np.float32)
        cases.append(((scale * np.tile(x_CD[case], repeat))[None].astype(np.float32), centroids_KD))
    return cases


@ways
@metrics
@pytest.mark.parametrize("repeat", [1, 16])
@pytest.mark.parametrize("scale", [2.0**-83, 1.0, 2.0**50])
def test_near_ties_that_bfloat16_rounds_apart_are_decided_as_in_float64(
    assigned: Callable[..., Array], metric: str, repeat: int, scale: float
) -> None:
    for x_ND, centroids_KD in hardest_cases(metric, repeat, scale, num_cases=100):
        expected = reference.assign_nearest(x_ND, centroids_KD, metric=metric)
        np.testing.assert_array_equal(assigned(x_ND, centroids_KD, metric), expected)
        assert expected[0] == 1


@ways
def test_exact_ties_whose_products_round_apart_go_to_the_lowest_id(assigned: Callable[..., Array]) -> None:
    # One dimension, all numbers of 8 bits: nothing rounds but the products, by as much as half a unit each.
    steps = np.arange(128, 256, dtype=np.float64) / 128
    one, other = (each.ravel() for each in np.meshgrid(steps, steps))
    middle = 0.5 * (one + other)
    apart = rounded(2 * one * middle) - 2 * one * middle - rounded(2 * other * middle) + 2 * other * middle
    exact = rounded(middle) == middle
    for case in np.argsort(np.where(exact, apart, np.inf))[:200]:
        c_KD = np.array([one[case], other[case], -one[case], -other[case]], np.float32)[:, None]
        x_ND = np.array([[middle[case]]], np.float32)
        assert assigned(x_ND, c_KD, "l2").tolist() == [0]


@ways
@metrics
@pytest.mark.parametrize(
    ("x_scale", "c_scale"), [(1e-25, 1.0), (1.0, 1e-25), (1e-25, 1e-10), (1e15, 1e15), (1e15, 1e-20)]
)
def test_small_and_large_rows_go_where_float64_says(
    assigned: Callable[..., Array], metric: str, x_scale: float, c_scale: float
) -> None:
    rng = np.random.default_rng(0)
    x_ND = (x_scale * rng.standard_normal((200, 24))).astype(np.float32)
    centroids_KD = (c_scale * rng.standard_normal((50, 24))).astype(np.float32)
    got = assigned(x_ND, centroids_KD, metric)
    if metric == "ip":
        np.testing.assert_array_equal(got, reference.assign_nearest(x_ND, centroids_KD, metric=metric))
    else:  # float64 itself cannot always tell such scales apart
        scores = reference.scores(x_ND, centroids_KD, metric)
        picked = scores[np.arange(len(x_ND)), got]
        tolerance = 1e-13 * np.abs(scores).max(axis=1)
        assert (picked >= scores.max(axis=1) - tolerance).all()


@ways
def test_numbers_that_bfloat16_products_take_for_zero_still_decide(assigned: Callable[..., Array]) -> None:
    # Values below the smallest normal number, 2^-126, times large ones: products of ordinary size.
    x_ND = np.array([[2.0**-127, 2.0**-60], [2.0**-60, 2.0**-130]], np.float32)
    centroids_KD = np.array([[2.0**60, 1.0], [1.0, 2.0**60], [-(2.0**60), -1.0], [-1.0, -(2.0**60)]], np.float32)
    centroids_KD[:, 1] *= np.float32(2.0**-10)
    np.testing.assert_array_equal(
        assigned(x_ND, centroids_KD, "ip"), reference.assign_nearest(x_ND, centroids_KD, metric="ip")
    )


def hard_matrices(metric: str) -> list[tuple[Float32Array, Float32Array]]:
    """Rows and centroids: the hardest cases, and random ones whose values all round up by nearly half a unit."""
    found = [case for scale in (2.0**-83, 1.0, 2.0**50) for case in hardest_cases(metric, 1, scale, num_cases=30)]
    rng = np.random.default_rng(1)
    for num_rows, num_centroids, num_dims in ((1, 2, 1), (7, 5, 3), (65, 40, 129), (64, 64, 384)):
        for signs in (1.0, rng.choice([-1.0, 1.0], num_dims)):
            x_ND, c_KD = (
                signs * (1 + 2.0**-8 + 2.0**-12 * rng.random((rows, num_dims))) for rows in (num_rows, num_centroids)
            )
            c_KD[::2] *= -1.5
            found.append((x_ND.astype(np.float32), c_KD.astype(np.float32)))
            found.append(((1e-25 * x_ND).astype(np.float32), c_KD.astype(np.float32)))
    return found


@metrics
def test_bfloat16_scores_are_within_their_bounds_of_the_exact_ones_and_these_are_not_far(metric: str) -> None:
    shares = []
    for x_ND, centroids_KD in hard_matrices(metric):
        centroids = _Centroids(centroids_KD, metric)
        typed, error_B = centroids.bounds(torch.from_numpy(x_ND))
        products_KB = torch.mm(centroids.typed_KD, typed.t()).double().numpy()
        wide_ND, centred_KD = x_ND.astype(np.float64), centroids_KD.astype(np.float64) - centroids.mean_D
        exact_KB = centred_KD @ wide_ND.T
        if metric == "l2":
            exact_KB = 2 * centred_KD @ (wide_ND - centroids.mean_D).T - np.square(centred_KD).sum(axis=1)[:, None]
        wrong_KB = np.abs(products_KB + centroids.bias_K.astype(np.float64)[:, None] - exact_KB)
        bound_KB = error_B.astype(np.float64) + PRODUCT_ROUNDING * np.abs(products_KB)
        assert (wrong_KB <= bound_KB).all()
        shares.append(float((wrong_KB / bound_KB).max()))
    assert max(shares) > 0.6


@metrics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_of_two_levels_are_within_their_bounds_of_the_exact_ones(metric: str, dtype: torch.dtype) -> None:
    shares = []
    for x_ND, centroids_KD in hard_matrices(metric):
        for groups_GD in (np.zeros_like(centroids_KD[:1]), centroids_KD[:2]):
            groups = form_groups(centroids_KD, groups_GD, metric=metric)
            block, deviations = torch.from_numpy(x_ND), groups.deviations(dtype)
            typed = block.to(dtype)
            error_B, rounding_B, norm_B = (
                each.astype(np.float64)
                for each in two_level_module._score_errors(block, typed, row_norms(x_ND), groups)
            )
            scaled_GD, _ = groups.scaled_groups
            offsets_GB = torch.mm(scaled_GD, block.t()).double().numpy()
            for g, place in enumerate(groups.padded_starts[:-1]):
                of_group = slice(groups.starts[g], groups.starts[g + 1])
                members = groups.members[of_group]
                typed_KD = deviations.typed_KD[place : place + len(members)]
                products_KB = torch.mm(typed_KD, typed.t()).double().numpy()
                exact_KB = centroids_KD[members].astype(np.float64) @ x_ND.T.astype(np.float64)
                if metric == "l2":
                    exact_KB = 2 * exact_KB - np.square(centroids_KD[members].astype(np.float64)).sum(axis=1)[:, None]
                bias_K = groups.member_bias[of_group].astype(np.float64)
                wrong_KB = np.abs(products_KB + offsets_GB[g] + bias_K[:, None] - exact_KB)
                bound_B = (
                    error_B + rounding_B * deviations.largest_norm_G[g] + norm_B * deviations.largest_rounding_G[g]
                )
                rounding = PRODUCT_ROUNDING if dtype == torch.bfloat16 else 0.0
                bound_KB = bound_B + rounding * np.abs(products_KB)
                assert (wrong_KB <= bound_KB).all()
                shares.append(float((wrong_KB / bound_KB).max()))
    assert dtype == torch.float32 or max(shares) > 0.6
