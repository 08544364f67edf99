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


@njit(nogil=True, cache=True, error_model="numpy")
def count_near_groups(scores_GB: Array, bias_G: Array, slack: float, best_B: Array, group_B: Array) -> int:
    """Each row's best group score (float32 best_B) and group (int32 group_B), and about how many pairs are within slack.

    The number is at least that of the (row, group) pairs within slack of the row's best.
    """
    num_groups, num_rows = scores_GB.shape
    best_B[:] = -np.inf
    group_B[:] = 0
    for g in range(num_groups):
        for r in range(num_rows):
            score = scores_GB[g, r] + bias_G[g]
            group_B[r] = np.int32(g) if score > best_B[r] else group_B[r]
            best_B[r] = score if score > best_B[r] else best_B[r]
    margin = np.float32(slack * 1.01 + 1e-30)
    pairs: Any = 0
    for g in range(num_groups):
        found = np.float32(0.0)  # exact up to 2^24 rows, and in the lanes
        for r in range(num_rows):
            score = scores_GB[g, r] + bias_G[g]
            found += np.float32(1.0) if score >= best_B[r] - margin else np.float32(0.0)
        pairs += int(found)
    return pairs


@njit(nogil=True, cache=True, error_model="numpy")
def rows_of_groups(
    scores_GB: Array,
    bias_G: Array,
    slack: float,
    best_B: Array,
    group_B: Array,
    error_B: Array,
    x_BD: Array,
    group_centroids_GD: Array,
    squared: bool,
    starts_G: Array,
    rows: Array,
    own_B: Array,
) -> bool:
    """Rows of each group that is within `slack` of the row's best, ascending: rows[starts_G[g] : starts_G[g + 1]].

    But for group_B of the row: own_B (bool) says whether that is within slack, as the best in float32 nearly always is.

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
            if group_B[r] == g:
                own_B[r] = near
                near = False
            rows[place] = r
            place += near
    starts_G[num_groups] = place
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def raise_lower_bounds(
    scores_KR: Array,
    bias_K: Array,
    rows_R: Array,
    offset_B: Array,
    error_B: Array,
    slope_B: Array,
    radius: float,
    bound_B: Array,
    scratch_R: Array,
) -> None:
    """Raises bound_B (float32), below which no row's best score lies, by a tile of scores (float32 [>= K, >= R]).

    A pair's score is scores_KR + bias_K + offset_B of its row, within error_B + radius * slope_B of the true one; row r
    of the tile is rows_R[r] of the block. scratch_R: float32, at least R, overwritten.
    """
    num_columns, num_rows = len(bias_K), len(rows_R)
    for r in range(num_rows):
        scratch_R[r] = scores_KR[0, r] + bias_K[0]
    for k in range(1, num_columns):
        for r in range(num_rows):
            score = scores_KR[k, r] + bias_K[k]
            scratch_R[r] = score if score > scratch_R[r] else scratch_R[r]
    for r in range(num_rows):
        row = rows_R[r]
        bound = scratch_R[r] + offset_B[row] - (error_B[row] + radius * slope_B[row])
        if bound > bound_B[row]:
            bound_B[row] = bound


@njit(nogil=True, cache=True, error_model="numpy")
def find_candidates(
    scores_KR: Array,
    bias_K: Array,
    rows_R: Array,
    offset_B: Array,
    error_B: Array,
    slope_B: Array,
    radius: float,
    bound_B: Array,
    scratch_R: Array,
    members_K: Array,
    candidates: Array,
    uppers: Array,
    found: int,
) -> int:
    """Appends (row, centroid) of the pairs that may be the row's best to candidates (int32 [2, any]) at `found`.

    Arguments as raise_lower_bounds; members_K int32 names the columns; uppers (float32 [any]) gets the upper bounds of
    the scores. The new number of candidates; -1 when there is no room.
    """
    num_columns, num_rows = len(bias_K), len(rows_R)
    for r in range(num_rows):
        row = rows_R[r]
        scratch_R[r] = bound_B[row] - offset_B[row] - (error_B[row] + radius * slope_B[row])
    for k in range(num_columns):
        for start in range(0, num_rows, 64):
            stop = min(start + 64, num_rows)
            hits = np.float32(0.0)
            for r in range(start, stop):
                hits += np.float32(1.0) if scores_KR[k, r] + bias_K[k] >= scratch_R[r] else np.float32(0.0)
            if hits > 0:
                if found + 64 > candidates.shape[1]:
                    return -1
                for r in range(start, stop):
                    if scores_KR[k, r] + bias_K[k] >= scratch_R[r]:
                        candidates[0, found] = rows_R[r]
                        candidates[1, found] = members_K[k]
                        row = rows_R[r]
                        excess = scores_KR[k, r] + bias_K[k] - scratch_R[r]
                        uppers[found] = bound_B[row] + excess
                        found += 1
    return found


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
