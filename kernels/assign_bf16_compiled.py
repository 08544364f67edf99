"""The inner loops of kernels/assign_bf16.py, compiled by numba. Imported only where numba is.

Shapes: B rows of a block, K columns of a tile of products, G groups of them.
Each function lets go of the interpreter and runs on the thread that calls it. Arrays are C-contiguous and on the host.
Numba has no bfloat16: a tile comes as its bits, uint16, which are the upper half of a float32.
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
    """Raises bound_B (float32) to the largest lower bound of a row's scores in a tile of products (uint16 [K, B]).

    A lower bound is product - rounding * |product| + bias, an upper one product + rounding * |product| + bias, and the
    largest upper one of each GROUP_COLUMNS columns goes to upper_GB (float32). A NaN is no bound.
    """
    num_columns, num_rows = products_KB.shape
    factor = np.float32(rounding)
    bits_B = np.empty(num_rows, np.uint32)
    product_B = bits_B.view(np.float32)
    upper_GB[:] = -np.inf
    for k in range(num_columns):
        bias = bias_K[k]
        upper_B = upper_GB[k // GROUP_COLUMNS]
        for r in range(num_rows):
            bits_B[r] = np.uint32(products_KB[k, r]) << np.uint32(16)
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
    num_columns, num_rows = products_KB.shape
    factor = np.float32(rounding)
    bits = np.empty(1, np.uint32)
    product = bits.view(np.float32)
    for g in range((num_columns + GROUP_COLUMNS - 1) // GROUP_COLUMNS):
        for r in range(num_rows):
            if upper_GB[g, r] >= least_B[r]:
                if found + GROUP_COLUMNS > candidates.shape[1]:
                    return -1
                for k in range(g * GROUP_COLUMNS, min((g + 1) * GROUP_COLUMNS, num_columns)):
                    bits[0] = np.uint32(products_KB[k, r]) << np.uint32(16)
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
