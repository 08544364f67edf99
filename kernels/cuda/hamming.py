"""Hamming distances of packed bits on a CUDA device.

Shapes: Q queries, N rows, B bytes of a row, W words of 32 bits (the bytes beyond B are zeros).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.cuda.arrays import as_device
from kernels.cuda.compile import kernel

THREADS = 128
QUERIES = 16

# A thread has a row and counts its bits against the block's 16 queries, 8 words at a time: the row's words stay in
# registers, the queries' come from shared memory, the same word for all threads.
SOURCE = r"""
#define QUERIES 16
#define WORDS 8
#define THREADS 128

extern "C" __global__ void __launch_bounds__(128) hamming_distances(
    const u32* __restrict__ queries, const u32* __restrict__ rows, int num_queries, i64 num_rows, int num_words,
    int* __restrict__ distances) {
    __shared__ u32 tile[QUERIES][WORDS];
    const i64 row = (i64)blockIdx.x * THREADS + threadIdx.x;
    const int first_query = blockIdx.y * QUERIES;
    int counts[QUERIES];
#pragma unroll
    for (int q = 0; q < QUERIES; ++q) counts[q] = 0;
    for (int first = 0; first < num_words; first += WORDS) {
        __syncthreads();
        // 128 threads, 16 x 8 words: one each.
        const int q = threadIdx.x / WORDS, w = threadIdx.x % WORDS;
        const bool is_word = first_query + q < num_queries && first + w < num_words;
        tile[q][w] = is_word ? queries[(i64)(first_query + q) * num_words + first + w] : 0u;
        __syncthreads();
        u32 mine[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; ++i)
            mine[i] = row < num_rows && first + i < num_words ? rows[row * num_words + first + i] : 0u;
#pragma unroll
        for (int other = 0; other < QUERIES; ++other) {
#pragma unroll
            for (int i = 0; i < WORDS; ++i) counts[other] += __popc(mine[i] ^ tile[other][i]);
        }
    }
    if (row < num_rows) {
#pragma unroll
        for (int other = 0; other < QUERIES; ++other)
            if (first_query + other < num_queries) distances[(first_query + other) * num_rows + row] = counts[other];
    }
}
"""


def hamming_distances(q_QB: Any, x_NB: Any) -> Any:
    """As kernels.hamming.hamming_distances, for arrays on the device: CuPy int32 [Q, N]."""
    import cupy

    q_QB, x_NB = as_device("q_QB", q_QB), as_device("x_NB", x_NB)
    for name, bits in (("q_QB", q_QB), ("x_NB", x_NB)):
        if bits.ndim != 2 or bits.shape[1] == 0 or bits.dtype != np.uint8:
            raise ValueError(f"{name} must be a uint8 matrix with B >= 1, got {bits.dtype} {bits.shape}")
    if q_QB.shape[1] != x_NB.shape[1]:
        raise ValueError(f"q_QB must have the B of x_NB ({x_NB.shape[1]}), got {q_QB.shape[1]}")
    distances_QN = cupy.empty((len(q_QB), len(x_NB)), cupy.int32)
    if distances_QN.size == 0:
        return distances_QN
    q_QW, x_NW = _words(q_QB), _words(x_NB)
    launch = kernel(SOURCE, "hamming_distances")
    # A grid has at most 65535 blocks along its second axis.
    for start in range(0, len(q_QW), 65535 * QUERIES):
        block_QW = q_QW[start : start + 65535 * QUERIES]
        launch(
            (-(-len(x_NW) // THREADS), -(-len(block_QW) // QUERIES)),
            (THREADS,),
            (
                *(block_QW, x_NW, np.int32(len(block_QW)), np.int64(len(x_NW)), np.int32(x_NW.shape[1])),
                distances_QN[start : start + len(block_QW)],
            ),
        )
    return distances_QN


def _words(x_NB: Any) -> Any:
    """uint32 [N, W]: the same memory where B and the address are multiples of 4."""
    import cupy

    num_rows, num_bytes = x_NB.shape
    if num_bytes % 4 == 0 and x_NB.data.ptr % 4 == 0:
        return x_NB.view(cupy.uint32)
    padded = cupy.zeros((num_rows, -(-num_bytes // 4) * 4), cupy.uint8)
    padded[:, :num_bytes] = x_NB
    return padded.view(cupy.uint32)
