"""The loops around an int8 product, compiled by numba: rows to codes, sums to bfloat16. Imported only where numba is.

Shapes: T tokens, I inputs and O outputs of a layer. bfloat16 travels as uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from operators.encoding.vector_code import bits_float, float_bits

# Of vector_code.py: numba keeps what it compiled until this file changes, and must not when that one has.
_VECTOR_CODE = "a0526b8ae90109ce"

Array = Any  # numba compiles for the dtypes at the call; the docstrings name them

_INFINITY_BITS = np.uint32(0x7F800000)
_SMALLEST_BITS = np.uint32(0x02000000)  # about 1e-37: the inverse of anything smaller is not finite; it counts as 0


@njit(nogil=True, cache=True, error_model="numpy")
def quantize_rows(x_TI: Array, factor_I: Array, codes_TI: Array, scale_T: Array) -> None:
    """codes (int8) and scale (float32) of bfloat16 rows: x * factor_I about scale * codes, scale = max |x * factor| / 127.

    A row with NaN or an infinity gets the scale NaN. factor_I: float32.
    """
    num_inputs = x_TI.shape[1]
    row_I = np.empty(num_inputs, np.float32)
    for t in range(x_TI.shape[0]):
        largest = np.uint32(0)  # without their signs, floating numbers are in the order of their bits
        for i in range(num_inputs):
            value = bits_float(np.uint32(x_TI[t, i]) << np.uint32(16)) * factor_I[i]
            row_I[i] = value
            largest = max(largest, float_bits(value) & np.uint32(0x7FFFFFFF))
        if largest >= _INFINITY_BITS or largest < _SMALLEST_BITS:
            scale_T[t] = np.float32(np.nan) if largest >= _INFINITY_BITS else np.float32(0.0)
            codes_TI[t] = 0
            continue
        scale = bits_float(largest) / np.float32(127.0)
        scale_T[t] = scale
        inverse = np.float32(127.0) / bits_float(largest)
        for i in range(num_inputs):
            # Adding 1.5 * 2^23 rounds to the nearest integer, whose low bits are the code.
            codes_TI[t, i] = np.int8(float_bits(row_I[i] * inverse + np.float32(12582912.0)) & np.uint32(0xFF))


@njit(nogil=True, cache=True, error_model="numpy")
def scale_sums(sums_TO: Array, scale_T: Array, scale_O: Array, bias_O: Array, out_TO: Array) -> None:
    """out (bfloat16) = sums (int32) * scale_T * scale_O + bias_O, all float32; NaN for a row whose scale is NaN."""
    num_outputs = sums_TO.shape[1]
    for t in range(sums_TO.shape[0]):
        scale = scale_T[t]
        if np.isnan(scale):
            out_TO[t] = np.uint16(0x7FC0)
            continue
        for o in range(num_outputs):
            bits = float_bits(np.float32(sums_TO[t, o]) * (scale * scale_O[o]) + bias_O[o])
            out_TO[t, o] = np.uint16(
                (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            )
