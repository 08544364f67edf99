"""The pieces of assignment on the device beside the matrix product: rows prepared for it, its tiles of scores merged into
each row's best, and the few best of a row scored again in float32.

Shapes: N rows, B rows of a block, K centroids, C columns of a tile, D dimensions, E = D rounded up.

A *class* of centroids is those of equal number modulo 8. The approximate modes keep the best of each class: eight
candidates of a row, which a tensor core's epilogue has at no cost, as each of its threads sees two classes of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.cuda.compile import kernel

NUM_CLASSES = 8
WARPS = 8  # of a block; a warp has one row
# Layouts of prepared rows (`prepare`): the same numbers as in the source.
NORMS_ONLY, FLOAT32_ROWS, BFLOAT16_ROWS, BFLOAT16_TILES = range(4)

SOURCE = r"""
#define FLOAT32_ROWS 1
#define BFLOAT16_ROWS 2
#define BFLOAT16_TILES 3
#define FULL 0xffffffffu

__device__ __forceinline__ float element(const void* x, int kind, i64 index) {
    if (kind == FLOAT32) return static_cast<const float*>(x)[index];
    const u16 bits = static_cast<const u16*>(x)[index];
    return kind == FLOAT16 ? half_to_float(bits) : bfloat_to_float(bits);
}

// A warp a row: its norm, a check that it is finite, and a copy in the wanted layout, with zeros from D to E and in the
// rows from num_rows to the grid's end. Tiles: tile_rows x 64 columns lie together, 128 bytes a row, and the 16-byte unit
// u of row r is at place u ^ (r % 8): the order in which tensor cores read shared memory without bank conflicts
// (PTX ISA, "128B swizzle"), so that a tile can be brought there by one plain copy.
extern "C" __global__ void __launch_bounds__(256) prepare_rows(
    const void* __restrict__ x, int kind, i64 first_row, i64 num_rows, i64 num_written, int num_dims, int num_padded,
    int layout, int tile_rows, void* __restrict__ out, float* __restrict__ norms, u64* __restrict__ found) {
    const i64 row = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= num_written) return;
    const bool real = row < num_rows;
    const i64 base = (first_row + row) * num_dims;
    float squares = 0.0f;
    bool finite = true;
    for (int unit = lane; unit < num_padded / 8; unit += 32) {
        float values[8];
        const int column = unit * 8;
        if (real && kind == FLOAT32 && num_dims % 8 == 0 && reinterpret_cast<u64>(x) % 16 == 0) {
            const float4* source = reinterpret_cast<const float4*>(static_cast<const float*>(x) + base + column);
            const float4 low = column < num_dims ? source[0] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            const float4 high = column < num_dims ? source[1] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
            values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                values[i] = real && column + i < num_dims ? element(x, kind, base + column + i) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            squares = fmaf(values[i], values[i], squares);
            finite = finite && is_finite(values[i]);
        }
        if (layout == FLOAT32_ROWS) {
            float* target = static_cast<float*>(out) + row * num_padded + column;
#pragma unroll
            for (int i = 0; i < 8; ++i) target[i] = values[i];
        } else if (layout >= BFLOAT16_ROWS) {
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                pairs[i] = float_to_bfloat(values[2 * i]) | ((u32)float_to_bfloat(values[2 * i + 1]) << 16);
            i64 place = row * (num_padded / 8) + unit;
            if (layout == BFLOAT16_TILES) {
                const i64 tile = row / tile_rows;
                const int r = (int)(row % tile_rows);
                place = ((tile * (num_padded / 64) + unit / 8) * tile_rows + r) * 8 + ((unit % 8) ^ (r % 8));
            }
            static_cast<uint4*>(out)[place] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(FULL, squares, step);
    finite = __all_sync(FULL, finite);
    if (lane == 0 && real) {
        norms[row] = sqrtf(squares);
        if (!finite) atomicMin(found, (u64)(first_row + row));
    }
}

// A warp a row: merges a tile of scores [num_rows, num_columns] into the best score, the second best and the column of
// the best; ties go to the lowest column, a NaN is never the best.
extern "C" __global__ void __launch_bounds__(256) merge_best_two(
    const float* __restrict__ scores, const float* __restrict__ bias, int num_rows, int num_columns, int first_column,
    float* __restrict__ best, float* __restrict__ second, int* __restrict__ column) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= num_rows) return;
    const float* mine = scores + (i64)row * num_columns;
    float first_score = minus_infinity(), second_score = minus_infinity();
    int place = 0x7fffffff;
    for (int c = lane; c < num_columns; c += 32) {
        const float score = mine[c] + bias[c];
        second_score = fmaxf(second_score, fminf(first_score, score));
        if (score > first_score) first_score = score, place = first_column + c;
    }
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(FULL, first_score, step);
        const float other_second = __shfl_xor_sync(FULL, second_score, step);
        const int other_place = __shfl_xor_sync(FULL, place, step);
        second_score = fmaxf(fmaxf(second_score, other_second), fminf(first_score, other));
        if (other > first_score || (other == first_score && other_place < place)) first_score = other, place = other_place;
    }
    if (lane == 0) {
        const float before = best[row];
        second[row] = fmaxf(fmaxf(second[row], second_score), fminf(before, first_score));
        if (first_score > before) best[row] = first_score, column[row] = place;
    }
}

// A warp a row: merges a tile of scores into the best of each class [num_rows, 8]. num_columns and first_column are
// multiples of 8; ties go to the lowest column, a NaN is never the best.
extern "C" __global__ void __launch_bounds__(256) merge_classes(
    const float* __restrict__ scores, const float* __restrict__ bias, int num_rows, int num_columns, int first_column,
    float* __restrict__ best, int* __restrict__ column) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= num_rows) return;
    const float4* mine = reinterpret_cast<const float4*>(scores + (i64)row * num_columns);
    const float4* shift = reinterpret_cast<const float4*>(bias);
    float top[4];
    int place[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i] = minus_infinity(), place[i] = 0x7fffffff;
#pragma unroll 8
    for (int unit = lane; unit < num_columns / 4; unit += 32) {
        const float4 score = mine[unit], plus = shift[unit];
        const float sums[4] = {score.x + plus.x, score.y + plus.y, score.z + plus.z, score.w + plus.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (sums[i] > top[i]) top[i] = sums[i], place[i] = first_column + unit * 4 + i;
    }
    // Lanes of equal parity saw the same four classes.
    for (int step = 16; step > 1; step /= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float other = __shfl_xor_sync(FULL, top[i], step);
            const int other_place = __shfl_xor_sync(FULL, place[i], step);
            if (other > top[i] || (other == top[i] && other_place < place[i])) top[i] = other, place[i] = other_place;
        }
    }
    if (lane < 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const i64 slot = (i64)row * 8 + lane * 4 + i;
            if (top[i] > best[slot]) best[slot] = top[i], column[slot] = place[i];
        }
    }
}

// A warp a row: the candidates that may be the best, given the error of their scores, scored again in float32 in a fixed
// order; the best of them, ties to the lowest column. scale and bias as in kernels.assign.prepare_centroids; error =
// norm * slope + offset bounds the error of a candidate's score.
extern "C" __global__ void __launch_bounds__(256) rescore_classes(
    const void* __restrict__ x, int kind, i64 first_row, i64 num_rows, int num_dims,
    const float* __restrict__ centroids, float scale, const float* __restrict__ bias, const float* __restrict__ norms,
    float slope, float offset, const float* __restrict__ best, const int* __restrict__ column,
    int* __restrict__ list_no, u64* __restrict__ found) {
    const i64 row = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= num_rows) return;
    float top = minus_infinity();
    for (int i = 0; i < 8; ++i) top = fmaxf(top, best[row * 8 + i]);
    const float least = top - 2.0f * (norms[row] * slope + offset);
    float winner = minus_infinity();
    int place = 0x7fffffff;
    for (int i = 0; i < 8; ++i) {
        const float score = best[row * 8 + i];
        // Also where `least` is a NaN; a class without a centroid has -infinity.
        if (score < least || !(score > minus_infinity())) continue;
        const int candidate = column[row * 8 + i];
        const float* centroid = centroids + (i64)candidate * num_dims;
        float sum = 0.0f;
        for (int d = lane; d < num_dims; d += 32)
            sum = fmaf(element(x, kind, (first_row + row) * num_dims + d), centroid[d], sum);
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(FULL, sum, step);
        const float exact = scale * sum + bias[candidate];
        if (exact > winner || (exact == winner && candidate < place)) winner = exact, place = candidate;
    }
    if (lane == 0) {
        list_no[first_row + row] = place;
        if (!is_finite(winner)) atomicMin(found + 1, (u64)(first_row + row));
    }
}
"""


def blocks_of(num_rows: int) -> tuple[int]:
    return (-(-num_rows // WARPS),)


def prepare_rows(
    x_ND: Any,
    kind: int,
    first_row: int,
    num_rows: int,
    *,
    layout: int,
    out_BE: Any,
    norms_B: Any,
    found: Any,
    num_padded: int,
    num_written: int | None = None,
    tile_rows: int = 1,
) -> None:
    """Fills out_BE with rows first_row .. + num_rows in a layout, and with zero rows up to `num_written`; and norms_B."""
    num_written = num_rows if num_written is None else num_written
    kernel(SOURCE, "prepare_rows")(
        blocks_of(num_written),
        (32 * WARPS,),
        (
            *(x_ND, np.int32(kind), np.int64(first_row), np.int64(num_rows), np.int64(num_written)),
            *(np.int32(x_ND.shape[1]), np.int32(num_padded), np.int32(layout), np.int32(tile_rows)),
            *(out_BE, norms_B, found),
        ),
    )


def merge_best_two(scores_BC: Any, bias_C: Any, first_column: int, best_B: Any, second_B: Any, column_B: Any) -> None:
    """Merges a tile of scores, float32, into each row's best score, second best score and column of the best."""
    num_rows, num_columns = scores_BC.shape
    kernel(SOURCE, "merge_best_two")(
        blocks_of(num_rows),
        (32 * WARPS,),
        (
            *(scores_BC, bias_C, np.int32(num_rows), np.int32(num_columns), np.int32(first_column)),
            *(best_B, second_B, column_B),
        ),
    )


def merge_classes(scores_BC: Any, bias_C: Any, first_column: int, best_B8: Any, column_B8: Any) -> None:
    """Merges a tile of scores, float32, into the best score of each class and its column."""
    num_rows, num_columns = scores_BC.shape
    kernel(SOURCE, "merge_classes")(
        blocks_of(num_rows),
        (32 * WARPS,),
        (
            *(scores_BC, bias_C, np.int32(num_rows), np.int32(num_columns), np.int32(first_column)),
            *(best_B8, column_B8),
        ),
    )


def rescore_classes(
    x_ND: Any,
    kind: int,
    first_row: int,
    num_rows: int,
    centroids_KD: Any,
    scale: float,
    bias_K: Any,
    norms_B: Any,
    slope: float,
    offset: float,
    best_B8: Any,
    column_B8: Any,
    list_no_N: Any,
    found: Any,
) -> None:
    """Fills list_no_N[first_row : + num_rows] with the best candidate of each row in float32."""
    kernel(SOURCE, "rescore_classes")(
        blocks_of(num_rows),
        (32 * WARPS,),
        (
            *(x_ND, np.int32(kind), np.int64(first_row), np.int64(num_rows), np.int32(x_ND.shape[1])),
            *(centroids_KD, np.float32(scale), bias_K, norms_B, np.float32(slope), np.float32(offset)),
            *(best_B8, column_B8, list_no_N, found),
        ),
    )
