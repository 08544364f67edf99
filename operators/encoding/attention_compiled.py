"""Attention of short segments in bfloat16, compiled by numba around AVX512-BF16's product of pairs.

At embedding models' sizes (heads of 32 to 128 dimensions, texts of 10 to 500 tokens) torch's attention on the CPU spends
most of its time around the products. Here a segment's keys and values are laid out once a head, the scores of eight
queries stay in the nearest cache, and nothing is masked or padded beyond a register. Products are added up in float32.
Imported only where numba is and the CPU has the instructions.

Shapes: T tokens, H query heads, K key heads, D dimension of a head, S segments. bfloat16 travels as uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from operators.encoding.vector_code import COLUMNS, ROWS, interleave, multiply_tile, scale_row, softmax_row, transpose

# Of vector_code.py: numba keeps what it compiled until this file changes, and must not when that one has.
_VECTOR_CODE = "a0526b8ae90109ce"

Array = Any  # numba compiles for the dtypes at the call; the docstrings name them

_LOG2_E = 1.4426950408889634
_HEADS = "uint16[:, :, :]"  # of any strides, so that one compilation serves whatever the models hand over


@njit(nogil=True, error_model="numpy")
def _lay_out_keys(k_LD: Array, keys: Array) -> None:
    """keys[p, j] = dimensions 2p and 2p + 1 of key j. The lanes beyond the last key are left as they are."""
    length, dim = k_LD.shape
    source, stride = k_LD.ctypes.data, k_LD.strides[0]
    target, target_stride = keys.ctypes.data, keys.strides[0]
    whole = length // 16 * 16
    for j in range(0, whole, 16):
        for p in range(0, dim // 2, 16):
            transpose(source + j * stride + 4 * p, stride, target + p * target_stride + 4 * j, target_stride)
    for j in range(whole, length):
        for p in range(dim // 2):
            keys[p, j] = np.int32(np.uint32(k_LD[j, 2 * p]) | (np.uint32(k_LD[j, 2 * p + 1]) << np.uint32(16)))


@njit(nogil=True, error_model="numpy")
def _lay_out_values(v_LD: Array, values: Array) -> None:
    """values[p, d] = dimension d of keys 2p and 2p + 1; keys beyond the last, up to a full tile, are 0."""
    length, dim = v_LD.shape
    source, stride, target = v_LD.ctypes.data, v_LD.strides[0], values.ctypes.data
    for p in range(length // 2):
        interleave(source + 2 * p * stride, source + (2 * p + 1) * stride, target + 4 * p * dim, dim)
    if length % 2:
        for d in range(dim):
            values[length // 2, d] = np.int32(v_LD[length - 1, d])
    for p in range((length + 1) // 2, (length + COLUMNS - 1) // COLUMNS * (COLUMNS // 2)):
        for d in range(dim):
            values[p, d] = 0


@njit(
    f"void({_HEADS}, {_HEADS}, {_HEADS}, int64[::1], int64, int64, float64, {_HEADS})",
    nogil=True,
    cache=True,
    error_model="numpy",
)
def attend_segments(
    q_THD: Array, k_TKD: Array, v_TKD: Array, offsets: Array, left: int, right: int, scale: float, out_THD: Array
) -> None:
    """out = softmax(scale * q k') v within each segment offsets[s]:offsets[s + 1] (int64 [S + 1]).

    q, k, v, out: bfloat16 as uint16, rows of D contiguous, D a multiple of 32, H a multiple of K. scale: positive. A
    query sees `left` keys before itself and `right` behind, -1 for all. A score of NaN or +inf makes its query's row
    NaN. The bits of a segment do not depend on the others.
    """
    num_tokens, num_heads, dim = q_THD.shape
    share = num_heads // k_TKD.shape[1]
    pairs = dim // 2
    longest = 0
    for s in range(len(offsets) - 1):
        longest = max(longest, offsets[s + 1] - offsets[s])
    padded = (longest + COLUMNS - 1) // COLUMNS * COLUMNS
    keys = np.zeros((pairs, padded), np.int32)  # pairs of a key's dimensions, one key a lane
    values = np.zeros((padded // 2, dim), np.int32)  # pairs of neighbouring keys, one dimension a lane
    queries = np.zeros((ROWS, dim), np.uint16)
    scores = np.empty((ROWS, padded), np.float32)
    shares = np.zeros((ROWS, padded), np.uint16)
    found = np.empty((ROWS, dim), np.float32)
    totals = np.empty(ROWS, np.float32)
    keys_at, values_at, queries_at = keys.ctypes.data, values.ctypes.data, queries.ctypes.data
    scores_at, shares_at, found_at = scores.ctypes.data, shares.ctypes.data, found.ctypes.data
    factor = np.float32(scale * _LOG2_E)
    for s in range(len(offsets) - 1):
        first, length = offsets[s], offsets[s + 1] - offsets[s]
        before = length if left < 0 else left
        behind = length if right < 0 else right
        for head in range(num_heads):
            if head % share == 0:
                _lay_out_keys(k_TKD[first : first + length, head // share], keys)
                _lay_out_values(v_TKD[first : first + length, head // share], values)
            for top in range(0, length, ROWS):
                rows = min(ROWS, length - top)
                # A full tile may reach into the next segment; the scores of those rows are not used.
                if first + top + ROWS <= num_tokens:
                    rows_at = q_THD.ctypes.data + (first + top) * q_THD.strides[0] + head * q_THD.strides[1]
                    stride = q_THD.strides[0] // 4
                else:
                    for r in range(rows):
                        for d in range(dim):
                            queries[r, d] = q_THD[first + top + r, head, d]
                    rows_at, stride = queries_at, pairs
                lo = max(0, top - before) // COLUMNS * COLUMNS
                hi = min(length, top + rows + behind)
                end = (hi + COLUMNS - 1) // COLUMNS * COLUMNS
                for column in range(lo, end, COLUMNS):
                    at = 4 * column
                    multiply_tile(rows_at, stride, keys_at + at, padded, scores_at + at, padded, pairs)
                for r in range(rows):
                    start, stop = max(0, top + r - before), min(hi, top + r + behind + 1)
                    totals[r] = softmax_row(
                        scores_at + 4 * r * padded, shares_at + 2 * r * padded, lo, end, start, stop, factor
                    )
                for column in range(0, dim, COLUMNS):
                    right_at = values_at + 2 * lo * dim + 4 * column
                    multiply_tile(
                        shares_at + 2 * lo, padded // 2, right_at, dim, found_at + 4 * column, dim, (end - lo) // 2
                    )
                out_at = out_THD.ctypes.data + (first + top) * out_THD.strides[0] + head * out_THD.strides[1]
                for r in range(rows):
                    target = out_at + r * out_THD.strides[0]
                    scale_row(found_at + 4 * r * dim, target, dim, np.float32(1.0) / totals[r])
    # numba 0.68 frees an array after its last use by name, and an address is none: without this line what is computed
    # above lies in freed memory, which other threads' allocations are free to take.
    totals[0] = len(keys) + len(values) + len(queries) + len(scores) + len(shares) + len(found)
