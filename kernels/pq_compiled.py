"""The inner loops of the product quantizer, compiled by numba. Imported only where numba is.

Shapes: N rows, D dimensions, L lists, M sub-quantizers, K codewords each (16 or 256), S dimensions of a sub-vector,
P of them with padding (`padded_dims`), B = LANES rows of a block.

Rows lie in the lanes of registers and codewords follow one another, so a row's best, second best and best codeword are
updated lane by lane and nothing is added up across a register. Scores are 2 c·x - |c|^2, larger is better.
Each function lets go of the interpreter and runs on the thread that calls it. All arrays are on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any, Literal

import numpy as np
from numba import njit, types

Array = Any  # numba compiles for the dtypes of the signatures; the docstrings name them

# Rows of a block: best, second, column and 8 dimensions of 256 float32 take 11 KiB, a third of the innermost cache.
LANES = 256
UNIT_ROUNDOFF_32 = 2.0**-24
UNIT_ROUNDOFF_64 = 2.0**-53
# Work buffer: best, second, column, four partial scores, then the P dimensions; LANES values each.
_SECOND, _COLUMN, _PARTIAL, _DIMS = LANES, 2 * LANES, 3 * LANES, 7 * LANES

# Without it, every thread that comes before the first is done would compile, too.
_COMPILING = Lock()


def padded_dims(sub_dims: int) -> int:
    """P: 2, 4, 8, or the next multiple of 4 beyond. The loops below are written out for these."""
    return next(P for P in (2, 4, 8, -(-sub_dims // 4) * 4) if sub_dims <= P)


def _array(dtype: Any, ndim: int, layout: Literal["A", "C"] = "C", *, readonly: bool = False) -> Any:
    return types.Array(dtype, ndim, layout, readonly=readonly)


# Signatures are fixed, and what callers bring may be read-only, rows of any layout: one compilation for all of them.
_ROWS = _array(types.float32, 2, "A", readonly=True)
_CENTROIDS, _LIST_NO = _array(types.float32, 2, readonly=True), _array(types.int64, 1, readonly=True)
_F32_2, _F32_3, _F64_2, _F64_3 = (_array(t, ndim) for t in (types.float32, types.float64) for ndim in (2, 3))
_U8_1, _U8_2, _I64 = _array(types.uint8, 1), _array(types.uint8, 2), _array(types.int64, 1)
# "contract" lets a multiplication and an addition become one instruction: within the bound that float64 decides by.
_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}


@njit(**_OPTIONS)
def _merge(best: float, second: float, column: float, score: float, k: float) -> tuple[float, float, float]:
    lower = score if score < best else best
    return (
        score if score > best else best,
        lower if lower > second else second,
        k if score > best else column,
    )


@njit(**_OPTIONS)
def _scan_2(w: Array, scaled_KP: Array, bias_K: Array) -> None:
    for k in range(0, len(bias_K), 4):
        a0, b0, c0, d0 = scaled_KP[k, 0], scaled_KP[k + 1, 0], scaled_KP[k + 2, 0], scaled_KP[k + 3, 0]
        a1, b1, c1, d1 = scaled_KP[k, 1], scaled_KP[k + 1, 1], scaled_KP[k + 2, 1], scaled_KP[k + 3, 1]
        bias_a, bias_b, bias_c, bias_d = bias_K[k], bias_K[k + 1], bias_K[k + 2], bias_K[k + 3]
        ka, kb, kc, kd = np.float32(k), np.float32(k + 1), np.float32(k + 2), np.float32(k + 3)
        for r in range(LANES):
            x0, x1 = w[_DIMS + r], w[_DIMS + LANES + r]
            best, second, column = w[r], w[_SECOND + r], w[_COLUMN + r]
            best, second, column = _merge(best, second, column, bias_a + x0 * a0 + x1 * a1, ka)
            best, second, column = _merge(best, second, column, bias_b + x0 * b0 + x1 * b1, kb)
            best, second, column = _merge(best, second, column, bias_c + x0 * c0 + x1 * c1, kc)
            best, second, column = _merge(best, second, column, bias_d + x0 * d0 + x1 * d1, kd)
            w[r], w[_SECOND + r], w[_COLUMN + r] = best, second, column


@njit(**_OPTIONS)
def _scan_4(w: Array, scaled_KP: Array, bias_K: Array) -> None:
    for k in range(0, len(bias_K), 4):
        a0, b0, c0, d0 = scaled_KP[k, 0], scaled_KP[k + 1, 0], scaled_KP[k + 2, 0], scaled_KP[k + 3, 0]
        a1, b1, c1, d1 = scaled_KP[k, 1], scaled_KP[k + 1, 1], scaled_KP[k + 2, 1], scaled_KP[k + 3, 1]
        a2, b2, c2, d2 = scaled_KP[k, 2], scaled_KP[k + 1, 2], scaled_KP[k + 2, 2], scaled_KP[k + 3, 2]
        a3, b3, c3, d3 = scaled_KP[k, 3], scaled_KP[k + 1, 3], scaled_KP[k + 2, 3], scaled_KP[k + 3, 3]
        bias_a, bias_b, bias_c, bias_d = bias_K[k], bias_K[k + 1], bias_K[k + 2], bias_K[k + 3]
        ka, kb, kc, kd = np.float32(k), np.float32(k + 1), np.float32(k + 2), np.float32(k + 3)
        for r in range(LANES):
            x0, x1 = w[_DIMS + r], w[_DIMS + LANES + r]
            x2, x3 = w[_DIMS + 2 * LANES + r], w[_DIMS + 3 * LANES + r]
            best, second, column = w[r], w[_SECOND + r], w[_COLUMN + r]
            best, second, column = _merge(best, second, column, bias_a + x0 * a0 + x1 * a1 + x2 * a2 + x3 * a3, ka)
            best, second, column = _merge(best, second, column, bias_b + x0 * b0 + x1 * b1 + x2 * b2 + x3 * b3, kb)
            best, second, column = _merge(best, second, column, bias_c + x0 * c0 + x1 * c1 + x2 * c2 + x3 * c3, kc)
            best, second, column = _merge(best, second, column, bias_d + x0 * d0 + x1 * d1 + x2 * d2 + x3 * d3, kd)
            w[r], w[_SECOND + r], w[_COLUMN + r] = best, second, column


@njit(**_OPTIONS)
def _scan_8(w: Array, scaled_KP: Array, bias_K: Array) -> None:
    for k in range(0, len(bias_K), 2):
        a0, a1, a2, a3 = scaled_KP[k, 0], scaled_KP[k, 1], scaled_KP[k, 2], scaled_KP[k, 3]
        a4, a5, a6, a7 = scaled_KP[k, 4], scaled_KP[k, 5], scaled_KP[k, 6], scaled_KP[k, 7]
        b0, b1, b2, b3 = scaled_KP[k + 1, 0], scaled_KP[k + 1, 1], scaled_KP[k + 1, 2], scaled_KP[k + 1, 3]
        b4, b5, b6, b7 = scaled_KP[k + 1, 4], scaled_KP[k + 1, 5], scaled_KP[k + 1, 6], scaled_KP[k + 1, 7]
        bias_a, bias_b, ka, kb = bias_K[k], bias_K[k + 1], np.float32(k), np.float32(k + 1)
        for r in range(LANES):
            x0, x1 = w[_DIMS + r], w[_DIMS + LANES + r]
            x2, x3 = w[_DIMS + 2 * LANES + r], w[_DIMS + 3 * LANES + r]
            x4, x5 = w[_DIMS + 4 * LANES + r], w[_DIMS + 5 * LANES + r]
            x6, x7 = w[_DIMS + 6 * LANES + r], w[_DIMS + 7 * LANES + r]
            one = bias_a + x0 * a0 + x1 * a1 + x2 * a2 + x3 * a3 + x4 * a4 + x5 * a5 + x6 * a6 + x7 * a7
            two = bias_b + x0 * b0 + x1 * b1 + x2 * b2 + x3 * b3 + x4 * b4 + x5 * b5 + x6 * b6 + x7 * b7
            best, second, column = w[r], w[_SECOND + r], w[_COLUMN + r]
            best, second, column = _merge(best, second, column, one, ka)
            best, second, column = _merge(best, second, column, two, kb)
            w[r], w[_SECOND + r], w[_COLUMN + r] = best, second, column


@njit(**_OPTIONS)
def _scan_more(w: Array, scaled_KP: Array, bias_K: Array) -> None:
    """Any multiple of four dimensions: partial scores of four codewords are kept between steps of four dimensions."""
    for k in range(0, len(bias_K), 4):
        for r in range(LANES):
            w[_PARTIAL + r] = bias_K[k]
            w[_PARTIAL + LANES + r] = bias_K[k + 1]
            w[_PARTIAL + 2 * LANES + r] = bias_K[k + 2]
            w[_PARTIAL + 3 * LANES + r] = bias_K[k + 3]
        for j in range(0, scaled_KP.shape[1], 4):
            a0, b0, c0, d0 = scaled_KP[k, j], scaled_KP[k + 1, j], scaled_KP[k + 2, j], scaled_KP[k + 3, j]
            j1, j2, j3 = j + 1, j + 2, j + 3
            a1, b1, c1, d1 = scaled_KP[k, j1], scaled_KP[k + 1, j1], scaled_KP[k + 2, j1], scaled_KP[k + 3, j1]
            a2, b2, c2, d2 = scaled_KP[k, j2], scaled_KP[k + 1, j2], scaled_KP[k + 2, j2], scaled_KP[k + 3, j2]
            a3, b3, c3, d3 = scaled_KP[k, j3], scaled_KP[k + 1, j3], scaled_KP[k + 2, j3], scaled_KP[k + 3, j3]
            x = w[_DIMS + j * LANES : _DIMS + (j + 4) * LANES]
            for r in range(LANES):
                x0, x1, x2, x3 = x[r], x[LANES + r], x[2 * LANES + r], x[3 * LANES + r]
                w[_PARTIAL + r] += x0 * a0 + x1 * a1 + x2 * a2 + x3 * a3
                w[_PARTIAL + LANES + r] += x0 * b0 + x1 * b1 + x2 * b2 + x3 * b3
                w[_PARTIAL + 2 * LANES + r] += x0 * c0 + x1 * c1 + x2 * c2 + x3 * c3
                w[_PARTIAL + 3 * LANES + r] += x0 * d0 + x1 * d1 + x2 * d2 + x3 * d3
        ka, kb, kc, kd = np.float32(k), np.float32(k + 1), np.float32(k + 2), np.float32(k + 3)
        for r in range(LANES):
            best, second, column = w[r], w[_SECOND + r], w[_COLUMN + r]
            best, second, column = _merge(best, second, column, w[_PARTIAL + r], ka)
            best, second, column = _merge(best, second, column, w[_PARTIAL + LANES + r], kb)
            best, second, column = _merge(best, second, column, w[_PARTIAL + 2 * LANES + r], kc)
            best, second, column = _merge(best, second, column, w[_PARTIAL + 3 * LANES + r], kd)
            w[r], w[_SECOND + r], w[_COLUMN + r] = best, second, column


@njit(**_OPTIONS)
def _nearest_in_float64(w: Array, r: int, words_SK: Array, norms_K: Array, scores_K: Array) -> None:
    """Puts the lowest codeword of those that float64 cannot tell from the best into the column of lane r."""
    sub_dims, num_codewords = words_SK.shape
    squared_norm, largest_norm, best = 0.0, 0.0, -np.inf
    for k in range(num_codewords):
        scores_K[k] = -norms_K[k]
        largest_norm = max(largest_norm, norms_K[k])
    for j in range(sub_dims):
        x = np.float64(w[_DIMS + j * LANES + r])
        squared_norm += x * x
        for k in range(num_codewords):
            scores_K[k] += 2.0 * x * words_SK[j, k]
    for k in range(num_codewords):
        best = max(best, scores_K[k])
    # As kernels.assign.score_error: in float64 nothing underflows.
    magnitude = (2.0 * np.sqrt(squared_norm) + np.sqrt(largest_norm)) * np.sqrt(largest_norm)
    least = best - 2.0 * (sub_dims + 4) * 1.01 * UNIT_ROUNDOFF_64 * magnitude
    k = 0
    while scores_K[k] < least:
        k += 1
    w[_COLUMN + r] = np.float32(k)


@njit(**_OPTIONS)
def _settle(w: Array, num_rows: int, weight_P: Array, words_SK: Array, norms_K: Array, scores_K: Array) -> int:
    """Decides what float32 cannot; returns the first row whose scores may not be finite, or num_rows.

    The magnitude of a score's terms is at most that of the row's values times weight_P, and so bounds its rounding
    error as in kernels.assign.score_error.
    """
    sub_dims = len(words_SK)
    for r in range(LANES):
        w[_PARTIAL + r] = weight_P[-1]
    for j in range(sub_dims):
        for r in range(LANES):
            w[_PARTIAL + r] += weight_P[j] * abs(w[_DIMS + j * LANES + r])
    factor = np.float32(2.0 * 1.01 * (sub_dims + 4) * UNIT_ROUNDOFF_32)
    least = np.float32(2.0 * (sub_dims + 4) * 2.0**-126)
    num_undecided = 0
    for r in range(LANES):
        num_undecided += not (w[r] - w[_SECOND + r] > factor * w[_PARTIAL + r] + least)
    if num_undecided > 0:
        for r in range(num_rows):
            if not (w[_PARTIAL + r] < np.inf):
                return r
            if not (w[r] - w[_SECOND + r] > factor * w[_PARTIAL + r] + least):
                _nearest_in_float64(w, r, words_SK, norms_K, scores_K)
    return num_rows


def encoder(padded: int) -> Callable[..., int]:
    """The function that encodes, for P dimensions; compiled at a machine's first call for a P, then in numba's cache.

    encode_rows(x_ND, centroids_LD, list_no_N, scaled_MKP, bias_MK, weight_MP, words_MSK, norms_MK, nbits, codes)
    writes the codes of the rows less the centroids of their lists (of the rows where L is 0) into codes, which are
    zero before. x_ND, centroids_LD float32, list_no_N int64; then the fields of kernels.pq_codewords.Codewords. Returns the first
    row with a NaN, an infinity or scores that may not be within float32, and then codes are missing; or -1.
    """
    with _COMPILING:
        return _encoder(padded if padded <= 8 else 0)


@cache
def _encoder(dims: int) -> Callable[..., int]:
    # `dims` is a number, not a function: numba's cache does not recognise a closure over a compiled function.
    @njit(
        types.int64(_ROWS, _CENTROIDS, _LIST_NO, _F32_3, _F32_2, _F32_2, _F64_3, _F64_2, types.int64, _U8_2), **_OPTIONS
    )
    def encode_rows(
        x_ND: Array,
        centroids_LD: Array,
        list_no_N: Array,
        scaled_MKP: Array,
        bias_MK: Array,
        weight_MP: Array,
        words_MSK: Array,
        norms_MK: Array,
        nbits: int,
        codes: Array,
    ) -> int:
        num_rows = len(x_ND)
        M, sub_dims, num_codewords = words_MSK.shape
        w = np.zeros(_DIMS + scaled_MKP.shape[2] * LANES, np.float32)
        scores_K = np.empty(num_codewords)
        for start in range(0, num_rows, LANES):
            num_block = min(LANES, num_rows - start)
            first_bad = num_block
            for m in range(M):
                for r in range(num_block):
                    for j in range(sub_dims):
                        w[_DIMS + j * LANES + r] = x_ND[start + r, m * sub_dims + j]
                if len(centroids_LD) > 0:
                    for r in range(num_block):
                        list_no = list_no_N[start + r]
                        for j in range(sub_dims):
                            w[_DIMS + j * LANES + r] -= centroids_LD[list_no, m * sub_dims + j]
                for r in range(LANES):
                    w[r] = w[_SECOND + r] = -np.inf
                    w[_COLUMN + r] = 0.0
                if dims == 2:
                    _scan_2(w, scaled_MKP[m], bias_MK[m])
                elif dims == 4:
                    _scan_4(w, scaled_MKP[m], bias_MK[m])
                elif dims == 8:
                    _scan_8(w, scaled_MKP[m], bias_MK[m])
                else:
                    _scan_more(w, scaled_MKP[m], bias_MK[m])
                bad = _settle(w, num_block, weight_MP[m], words_MSK[m], norms_MK[m], scores_K)
                first_bad = min(first_bad, bad)
                if nbits == 8:
                    for r in range(num_block):
                        codes[start + r, m] = np.uint8(np.int32(w[_COLUMN + r]))
                else:
                    for r in range(num_block):
                        codes[start + r, m // 2] |= np.uint8(np.int32(w[_COLUMN + r]) << (4 * (m % 2)))
            if first_bad < num_block:
                return start + first_bad
        return -1

    return encode_rows


@njit(types.void(_ROWS, _U8_1, _F64_2, _I64), **_OPTIONS)
def add_to_codewords(rows_NS: Array, codes_N: Array, sums_KS: Array, counts_K: Array) -> None:
    """Adds every row (float32), in their order, to the sum (float64) and count (int64) of its codeword."""
    for n in range(len(rows_NS)):
        k = codes_N[n]
        counts_K[k] += 1
        for j in range(rows_NS.shape[1]):
            sums_KS[k, j] += np.float64(rows_NS[n, j])
