"""One vector of every segment of packed token states, on a CUDA device: one kernel from the states to the packed vector.

Shapes: T tokens of all segments one behind the other, S segments, D dimensions (kept ones after truncation), B bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.cuda.arrays import BFLOAT16, FLOAT16, FLOAT32, NOT_FOUND, as_device, float_matrix, no_rows_found
from kernels.cuda.compile import DEFAULT_SHARED_BYTES, kernel
from kernels.pool import DTYPES, MODES, check_segments

THREADS = 256
MAX_DIMS = DEFAULT_SHARED_BYTES // 4 - 64

# A block for each segment. Its threads are groups of `lanes` that lie along a row, VECTOR elements (16 bytes) each;
# group g takes tokens g, g + groups, ... Their sums meet in shared memory and are added in the order of the groups, so
# the order of all additions depends on D and the segment's length alone.
SOURCE = r"""
#if VECTOR == 1
typedef typename Element<KIND>::type Raw;
#else
typedef uint4 Raw;
#endif
typedef typename Element<KIND>::type State;

#define MODE_CLS 1
#define MODE_MAX 2
#define MODE_LAST 3
#define MODE_MEAN_SQRT 4
#define MODE_WEIGHTED 5
#define OUT_FLOAT16 1
#define OUT_INT8 2
#define OUT_BINARY 3

// As a maximum that a NaN wins.
__device__ __forceinline__ float larger(float a, float b) { return (b > a || b != b) ? b : a; }

__device__ __forceinline__ void take(float (&sum)[VECTOR], Raw raw, float weight, bool is_max) {
    const State* states = reinterpret_cast<const State*>(&raw);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        const float value = widen<KIND>(states[i]);
        sum[i] = is_max ? larger(sum[i], value) : fmaf(weight, value, sum[i]);
    }
}

extern "C" __global__ void __launch_bounds__(256, 4) pool_normalize(
    const State* __restrict__ states, const i64* __restrict__ offsets, i64 num_tokens, int row_elements, int num_dims,
    int lanes, int groups, int mode, int normalize, int out_kind, void* __restrict__ out, float* __restrict__ scales,
    u64* __restrict__ found) {
    extern __shared__ __align__(16) float partial[];
    __shared__ double warp_squares[8];
    __shared__ float warp_largest[8];
    const i64 segment = blockIdx.x;
    const i64 start = offsets[segment], end = offsets[segment + 1];
    // found[0]: the first segment with wrong offsets; found[1]: with a vector that is not finite.
    if (start < 0 || end > num_tokens || end <= start || (segment == 0 && start != 0) ||
        (segment == gridDim.x - 1 && end != num_tokens)) {
        if (threadIdx.x == 0) atomicMin(found, (u64)segment);
        return;
    }
    const int num_vectors = (num_dims + VECTOR - 1) / VECTOR;
    const int padded = num_vectors * VECTOR;
    const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
    const bool is_max = mode == MODE_MAX, weighted = mode == MODE_WEIGHTED;
    const i64 first = mode == MODE_LAST ? end - 1 : start;
    const i64 last = mode == MODE_CLS ? start + 1 : end;
    for (int v = lane; v < num_vectors && group < groups; v += lanes) {
        const State* column = states + v * VECTOR;
        float sum[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[i] = is_max ? minus_infinity() : 0.0f;
        i64 t = first + group;
        // Four loads in flight before the first is used.
        for (; t + 3 * groups < last; t += 4 * groups) {
            Raw raw[4];
#pragma unroll
            for (int u = 0; u < 4; ++u)
                raw[u] = *reinterpret_cast<const Raw*>(column + (t + u * groups) * row_elements);
#pragma unroll
            for (int u = 0; u < 4; ++u)
                take(sum, raw[u], weighted ? (float)(t + u * groups - start + 1) : 1.0f, is_max);
        }
        for (; t < last; t += groups) {
            const Raw raw = *reinterpret_cast<const Raw*>(column + t * row_elements);
            take(sum, raw, weighted ? (float)(t - start + 1) : 1.0f, is_max);
        }
        float* mine = partial + group * padded + v * VECTOR;
#if VECTOR == 1
        mine[0] = sum[0];
#else
#pragma unroll
        for (int i = 0; i < VECTOR; i += 4)
            *reinterpret_cast<float4*>(mine + i) = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
#endif
    }
    __syncthreads();

    const double length = (double)(end - start);
    float divisor = 1.0f;
    if (mode == MODE_MEAN_SQRT) divisor = (float)sqrt(length);
    else if (weighted) divisor = (float)(length * (length + 1.0) / 2.0);
    else if (mode == 0) divisor = (float)length;
    // Squares in float64: a vector within float32 may have a norm beyond it.
    double squares = 0.0;
    for (int d = threadIdx.x; d < num_dims; d += blockDim.x) {
        float value = partial[d];
        for (int g = 1; g < groups; ++g) {
            const float other = partial[g * padded + d];
            value = is_max ? larger(value, other) : value + other;
        }
        value /= divisor;
        partial[d] = value;
        squares += (double)value * (double)value;
    }
    const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    double norm = 0.0;
    if (normalize) {
        for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
        if (threadIdx.x % 32 == 0) warp_squares[warp] = squares;
        __syncthreads();
        for (int w = 0; w < num_warps; ++w) norm += warp_squares[w];
        norm = sqrt(norm);
    }
    const bool in_float32 = norm > 1e-30 && norm < 1e30;
    bool finite = true;
    float largest = 0.0f;
    for (int d = threadIdx.x; d < num_dims; d += blockDim.x) {
        float value = partial[d];
        // Not `norm > 0`: a NaN must come through.
        if (normalize && norm != 0.0) value = in_float32 ? value / (float)norm : (float)((double)value / norm);
        partial[d] = value;
        finite = finite && is_finite(value);
        largest = fmaxf(largest, fabsf(value));
        if (out_kind == FLOAT32) {
            static_cast<float*>(out)[segment * num_dims + d] = value;
        } else if (out_kind == OUT_FLOAT16) {
            const u16 bits = float_to_half(value);
            finite = finite && (bits & 0x7c00) != 0x7c00;
            static_cast<u16*>(out)[segment * num_dims + d] = bits;
        }
    }
    if (!finite) atomicMin(found + 1, (u64)segment);
    if (out_kind == OUT_INT8) {
        for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        if (threadIdx.x % 32 == 0) warp_largest[warp] = largest;
        __syncthreads();
        for (int w = 0; w < num_warps; ++w) largest = fmaxf(largest, warp_largest[w]);
        const float scale = largest / 127.0f;
        for (int d = threadIdx.x; d < num_dims; d += blockDim.x)
            static_cast<signed char*>(out)[segment * num_dims + d] =
                scale > 0.0f ? (signed char)rintf(partial[d] / largest * 127.0f) : (signed char)0;
        if (threadIdx.x == 0) scales[segment] = scale;
    } else if (out_kind == OUT_BINARY) {
        __syncthreads();
        const int num_bytes = (num_dims + 7) / 8;
        for (int b = threadIdx.x; b < num_bytes; b += blockDim.x) {
            u32 bits = 0;
            for (int i = 0; i < 8; ++i) bits = bits * 2 + (8 * b + i < num_dims && partial[8 * b + i] > 0.0f);
            static_cast<u8*>(out)[segment * num_bytes + b] = (u8)bits;
        }
    }
}
"""


def pool_normalize(
    states_TD: Any,
    offsets: Any,
    *,
    mode: str,
    normalize: bool = True,
    truncate_dim: int | None = None,
    dtype: str = "float32",
) -> Any:
    """As kernels.pool.pool_normalize, for arrays on the device: CuPy arrays [S, D], or (codes, scales) for "int8".

    states_TD: float32, float16 or bfloat16 (a tensor, or its bits as uint16). offsets: int64 [S + 1], on the device or
    the host; on the device they are checked by the kernel itself. Sums in float32 in a fixed order, norms in float64.
    """
    import cupy

    states_TD, kind = float_matrix("states_TD", states_TD, bfloat16=True)
    num_tokens, row_elements = states_TD.shape
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if truncate_dim is not None and not 1 <= truncate_dim <= row_elements:
        raise ValueError(f"truncate_dim must be in 1..D ({row_elements}), got {truncate_dim}")
    num_dims = row_elements if truncate_dim is None else truncate_dim
    if num_dims > MAX_DIMS:
        raise ValueError(f"D must be at most {MAX_DIMS} on the device, got {num_dims}: pool on the host")
    on_host = not hasattr(offsets, "__cuda_array_interface__")
    if on_host:
        check_segments(offsets, num_tokens)
    offsets = cupy.asarray(offsets) if on_host else as_device("offsets", offsets)
    if offsets.ndim != 1 or len(offsets) == 0 or offsets.dtype != np.int64:
        raise ValueError(f"offsets must be int64 [S + 1], got {offsets.dtype} {offsets.shape}")
    num_segments = len(offsets) - 1
    columns = (num_dims + 7) // 8 if dtype == "binary" else num_dims
    out_dtype = {"binary": "uint8"}.get(dtype, dtype)
    out_SD = cupy.empty((num_segments, columns), out_dtype)
    scales_S = cupy.empty(num_segments if dtype == "int8" else 0, cupy.float32)
    if num_segments == 0:
        check_segments(cupy.asnumpy(offsets), num_tokens)
    else:
        vector, lanes, groups, threads, shared = launch_shape(
            kind, row_elements, num_dims, int(states_TD.data.ptr), mode in ("cls", "last")
        )
        found = no_rows_found(2)
        kernel(SOURCE, "pool_normalize", (f"-DKIND={kind}", f"-DVECTOR={vector}"))(
            (num_segments,),
            (threads,),
            (
                *(states_TD, offsets, np.int64(num_tokens), np.int32(row_elements), np.int32(num_dims)),
                *(np.int32(lanes), np.int32(groups), np.int32(MODES_ON_DEVICE.index(mode)), np.int32(normalize)),
                *(np.int32(DTYPES_ON_DEVICE.index(dtype)), out_SD, scales_S, found),
            ),
            shared_mem=shared,
        )
        wrong, bad = (int(value) for value in found.get())
        if wrong != NOT_FOUND:
            check_segments(cupy.asnumpy(offsets), num_tokens)
        if bad != NOT_FOUND:
            raise ValueError(f"vectors must be finite: that of segment {bad} is not, in {dtype}")
    return (out_SD, scales_S) if dtype == "int8" else out_SD


# In the order of the source's MODE_ and OUT_ numbers.
MODES_ON_DEVICE = ("mean", "cls", "max", "last", "mean_sqrt_len", "weighted_mean")
DTYPES_ON_DEVICE = ("float32", "float16", "int8", "binary")


def launch_shape(
    kind: int, row_elements: int, num_dims: int, address: int, one_token: bool
) -> tuple[int, int, int, int, int]:
    """(VECTOR, lanes, groups, threads, bytes of shared memory) of a launch; depends on neither tokens nor segments."""
    item_bytes = {FLOAT32: 4, FLOAT16: 2, BFLOAT16: 2}[kind]
    vector = 16 // item_bytes if address % 16 == 0 and row_elements * item_bytes % 16 == 0 else 1
    num_vectors = -(-num_dims // vector)
    lanes = min(num_vectors, THREADS)
    row_bytes = num_vectors * vector * 4
    groups = 1 if one_token else max(1, min(THREADS // lanes, (DEFAULT_SHARED_BYTES - 256) // row_bytes))
    return vector, lanes, groups, -(-lanes * groups // 32) * 32, groups * row_bytes
