"""Sums of the clusters' rows on a CUDA device, with the bits of kernels.kmeans.partial_sums.

Shapes: N rows, K clusters, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.cuda.arrays import as_device, float_matrix
from kernels.cuda.compile import kernel

THREADS = 128

# A block has a cluster and 128 dimensions, and adds the cluster's rows one after the other: no atomics, one order.
SOURCE = r"""
typedef typename Element<KIND>::type Value;

extern "C" __global__ void __launch_bounds__(128) cluster_sums(
    const Value* __restrict__ rows, const i64* __restrict__ by_cluster, const i64* __restrict__ starts, int num_dims,
    double* __restrict__ sums) {
    const int d = blockIdx.y * 128 + threadIdx.x;
    if (d >= num_dims) return;
    const i64 cluster = blockIdx.x, end = starts[cluster + 1];
    double sum = 0.0;
    i64 i = starts[cluster];
    for (; i + 4 <= end; i += 4) {
        Value values[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) values[u] = rows[by_cluster[i + u] * num_dims + d];
#pragma unroll
        for (int u = 0; u < 4; ++u) sum += (double)widen<KIND>(values[u]);
    }
    for (; i < end; ++i) sum += (double)widen<KIND>(rows[by_cluster[i] * num_dims + d]);
    sums[cluster * num_dims + d] = sum;
}
"""


def partial_sums(rows_ND: Any, list_no_N: Any, num_centroids: int) -> tuple[Any, Any]:
    """As kernels.kmeans.partial_sums, for arrays on the device: CuPy float64 [K, D] and int64 [K], the same bits.

    rows_ND: float32 or float16; list_no_N: int32, each in 0..K - 1. Rows are added in their order.
    """
    import cupy

    rows_ND, kind = float_matrix("rows_ND", rows_ND)
    list_no_N = as_device("list_no_N", list_no_N)
    num_rows, num_dims = rows_ND.shape
    if list_no_N.shape != (num_rows,) or list_no_N.dtype != np.int32:
        raise ValueError(f"list_no_N must be int32 [{num_rows}], got {list_no_N.dtype} {list_no_N.shape}")
    sums_KD = cupy.zeros((num_centroids, num_dims), cupy.float64)
    if num_rows == 0 or num_centroids == 0:
        return sums_KD, cupy.zeros(num_centroids, cupy.int64)
    least, most = int(list_no_N.min()), int(list_no_N.max())
    if least < 0 or most >= num_centroids:
        raise ValueError(f"list numbers must be in 0..{num_centroids - 1}, got {least} to {most}")
    counts_K = cupy.bincount(list_no_N, minlength=num_centroids).astype(cupy.int64)
    # One key orders by cluster, then by row: no need of a stable sort.
    by_cluster = cupy.sort((list_no_N.astype(cupy.int64) << 32) | cupy.arange(num_rows, dtype=cupy.int64)) & 0xFFFFFFFF
    starts = cupy.zeros(num_centroids + 1, cupy.int64)
    starts[1:] = cupy.cumsum(counts_K)
    kernel(SOURCE, "cluster_sums", (f"-DKIND={kind}",))(
        (num_centroids, -(-num_dims // THREADS)),
        (THREADS,),
        (rows_ND, by_cluster, starts, np.int32(num_dims), sums_KD),
    )
    return sums_KD, counts_K
