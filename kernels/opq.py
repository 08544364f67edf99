"""Rotation that makes rows cheaper to quantize by a product quantizer (OPQ).

Shapes: N rows, D dimensions, M sub-quantizers of K = 2^nbits codewords and S = D / M dimensions each.

The non-parametric solution of Ge, He, Ke and Sun, Optimized Product Quantization for Approximate Nearest Neighbor Search
(CVPR 2013), section 3.1, from the parametric one of section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.blocks import check_finite, check_matrix
from kernels.kmeans import _rng
from kernels.pq import check_quantizer, pq_train
from kernels.pq_codewords import lloyd_step
from kernels.threads import run_blocks

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

# Rows that are used: a seeded choice where there are more (faiss's OPQMatrix::max_train_points).
MAX_ROWS = 65536
# Rows of one product: fixed, so that the sum of the products does not depend on the number of threads.
BLOCK_ROWS = 4096
# Stream of random numbers of the choice of rows, apart from those of kernels.kmeans and kernels.pq.
_ROWS_STREAM = 1 << 43


def opq_train(x_ND: npt.NDArray[Any], M: int, nbits: int, *, seed: int, iterations: int = 10) -> Float32Array:
    """Rotation R float32 [D, D], orthogonal: x_ND @ R.T is what pq_train and pq_encode then take.

    R is the matrix `A` of a faiss.OPQMatrix (a LinearTransform without bias). x_ND: float32 or float16 on the host.
    An iteration moves the codebooks once and then the rotation. The same bits for the same rows and seed with any
    number of threads; another processor may give other last bits. The identity where N is at most K, when codewords are
    the rows whatever the rotation. ValueError as pq_train.
    """
    check_matrix("x_ND", x_ND)
    check_finite("row", x_ND)
    num_rows, num_dims = x_ND.shape
    check_quantizer(num_dims, M, nbits)
    if num_rows == 0:
        raise ValueError("a rotation needs at least one row, got 0: is the training sample empty?")
    for name, value in (("iterations", iterations), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if num_rows <= 1 << nbits:
        return np.eye(num_dims, dtype=np.float32)
    rows = np.sort(_rng(seed, _ROWS_STREAM).permutation(num_rows)[:MAX_ROWS])
    rows_ND = x_ND[rows].astype(np.float32)
    rotation_DD = _spread_variance(rows_ND, M)
    rotated_ND = _rotated(rows_ND, rotation_DD)
    codebooks_MKS = pq_train(rotated_ND, M, nbits, seed=seed)
    for iteration in range(1, iterations + 1):
        codebooks_MKS, decoded_ND = _moved(rotated_ND, codebooks_MKS, seed, iteration)
        rotation_DD = _nearest_rotation(decoded_ND, rows_ND)
        rotated_ND = _rotated(rows_ND, rotation_DD)
    return rotation_DD.astype(np.float32)


def _spread_variance(rows_ND: Float32Array, M: int) -> Float64Array:
    """The rows' principal axes, dealt to the sub-quantizers such that the products of the variances are about equal.

    Section 3.2 of the paper: the axes from the largest variance down, each to the sub-quantizer with the smallest
    product among those that have room.
    """
    num_rows, num_dims = rows_ND.shape
    mean_D = rows_ND.mean(axis=0, dtype=np.float64)
    covariance_DD = _cross_product(rows_ND, rows_ND) / num_rows - np.outer(mean_D, mean_D)
    variance_D, axes_DD = _on_one_thread(lambda: torch.linalg.eigh(torch.from_numpy(covariance_DD)))
    # Not below rounding of the largest, where a variance of zero may come out negative.
    log_D = np.log(np.maximum(variance_D.numpy(), max(float(variance_D[-1]), 1e-300) * 1e-12))
    log_D -= log_D[0]  # so that taking an axis never makes a product smaller
    chosen: list[list[int]] = [[] for _ in range(M)]
    total_M = np.zeros(M)
    for axis in range(num_dims - 1, -1, -1):
        m = int(np.argmin(total_M))
        chosen[m].append(axis)
        total_M[m] = total_M[m] + log_D[axis] if len(chosen[m]) < num_dims // M else np.inf
    return np.ascontiguousarray(axes_DD.numpy().T[np.concatenate(chosen)])


def _moved(
    rotated_ND: Float32Array, codebooks_MKS: Float32Array, seed: int, iteration: int
) -> tuple[Float32Array, Float32Array]:
    """Codebooks moved to the means of their rows, and the rows decoded from them, float32 [N, D]."""
    M, _, sub_dims = codebooks_MKS.shape
    decoded_ND = np.empty_like(rotated_ND)

    def move_one(m: int) -> Float32Array:
        columns = slice(m * sub_dims, (m + 1) * sub_dims)
        rows_NS = np.ascontiguousarray(rotated_ND[:, columns])
        codebook_KS, nearest_N = lloyd_step(rows_NS, codebooks_MKS[m], step=1.0, seed=seed, iteration=iteration)
        decoded_ND[:, columns] = codebook_KS[nearest_N]
        return codebook_KS

    return np.stack(run_blocks(move_one, range(M))), decoded_ND


def _nearest_rotation(decoded_ND: Float32Array, rows_ND: Float32Array) -> Float64Array:
    """The orthogonal R with the smallest sum of |R x - y|^2 over rows x and decoded rows y (Procrustes)."""
    cross_DD = torch.from_numpy(_cross_product(decoded_ND, rows_ND))
    left_DD, _, right_DD = _on_one_thread(lambda: torch.linalg.svd(cross_DD))
    return (left_DD @ right_DD).numpy()


def _cross_product(left_ND: Float32Array, right_ND: Float32Array) -> Float64Array:
    """left.T @ right in float64, blocks of rows added in order."""

    def one_block(start: int) -> Float64Array:
        left_BD = torch.from_numpy(left_ND[start : start + BLOCK_ROWS]).double()
        right_BD = torch.from_numpy(right_ND[start : start + BLOCK_ROWS]).double()
        return (left_BD.t() @ right_BD).numpy()

    total_DD = np.zeros((left_ND.shape[1], right_ND.shape[1]))
    for product_DD in run_blocks(one_block, range(0, len(left_ND), BLOCK_ROWS)):
        total_DD += product_DD
    return total_DD


def _rotated(rows_ND: Float32Array, rotation_DD: Float64Array) -> Float32Array:
    rotation = torch.from_numpy(rotation_DD.astype(np.float32))
    rotated_ND = np.empty_like(rows_ND)

    def one_block(start: int) -> None:
        block = slice(start, start + BLOCK_ROWS)
        torch.mm(torch.from_numpy(rows_ND[block]), rotation.t(), out=torch.from_numpy(rotated_ND[block]))

    run_blocks(one_block, range(0, len(rows_ND), BLOCK_ROWS))
    return rotated_ND


def _on_one_thread(function: Callable[[], Any]) -> Any:
    """LAPACK's bits depend on the number of its threads."""
    return run_blocks(lambda _: function(), [None])[0]
