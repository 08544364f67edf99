"""The k best scores of every query on a CUDA device.

Shapes: Q queries, N scores, k results.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.cuda.arrays import as_device


def topk(scores_QN: Any, k: int) -> tuple[Any, Any]:
    """As kernels.topk.topk, for an array on the device: CuPy float32 [Q, k] and int64 [Q, k], the same bits.

    Holds two int64 of every score. torch.topk selects: cupy 14 sorts all of a row for its partition.
    """
    import cupy
    import torch

    scores_QN = as_device("scores_QN", scores_QN)
    if scores_QN.ndim != 2 or scores_QN.dtype != np.float32:
        raise ValueError(f"scores_QN must be a float32 matrix, got {scores_QN.dtype} {scores_QN.shape}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    num_queries, num_scores = scores_QN.shape
    nan_Q = cupy.isnan(scores_QN).any(axis=1).get()
    if nan_Q.any():
        raise ValueError(f"scores must be numbers: query {int(np.argmax(nan_Q))} has a NaN")
    kept = min(k, num_scores)
    top_scores = cupy.full((num_queries, k), -np.inf, cupy.float32)
    top_index = cupy.full((num_queries, k), -1, cupy.int64)
    if kept == 0 or num_queries == 0:
        return top_scores, top_index
    # The key of kernels.topk.topk: score, then lowest index. No two are equal, so what is selected is determined.
    bits = (scores_QN + np.float32(0.0)).view(cupy.int32).astype(cupy.int64)  # adding 0 turns -0.0 into 0.0
    bits = cupy.where(bits < 0, -0x80000000 - bits, bits)
    keys = (bits << 32) | (0xFFFFFFFF - cupy.arange(num_scores, dtype=cupy.int64))
    # DLPack makes each library's stream wait for the other's.
    best, _ = torch.topk(torch.from_dlpack(keys), kept, dim=1, sorted=True)
    top_index[:, :kept] = 0xFFFFFFFF - (cupy.from_dlpack(best) & 0xFFFFFFFF)
    top_scores[:, :kept] = cupy.take_along_axis(scores_QN, top_index[:, :kept], axis=1)
    return top_scores, top_index
