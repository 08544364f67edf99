"""The inner loops of assignment that array operations are slow at, compiled by numba. Imported only where numba is.

Shapes: B rows of a block, K columns of a tile of scores, G groups of centroids, D dimensions.
Each function lets go of the interpreter and runs on the thread that calls it. Arrays are C-contiguous and on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = Any  # numba compiles for the dtypes at the call; the docstrings name them


@njit(nogil=True, cache=True, error_model="numpy")
def update_best_two(
    scores_KB: Array, bias_K: Array, first: int, best_B: Array, second_B: Array, column_B: Array
) -> None:
    """Merges a tile of scores (float32 [K, B], plus bias_K) into each row's best, second best and best's column.

    best_B, second_B float32 [B] and column_B int32 [B] are updated in place; `first` is the column of the tile's first.
    A NaN is no score. Rows lie in the lanes, so there is nothing to add up across a register.
    """
    num_columns, num_rows = scores_KB.shape
    for k in range(0, num_columns - 1, 2):
        for r in range(num_rows):
            one = scores_KB[k, r] + bias_K[k]
            two = scores_KB[k + 1, r] + bias_K[k + 1]
            best, second, column = best_B[r], second_B[r], column_B[r]
            lower = one if one < best else best
            second = lower if lower > second else second
            column = np.int32(first + k) if one > best else column
            best = one if one > best else best
            lower = two if two < best else best
            second = lower if lower > second else second
            column = np.int32(first + k + 1) if two > best else column
            best_B[r] = two if two > best else best
            second_B[r] = second
            column_B[r] = column
    if num_columns % 2:
        k = num_columns - 1
        for r in range(num_rows):
            one = scores_KB[k, r] + bias_K[k]
            best, second = best_B[r], second_B[r]
            lower = one if one < best else best
            second_B[r] = lower if lower > second else second
            column_B[r] = np.int32(first + k) if one > best else column_B[r]
            best_B[r] = one if one > best else best


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _score_in_float64(x_D: Array, c_D: Array, squared: bool) -> float:
    """Score of a pair: any order of summation is within the bound that the callers decide by."""
    product, norm = 0.0, 0.0
    for j in range(len(x_D)):
        product += np.float64(x_D[j]) * np.float64(c_D[j])
    if squared:
        for j in range(len(x_D)):
            norm += np.float64(c_D[j]) * np.float64(c_D[j])
        return 2.0 * product - norm
    return product


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
def row_norms(x_BD: Array, norms_B: Array) -> None:
    """Norms of the rows (float32) in norms_B (float64)."""
    for r in range(len(x_BD)):
        squares = 0.0
        for j in range(x_BD.shape[1]):
            squares += np.float64(x_BD[r, j]) * np.float64(x_BD[r, j])
        norms_B[r] = np.sqrt(squares)


@njit(nogil=True, cache=True, error_model="numpy")
def count_near_groups(scores_GB: Array, bias_G: Array, slack: float, best_B: Array) -> int:
    """Each row's best group score (float32 best_B), and how many (row, group) scores are within slack of it.

    By the float32 scores as they are: a little more or less than the pairs that rows_of_groups finds.
    """
    num_groups, num_rows = scores_GB.shape
    best_B[:] = -np.inf
    for g in range(num_groups):
        for r in range(num_rows):
            score = scores_GB[g, r] + bias_G[g]
            best_B[r] = score if score > best_B[r] else best_B[r]
    margin = np.float32(slack * 1.01 + 1e-30)
    pairs: Any = 0
    for g in range(num_groups):
        found = np.int32(0)
        for r in range(num_rows):
            score = scores_GB[g, r] + bias_G[g]
            found += np.int32(score >= best_B[r] - margin)
        pairs += found
    return pairs


@njit(nogil=True, cache=True, error_model="numpy")
def rows_of_groups(
    scores_GB: Array,
    bias_G: Array,
    slack: float,
    best_B: Array,
    error_B: Array,
    x_BD: Array,
    group_centroids_GD: Array,
    squared: bool,
    starts_G: Array,
    rows: Array,
) -> bool:
    """Rows of each group that is within `slack` of the row's best, ascending: rows[starts_G[g] : starts_G[g + 1]].

    rows int64 and starts_G int64 [G + 1] are overwritten; False when `rows` is too short. A pair whose float32 scores
    (bounds of their error in error_B, float64) cannot tell is decided by float64 scores.
    """
    num_groups, num_rows = scores_GB.shape
    exact_best_B = np.full(num_rows, -np.inf)
    place: Any = 0
    for g in range(num_groups):
        starts_G[g] = place
        if place + num_rows > len(rows):
            return False
        for r in range(num_rows):
            score = np.float64(scores_GB[g, r] + bias_G[g])
            excess = score - (np.float64(best_B[r]) - slack)
            near: Any = excess >= 0.0
            if abs(excess) <= 4.0 * error_B[r]:
                if exact_best_B[r] == -np.inf:
                    for other in range(num_groups):
                        if scores_GB[other, r] + bias_G[other] >= best_B[r] - 4.0 * error_B[r]:
                            exact = _score_in_float64(x_BD[r], group_centroids_GD[other], squared)
                            exact_best_B[r] = max(exact_best_B[r], exact)
                near = _score_in_float64(x_BD[r], group_centroids_GD[g], squared) >= exact_best_B[r] - slack
            rows[place] = r
            place += near
    starts_G[num_groups] = place
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def decide_candidates(
    candidates: Array,
    uppers: Array,
    bound_B: Array,
    margin_B: Array,
    x_BD: Array,
    centroids_KD: Array,
    squared: bool,
    error_B: Array,
    nearest_B: Array,
) -> int:
    """Nearest candidate of every row (int32 nearest_B) by float64 scores; the first row without any, or -1.

    The lowest id of those within twice error_B (float64) of the best. Candidates (int32 [2, C], overwritten) whose
    upper bound (float32 [C]) is by more than margin_B below the row's lower bound bound_B are left out.
    """
    num_candidates = 0
    number_B = np.zeros(len(x_BD), np.int32)
    for i in range(candidates.shape[1]):
        row = candidates[0, i]
        if uppers[i] >= bound_B[row] - margin_B[row]:
            candidates[0, num_candidates] = row
            candidates[1, num_candidates] = candidates[1, i]
            number_B[row] += 1
            num_candidates += 1
    best_B = np.full(len(x_BD), -np.inf)
    scores = np.empty(num_candidates)
    for i in range(num_candidates):
        row = candidates[0, i]
        if number_B[row] > 1:
            scores[i] = _score_in_float64(x_BD[row], centroids_KD[candidates[1, i]], squared)
            best_B[row] = max(best_B[row], scores[i])
    nearest_B[:] = np.int32(2147483647)
    for i in range(num_candidates):
        row = candidates[0, i]
        if number_B[row] == 1 or scores[i] >= best_B[row] - 2.0 * error_B[row]:
            nearest_B[row] = min(nearest_B[row], candidates[1, i])
    for row in range(len(x_BD)):
        if number_B[row] == 0:
            return row
    return -1


@njit(nogil=True, cache=True, error_model="numpy")
def keep_nearer(x_BD: Array, centroids_KD: Array, current_B: Array, squared: bool, found_B: Array) -> None:
    """Puts current_B (int32, -1 for none) into found_B where its centroid's float64 score is strictly better."""
    for r in range(len(x_BD)):
        current, found = current_B[r], found_B[r]
        if current >= 0 and current != found:
            kept = _score_in_float64(x_BD[r], centroids_KD[current], squared)
            if kept > _score_in_float64(x_BD[r], centroids_KD[found], squared):
                found_B[r] = current


@njit(nogil=True, cache=True)
def add_rows(rows_ND: Array, list_no_N: Array, first_dim: int, last_dim: int, sums_KD: Array) -> None:
    """Adds dimensions first_dim .. last_dim - 1 of every row to its list's sum (float64 [K, D]), rows in their order."""
    for n in range(len(rows_ND)):
        k = list_no_N[n]
        for j in range(first_dim, last_dim):
            sums_KD[k, j] += np.float64(rows_ND[n, j])
