"""Codes of the product quantizer on a CUDA device: residual, distances, nearest codeword and packing in one kernel.

Shapes: N rows, D dimensions, L lists, M sub-quantizers, K = 2^nbits codewords each, S = D / M dimensions of a sub-vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.blocks import check_same_dims
from kernels.cuda.arrays import FLOAT32, as_device, check_found, float_matrix, no_rows_found
from kernels.cuda.assign import assign_nearest
from kernels.cuda.compile import DEFAULT_SHARED_BYTES, kernel
from kernels.pq import code_size

THREADS = 256
# Widest sub-vector that stays in registers; wider ones go through the matrix product of assign_nearest.
MAX_SUB_DIMS = 16
# Rows of a pass beyond it: its copies of sub-vectors stay small.
BLOCK_ROWS = 1 << 20

# A block has GROUP consecutive sub-quantizers, whose codes fill a unit of 1, 2 or 4 bytes, and THREADS x ROWS rows; a
# thread has ROWS of them, so that a codeword read from shared memory serves ROWS products. Consecutive blocks have the
# other groups of the same rows, which then come from the second cache.
SOURCE = r"""
#define THREADS 256
#define CODEWORDS (1 << NBITS)

typedef typename Element<KIND>::type Value;

// SUB_DIMS values from memory; ALIGNED says that rows begin at multiples of 16 bytes.
template <typename T> __device__ __forceinline__ void load(T (&values)[SUB_DIMS], const T* source) {
    constexpr int WIDTH = 16 / sizeof(T);
    if constexpr (ALIGNED && SUB_DIMS % WIDTH == 0) {
#pragma unroll
        for (int i = 0; i < SUB_DIMS; i += WIDTH) {
            const uint4 raw = *reinterpret_cast<const uint4*>(source + i);
            const T* parts = reinterpret_cast<const T*>(&raw);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) values[i + j] = parts[j];
        }
    } else {
#pragma unroll
        for (int i = 0; i < SUB_DIMS; ++i) values[i] = source[i];
    }
}

// Lowest codeword of those that float64 cannot tell from the best: kernels.assign._nearest_in_float64. Rare, so it reads
// its sub-vector again and stays out of the registers of the loop around it.
__device__ __noinline__ int nearest_in_float64(const Value* x, const float* centroid, const float* doubled) {
    double row[SUB_DIMS], row_squares = 0.0, most = 0.0, best = -1.0e300;
#pragma unroll
    for (int s = 0; s < SUB_DIMS; ++s) {
        const float value = widen<KIND>(x[s]);
        row[s] = centroid == nullptr ? value : value - centroid[s];
        row_squares += row[s] * row[s];
    }
    for (int pass = 0; pass < 2; ++pass) {
        const double least =
            best - 2.0 * (SUB_DIMS + 4) *
                       (1.01 * 1.1102230246251565e-16 * (2.0 * sqrt(row_squares) + most) * most);
        for (int k = 0; k < CODEWORDS; ++k) {
            double product = 0.0, squares = 0.0;
#pragma unroll
            for (int s = 0; s < SUB_DIMS; ++s) {
                const double half = 0.5 * (double)doubled[k * SUB_DIMS + s];
                product += row[s] * half;
                squares += half * half;
            }
            const double score = 2.0 * product - squares;
            if (pass == 0) {
                best = fmax(best, score);
                most = fmax(most, sqrt(squares));
            } else if (score >= least) {
                return k;
            }
        }
    }
    return 0;
}

extern "C" __global__ void __launch_bounds__(THREADS) pq_encode(
    const Value* __restrict__ x, const float* __restrict__ centroids, const int* __restrict__ list_no,
    const float* __restrict__ doubled_codebooks, const float* __restrict__ bias, const float* __restrict__ max_norms,
    i64 num_rows, int num_quantizers, int code_size, u8* __restrict__ codes, u64* __restrict__ found) {
    __shared__ __align__(16) float codebook[CODEWORDS * SUB_DIMS];
    __shared__ float shifts[CODEWORDS];
    const int num_groups = (num_quantizers + GROUP - 1) / GROUP;
    const int first_quantizer = (int)(blockIdx.x % num_groups) * GROUP;
    const i64 first_row = (i64)(blockIdx.x / num_groups) * (THREADS * ROWS) + threadIdx.x;
    const int num_dims = num_quantizers * SUB_DIMS;
    u32 packed[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) packed[r] = 0;
    for (int g = 0; g < GROUP && first_quantizer + g < num_quantizers; ++g) {
        const int m = first_quantizer + g;
        __syncthreads();
        for (int i = threadIdx.x; i < CODEWORDS * SUB_DIMS; i += THREADS)
            codebook[i] = doubled_codebooks[(i64)m * CODEWORDS * SUB_DIMS + i];
        for (int i = threadIdx.x; i < CODEWORDS; i += THREADS) shifts[i] = bias[m * CODEWORDS + i];
        __syncthreads();
        float row[ROWS][SUB_DIMS], best[ROWS], second[ROWS];
        int place[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const i64 n = first_row + r * THREADS;
            const i64 source = (n < num_rows ? n : 0) * num_dims + m * SUB_DIMS;
            const i64 list = centroids == nullptr ? 0 : (i64)list_no[n < num_rows ? n : 0] * num_dims + m * SUB_DIMS;
            Value raw[SUB_DIMS];
            load(raw, x + source);
#pragma unroll
            for (int s = 0; s < SUB_DIMS; ++s) row[r][s] = widen<KIND>(raw[s]);
            if (centroids != nullptr) {
                float centroid[SUB_DIMS];
                load(centroid, centroids + list);
#pragma unroll
                for (int s = 0; s < SUB_DIMS; ++s) row[r][s] = row[r][s] - centroid[s];
            }
            best[r] = second[r] = minus_infinity();
            place[r] = 0;
        }
#pragma unroll 2
        for (int k = 0; k < CODEWORDS; ++k) {
            float word[SUB_DIMS];
#pragma unroll
            for (int s = 0; s < SUB_DIMS; ++s) word[s] = codebook[k * SUB_DIMS + s];
            const float shift = shifts[k];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float score = shift;
#pragma unroll
                for (int s = 0; s < SUB_DIMS; ++s) score = fmaf(row[r][s], word[s], score);
                second[r] = fmaxf(second[r], fminf(best[r], score));
                if (score > best[r]) best[r] = score, place[r] = k;
            }
        }
        const float most = max_norms[m];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const i64 n = first_row + r * THREADS;
            float squares = 0.0f;
            bool finite = true;
#pragma unroll
            for (int s = 0; s < SUB_DIMS; ++s) {
                squares = fmaf(row[r][s], row[r][s], squares);
                finite = finite && is_finite(row[r][s]);
            }
            // kernels.assign.score_error of "l2", with room for the rounding of the bound itself.
            const float error = (SUB_DIMS + 4) * (1.02f * 5.9604645e-8f * (2.0f * sqrtf(squares) + most) * most + 1.1754944e-38f);
            if (n < num_rows) {
                if (!finite) atomicMin(found, (u64)n);
                else if (!is_finite(best[r])) atomicMin(found + 1, (u64)n);
                else if (!(best[r] - second[r] > 2.0f * error)) {  // also where the error is infinite
                    const i64 list = centroids == nullptr ? 0 : (i64)list_no[n] * num_dims + m * SUB_DIMS;
                    place[r] = nearest_in_float64(
                        x + n * num_dims + m * SUB_DIMS, centroids == nullptr ? nullptr : centroids + list, codebook);
                }
            }
            packed[r] |= (u32)place[r] << (g * NBITS);
        }
    }
    const int unit_bytes = GROUP * NBITS / 8;
    const int first_byte = first_quantizer * NBITS / 8;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const i64 n = first_row + r * THREADS;
        if (n >= num_rows) continue;
        u8* target = codes + n * code_size + first_byte;
        if (unit_bytes == 4 && code_size % 4 == 0) {
            *reinterpret_cast<u32*>(target) = packed[r];
        } else {
            for (int b = 0; b < unit_bytes && first_byte + b < code_size; ++b) target[b] = (u8)(packed[r] >> (8 * b));
        }
    }
}
"""


def pq_encode(residuals_ND: Any, codebooks_MKS: Any) -> Any:
    """As kernels.pq.pq_encode, for arrays on the device: CuPy uint8 [N, code_size], the same bytes."""
    return _encode(residuals_ND, None, None, codebooks_MKS)


def pq_encode_residuals(x_ND: Any, centroids_LD: Any, list_no_N: Any, codebooks_MKS: Any) -> Any:
    """pq_encode(x_ND - centroids_LD[list_no_N], codebooks_MKS) without the residuals in memory: the same bytes.

    x_ND: float32 or float16; centroids_LD: float32; list_no_N: int32, each in 0..L - 1. On the device.
    """
    return _encode(x_ND, centroids_LD, list_no_N, codebooks_MKS)


def _encode(x_ND: Any, centroids_LD: Any, list_no_N: Any, codebooks_MKS: Any) -> Any:
    import cupy

    x_ND, kind = float_matrix("residuals_ND" if centroids_LD is None else "x_ND", x_ND)
    codebooks_MKS = as_device("codebooks_MKS", codebooks_MKS)
    if codebooks_MKS.ndim != 3 or codebooks_MKS.shape[1] not in (16, 256) or codebooks_MKS.dtype != np.float32:
        raise ValueError(
            f"codebooks must be float32 [M, 16 or 256, D/M], got {codebooks_MKS.dtype} {codebooks_MKS.shape}"
        )
    M, num_codewords, sub_dims = codebooks_MKS.shape
    nbits = num_codewords.bit_length() - 1
    num_rows, num_dims = x_ND.shape
    check_same_dims("the rows", x_ND, "the codebooks", M * sub_dims)
    if centroids_LD is not None:
        centroids_LD, list_no_N = _checked_lists(centroids_LD, list_no_N, num_rows, num_dims)
    if not bool(cupy.isfinite(codebooks_MKS).all()):
        raise ValueError("codebooks must be finite, got a NaN or an infinity: train them again")
    codes = cupy.zeros((num_rows, code_size(M, nbits)), cupy.uint8)
    if num_rows == 0:
        return codes
    if sub_dims > MAX_SUB_DIMS:
        _encode_wide(x_ND, centroids_LD, list_no_N, codebooks_MKS, codes)
        return codes
    norms_MK = cupy.square(codebooks_MKS.astype(cupy.float64)).sum(axis=2)
    group, rows = group_and_rows(nbits, sub_dims)
    num_blocks = -(-num_rows // (THREADS * rows)) * -(-M // group)
    found = no_rows_found(2)
    starts = [int(array.data.ptr) for array in (x_ND, centroids_LD) if array is not None]
    aligned = all(start % 16 == 0 for start in starts) and num_dims * x_ND.itemsize % 16 == 0
    kernel(SOURCE, "pq_encode", options(kind, sub_dims, nbits, aligned))(
        (num_blocks,),
        (THREADS,),
        (
            *(x_ND, centroids_LD if centroids_LD is not None else np.intp(0)),
            *(list_no_N if list_no_N is not None else np.intp(0), codebooks_MKS * np.float32(2.0)),
            *((-norms_MK).astype(cupy.float32), cupy.sqrt(norms_MK.max(axis=1)).astype(cupy.float32)),
            *(np.int64(num_rows), np.int32(M), np.int32(codes.shape[1]), codes, found),
        ),
    )
    check_found(found, x_ND)
    return codes


def group_and_rows(nbits: int, sub_dims: int) -> tuple[int, int]:
    """(sub-quantizers of a block, rows of a thread): 4 bytes of code, and about 32 registers of sub-vectors."""
    assert (1 << nbits) * (sub_dims + 1) * 4 <= DEFAULT_SHARED_BYTES
    return 32 // nbits, 4 if sub_dims <= 8 else 2


def options(kind: int, sub_dims: int, nbits: int, aligned: bool) -> tuple[str, ...]:
    """What the source is compiled with."""
    group, rows = group_and_rows(nbits, sub_dims)
    named = {"KIND": kind, "SUB_DIMS": sub_dims, "NBITS": nbits, "GROUP": group, "ROWS": rows, "ALIGNED": int(aligned)}
    return tuple(f"-D{name}={value}" for name, value in named.items())


def _checked_lists(centroids_LD: Any, list_no_N: Any, num_rows: int, num_dims: int) -> tuple[Any, Any]:
    centroids_LD, kind = float_matrix("centroids_LD", centroids_LD)
    check_same_dims("centroids_LD", centroids_LD, "the rows", num_dims)
    list_no_N = as_device("list_no_N", list_no_N)
    if kind != FLOAT32 or list_no_N.dtype != np.int32 or list_no_N.shape != (num_rows,):
        raise ValueError(
            f"centroids must be float32 and list_no_N int32 [{num_rows}], got {centroids_LD.dtype}, {list_no_N.dtype}"
            f" {list_no_N.shape}"
        )
    least, most = (int(list_no_N.min()), int(list_no_N.max())) if num_rows else (0, 0)
    if num_rows and (least < 0 or most >= len(centroids_LD)):
        raise ValueError(f"list numbers must be in 0..{len(centroids_LD) - 1}, got {least} to {most}")
    return centroids_LD, list_no_N


def _encode_wide(x_ND: Any, centroids_LD: Any, list_no_N: Any, codebooks_MKS: Any, codes: Any) -> None:
    """Fills the codes by one assignment for each sub-quantizer."""
    import cupy

    M, num_codewords, sub_dims = codebooks_MKS.shape
    for start in range(0, len(x_ND), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        block_BD = x_ND[rows]
        if centroids_LD is not None:
            block_BD = block_BD.astype(cupy.float32) - centroids_LD[list_no_N[rows]]
        for m in range(M):
            sub_BS = cupy.ascontiguousarray(block_BD[:, m * sub_dims : (m + 1) * sub_dims])
            try:
                nearest_B = assign_nearest(sub_BS, codebooks_MKS[m], metric="l2").astype(cupy.uint8)
            except ValueError as error:
                raise ValueError(f"sub-quantizer {m}, rows from {start}: {error}") from error
            if num_codewords == 256:
                codes[rows, m] = nearest_B
            else:
                codes[rows, m // 2] |= nearest_B << np.uint8(4 * (m % 2))
