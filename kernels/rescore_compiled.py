"""The loop of kernels.rescore, compiled by numba. Imported only where numba is.

Shapes: Q queries, N rows, P pairs, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from kernels.rescore import LANES

Array = Any  # numba compiles for the dtypes of the signature


def _readonly(dtype: Any, ndim: int) -> Any:
    return types.Array(dtype, ndim, "C", readonly=True)


_SIGNATURE = types.void(
    _readonly(types.float32, 2),
    _readonly(types.int64, 1),
    _readonly(types.uint16, 2),
    _readonly(types.int64, 1),
    types.boolean,
    types.Array(types.float32, 1, "C"),
)
# The bits of a half, moved into those of a float, stand for a number that is smaller by this power of two, also where
# the half is subnormal.
_SCALE = np.float32(2.0**112)


# No fastmath: an addition in another order, or fused with the product, would have other last bits than the array code.
@njit(_SIGNATURE, nogil=True, cache=True, error_model="numpy")
def score_pairs(
    queries_QD: Array, query_P: Array, halves_ND: Array, row_P: Array, is_product: bool, out_P: Array
) -> None:
    """As kernels.rescore.score_pairs, with the halves as their bits."""
    num_dims = queries_QD.shape[1]
    whole = num_dims - num_dims % LANES
    lanes = np.empty(LANES, np.float32)
    bits = np.empty(num_dims, np.uint32)
    row = bits.view(np.float32)
    for p in range(len(row_P)):
        r, q = row_P[p], query_P[p]
        for d in range(num_dims):
            half = np.uint32(halves_ND[r, d])
            bits[d] = ((half & np.uint32(0x7FFF)) << np.uint32(13)) | ((half & np.uint32(0x8000)) << np.uint32(16))
        for d in range(num_dims):
            row[d] *= _SCALE
        if is_product:
            for d in range(num_dims):
                row[d] *= queries_QD[q, d]
        else:
            for d in range(num_dims):
                apart = row[d] - queries_QD[q, d]
                row[d] = apart * apart
        for lane in range(LANES):
            lanes[lane] = np.float32(0.0)
        for d in range(0, whole, LANES):
            for lane in range(LANES):
                lanes[lane] += row[d + lane]
        for d in range(whole, num_dims):
            lanes[d - whole] += row[d]
        total = np.float32(0.0)
        for lane in range(LANES):
            total += lanes[lane]
        out_P[p] = total if is_product else -total
