"""The search of products for what may be a row's best, compiled by numba. Imported only where numba is.

Shapes: B rows of a block, K columns of a tile of products, R rows of a tile, G groups of GROUP_COLUMNS columns.
Each function lets go of the interpreter and runs on the thread that calls it. Arrays are C-contiguous and on the host.
Numba has no bfloat16: products come as their bits, uint16, which are the upper half of a float32's, or as the bits of a
float32, uint32. A tile may have more rows and columns than there are bounds and biases: they are not looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = Any  # numba compiles for the dtypes at the call; the docstrings name them

# Columns whose largest upper bound decides whether a row looks at them one by one.
GROUP_COLUMNS = 16


@njit(nogil=True, cache=True, error_model="numpy")
def raise_best_bounds(products_KB: Array, bias_K: Array, rounding: float, bound_B: Array, upper_GB: Array) -> None:
    """Raises bound_B (float32) to the largest lower bound of a row's scores in a tile of products (bits [K, B]).

    A lower bound is product - rounding * |product| + bias, an upper one product + rounding * |product| + bias, and the
    largest upper one of each GROUP_COLUMNS columns goes to upper_GB (float32). A NaN is no bound.
    """
    num_columns, num_rows = len(bias_K), len(bound_B)
    shift = np.uint32(32 - 8 * products_KB.itemsize)
    factor = np.float32(rounding)
    bits_B = np.empty(num_rows, np.uint32)
    product_B = bits_B.view(np.float32)
    upper_GB[:] = -np.inf
    for k in range(num_columns):
        bias = bias_K[k]
        upper_B = upper_GB[k // GROUP_COLUMNS]
        for r in range(num_rows):
            bits_B[r] = np.uint32(products_KB[k, r]) << shift
        for r in range(num_rows):
            lower = product_B[r] - factor * abs(product_B[r]) + bias
            bound_B[r] = lower if lower > bound_B[r] else bound_B[r]
            upper = product_B[r] + factor * abs(product_B[r]) + bias
            upper_B[r] = upper if upper > upper_B[r] else upper_B[r]


@njit(nogil=True, cache=True, error_model="numpy")
def find_near_best(
    products_KB: Array,
    bias_K: Array,
    rounding: float,
    upper_GB: Array,
    first: int,
    least_B: Array,
    candidates: Array,
    uppers: Array,
    found: int,
) -> int:
    """Appends (row, column) of the tile's scores with an upper bound of at least least_B (float32).

    upper_GB: as raise_best_bounds left it. candidates int32 [2, any] and uppers float32 [any], their bounds, are
    written from `found` on; `first` is the column of the tile's first. The new number of candidates; -1 when there is
    no room.
    """
    num_columns, num_rows = len(bias_K), len(least_B)
    shift = np.uint32(32 - 8 * products_KB.itemsize)
    factor = np.float32(rounding)
    bits = np.empty(1, np.uint32)
    product = bits.view(np.float32)
    for g in range((num_columns + GROUP_COLUMNS - 1) // GROUP_COLUMNS):
        for r in range(num_rows):
            if upper_GB[g, r] >= least_B[r]:
                if found + GROUP_COLUMNS > candidates.shape[1]:
                    return -1
                for k in range(g * GROUP_COLUMNS, min((g + 1) * GROUP_COLUMNS, num_columns)):
                    bits[0] = np.uint32(products_KB[k, r]) << shift
                    upper = product[0] + factor * abs(product[0]) + bias_K[k]
                    if upper >= least_B[r]:
                        candidates[0, found] = r
                        candidates[1, found] = first + k
                        uppers[found] = upper
                        found += 1
    return found


@njit(nogil=True, cache=True, error_model="numpy")
def keep_near_best(candidates: Array, uppers: Array, least_B: Array, found: int) -> int:
    """Moves those of the first `found` candidates with a bound of at least their row's least_B to the front; how many."""
    kept = 0
    for i in range(found):
        row = candidates[0, i]
        candidates[0, kept] = row
        candidates[1, kept] = candidates[1, i]
        kept += uppers[i] >= least_B[row]
    return kept


@njit(nogil=True, cache=True, error_model="numpy")
def find_near_best_of_group(
    products_KR: Array,
    bias_K: Array,
    rounding: float,
    rows_R: Array,
    members_K: Array,
    offset_B: Array,
    error_B: Array,
    error_per_norm_B: Array,
    norm_B: Array,
    largest_norm: float,
    largest_rounding: float,
    bound_B: Array,
    candidates: Array,
    uppers: Array,
    found: int,
) -> int:
    """As raise_best_bounds and find_near_best for the rows that look at one group: row r of the tile is rows_R[r].

    A pair's score is product + bias_K + offset_B of its row; but for the product's own rounding it is within
    error_B + error_per_norm_B * largest_norm + norm_B * largest_rounding of the true one (float32). bound_B float32, below
    which no row's best score lies, is raised. members_K int32 names the columns. The new number of candidates, whose
    `uppers` bound the true scores; -1 when there is no room, and then it may be called again.
    """
    num_rows = len(rows_R)
    num_groups = (len(bias_K) + GROUP_COLUMNS - 1) // GROUP_COLUMNS
    upper_GR = np.empty((num_groups, num_rows), np.float32)
    least_R = np.full(num_rows, -np.inf, np.float32)
    raise_best_bounds(products_KR, bias_K, rounding, least_R, upper_GR)
    norm, typed = np.float32(largest_norm), np.float32(largest_rounding)
    for r in range(num_rows):
        row = rows_R[r]
        error = error_B[row] + error_per_norm_B[row] * norm + norm_B[row] * typed
        bound = least_R[r] + offset_B[row] - error
        if bound > bound_B[row]:
            bound_B[row] = bound
        least_R[r] = bound_B[row] - offset_B[row] - error
    more = find_near_best(products_KR, bias_K, rounding, upper_GR, 0, least_R, candidates, uppers, found)
    for i in range(found, more):
        row = rows_R[candidates[0, i]]
        candidates[0, i] = row
        candidates[1, i] = members_K[candidates[1, i]]
        uppers[i] += offset_B[row] + (error_B[row] + error_per_norm_B[row] * norm + norm_B[row] * typed)
    return more
