"""Nearest centroid of every row, on a CUDA device.

Shapes: N rows, K centroids, B rows of a block, C columns of a tile, D dimensions, E = D rounded up to a multiple of 8.

"float32" is exact, as on the host: the float32 product proposes, float64 decides what rounding leaves open. "tf32" and
"bf16" let tensor cores propose the best of each of eight classes of centroids (kernels/cuda/argmax.py), and float32
decides among those that may be the best. In them a row may miss its nearest centroid only where another of the same
class had a better rounded score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.assign import PRECISIONS, UNIT_ROUNDOFF_32, UNIT_ROUNDOFF_64
from kernels.blocks import check_metric, check_same_dims
from kernels.cuda import argmax, assign_fused
from kernels.cuda.arrays import FLOAT32, check_found, float_matrix, no_rows_found
from kernels.cuda.gemm import score_tile

# Scores of a tile: 8192 x 1024 float32 are 32 MiB, which the second cache of an H100 or H200 (50 MB) holds between the
# product and the comparison; fewer would make the product too small to fill the device.
BLOCK_ROWS = 8192
COLUMN_TILE = 1024
NUM_FLOAT64_SCORES = 1 << 25  # held at a time: 256 MiB
# Roundoff of a product's operands: bfloat16 has 8 significant bits and is rounded to nearest by us, tf32 has 11 and may
# be cut off by the hardware.
UNIT_ROUNDOFF = {"bf16": 2.0**-8, "tf32": 2.0**-10}
PATHS = ("fused", "tiled")


@dataclass(frozen=True)
class Prepared:
    """Centroids on the device, K padded by zero rows of bias -infinity. A score is scale * row . centroid + bias."""

    centroids_KD: Any  # float32
    scaled_KE: Any  # float32: 2c for "l2"
    bias_K: Any
    max_norm: float
    scale: float
    metric: str
    num_centroids: int


def assign_nearest(
    x_ND: Any, centroids_KD: Any, *, metric: str, precision: str = "float32", path: str | None = None
) -> Any:
    """As kernels.assign.assign_nearest, for arrays on the device: CuPy int32 [N].

    x_ND, centroids_KD: float32 or float16, CuPy arrays or CUDA tensors. Never holds N x K scores.
    path (only "bf16"): "fused" is one kernel that keeps the scores in registers (kernels/cuda/assign_fused.py; compute
    capability 9.0), "tiled" is cuBLAS and a comparison that follows. None takes "tiled".
    TODO: None takes "fused" where the device has it, the rows fill it and fused_agrees, once a run on a GPU
    (benchmarks/results/gpu_kernels.json) has shown its lists to be right and itself to be the faster.
    Raises ValueError as on the host.
    """
    import cupy

    x_ND, kind = float_matrix("x_ND", x_ND)
    check_metric(metric)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if path is not None and (path not in PATHS or precision != "bf16"):
        raise ValueError(f"path must be None, or one of {', '.join(PATHS)} with precision 'bf16', got {path!r}")
    prepared = prepare_centroids(centroids_KD, metric)
    check_same_dims("x_ND", x_ND, "centroids_KD", prepared.centroids_KD.shape[1])
    list_no_N = cupy.empty(len(x_ND), cupy.int32)
    if len(x_ND) == 0:
        return list_no_N
    found = no_rows_found(2)
    if precision == "float32":
        undecided_N = _propose(x_ND, kind, prepared, list_no_N, found)
        check_found(found, x_ND)
        rows = cupy.flatnonzero(undecided_N)
        if len(rows):
            list_no_N[rows] = _nearest_in_float64(x_ND, rows, prepared)
        return list_no_N
    if path == "fused":
        assign_fused.assign_bf16(x_ND, kind, prepared, list_no_N, found, UNIT_ROUNDOFF["bf16"])
    else:
        _assign_tiled(x_ND, kind, prepared, list_no_N, found, precision)
    check_found(found, x_ND)
    return list_no_N


def prepare_centroids(centroids_KD: Any, metric: str) -> Prepared:
    """The centroids as assignment wants them, K padded to a multiple of 8. Raises ValueError as on the host."""
    import cupy

    centroids_KD, _ = float_matrix("centroids_KD", centroids_KD)
    num_centroids, num_dims = centroids_KD.shape
    if num_centroids == 0:
        raise ValueError("centroids_KD must have at least one row, got 0")
    finite_K = cupy.isfinite(centroids_KD).all(axis=1).get()
    if not finite_K.all():
        raise ValueError(f"centroids must be finite: centroid {int(np.argmin(finite_K))} holds a NaN or an infinity")
    centroids_KD = centroids_KD.astype(cupy.float32, copy=False)
    padding = -num_centroids % 8
    scale = 1.0 if metric == "ip" else 2.0
    scaled_KE = cupy.zeros((num_centroids + padding, num_dims + -num_dims % 8), cupy.float32)
    scaled_KE[:num_centroids, :num_dims] = centroids_KD * np.float32(scale)
    norms_K = cupy.square(centroids_KD.astype(cupy.float64)).sum(axis=1)
    bias_K = cupy.full(num_centroids + padding, -np.inf, cupy.float32)
    bias_K[:num_centroids] = 0.0 if metric == "ip" else -norms_K
    if metric == "l2":
        finite_K = (cupy.isfinite(bias_K[:num_centroids]) & cupy.isfinite(scaled_KE[:num_centroids]).all(axis=1)).get()
        if not finite_K.all():
            raise ValueError(
                f"squared norms must be within float32: that of centroid {int(np.argmin(finite_K))} is not"
            )
    max_norm = float(cupy.sqrt(norms_K.max()))
    return Prepared(centroids_KD, scaled_KE, bias_K, max_norm, scale, metric, num_centroids)


def error_bound(prepared: Prepared, unit_roundoff: float, operand_roundoff: float = 0.0) -> tuple[float, float]:
    """(slope, offset): a row's scores are within slope * norm + offset of the exact ones.

    As kernels.assign.score_error; operands rounded before they are multiplied add twice their roundoff and its square.
    In float32 the norm may lack what the squares of small values lose: less than 2^-126 each.
    """
    num_dims = prepared.centroids_KD.shape[1]
    factor = (num_dims + 4) * 1.01 * unit_roundoff + 1.01 * operand_roundoff * (2.0 + operand_roundoff)
    slope, offset = factor * prepared.max_norm, 0.0
    if prepared.metric == "l2":
        slope, offset = 2.0 * slope, factor * prepared.max_norm**2
    if unit_roundoff != UNIT_ROUNDOFF_64:
        offset += (num_dims + 4) * 2.0**-126 + slope * num_dims**0.5 * 2.0**-63
    return slope, offset


def _propose(x_ND: Any, kind: int, prepared: Prepared, list_no_N: Any, found: Any) -> Any:
    """Fills list_no_N by float32 scores; bool [N], rows whose runner-up is within rounding of the best."""
    import cupy

    num_rows, num_padded = len(x_ND), prepared.scaled_KE.shape[1]
    undecided_N = cupy.empty(num_rows, cupy.bool_)
    rows = min(BLOCK_ROWS, num_rows)
    block_BE = cupy.empty((rows, num_padded), cupy.float32)
    norms_B = cupy.empty(rows, cupy.float32)
    scratch = cupy.empty(rows * COLUMN_TILE, cupy.float32)
    slope, offset = error_bound(prepared, UNIT_ROUNDOFF_32)
    for start in range(0, num_rows, rows):
        count = min(rows, num_rows - start)
        argmax.prepare_rows(
            *(x_ND, kind, start, count),
            layout=argmax.FLOAT32_ROWS,
            out_BE=block_BE,
            norms_B=norms_B,
            found=found,
            num_padded=num_padded,
        )
        best_B = cupy.full(count, -np.inf, cupy.float32)
        second_B = cupy.full(count, -np.inf, cupy.float32)
        column_B = list_no_N[start : start + count]
        column_B[:] = 0
        for first in range(0, len(prepared.scaled_KE), COLUMN_TILE):
            tile_CE = prepared.scaled_KE[first : first + COLUMN_TILE]
            scores_BC = scratch[: count * len(tile_CE)].reshape(count, len(tile_CE))
            score_tile(block_BE[:count], tile_CE, scores_BC, precision="float32")
            bias_C = prepared.bias_K[first : first + COLUMN_TILE]
            argmax.merge_best_two(scores_BC, bias_C, first, best_B, second_B, column_B)
        bad_B = cupy.flatnonzero(~cupy.isfinite(best_B))
        if len(bad_B):
            found[1] = min(int(found[1]), start + int(bad_B[0]))
        # The norm is a float32 sum of squares; the last factor covers its own rounding.
        error_B = (norms_B[:count].astype(cupy.float64) * slope + offset) * 1.001
        gap_B = best_B.astype(cupy.float64) - second_B
        undecided_N[start : start + count] = ~(gap_B > 2.0 * error_B)
    return undecided_N


def _nearest_in_float64(x_ND: Any, rows: Any, prepared: Prepared) -> Any:
    """Nearest centroid, int32, of the given rows; the lowest id of those that float64 cannot tell apart."""
    import cupy

    centroids64_KD = prepared.centroids_KD.astype(cupy.float64)
    norms_K = cupy.square(centroids64_KD).sum(axis=1)
    slope, offset = error_bound(prepared, UNIT_ROUNDOFF_64)
    nearest = cupy.empty(len(rows), cupy.int32)
    columns_K = cupy.arange(prepared.num_centroids, dtype=cupy.int32)
    block_rows = max(1, NUM_FLOAT64_SCORES // max(centroids64_KD.shape))
    for start in range(0, len(rows), block_rows):
        block_BD = x_ND[rows[start : start + block_rows]].astype(cupy.float64)
        scores_BK = block_BD @ centroids64_KD.T
        if prepared.metric == "l2":
            scores_BK *= 2.0
            scores_BK -= norms_K
        error_B = cupy.sqrt(cupy.square(block_BD).sum(axis=1)) * slope + offset
        least_B = scores_BK.max(axis=1) - 2.0 * error_B
        within_BK = cupy.where(scores_BK >= least_B[:, None], columns_K, prepared.num_centroids)
        nearest[start : start + block_rows] = within_BK.min(axis=1)
    return nearest


def _assign_tiled(x_ND: Any, kind: int, prepared: Prepared, list_no_N: Any, found: Any, precision: str) -> None:
    """Fills list_no_N: tiles of scores by cuBLAS, merged into classes, rescored."""
    import cupy

    num_rows, num_padded = len(x_ND), prepared.scaled_KE.shape[1]
    layout, dtype = (argmax.BFLOAT16_ROWS, cupy.uint16) if precision == "bf16" else (argmax.FLOAT32_ROWS, cupy.float32)
    scaled_KE = prepared.scaled_KE
    if precision == "bf16":
        scaled_KE = cupy.empty(prepared.scaled_KE.shape, cupy.uint16)
        argmax.prepare_rows(
            *(prepared.scaled_KE, FLOAT32, 0, len(scaled_KE)),
            layout=layout,
            out_BE=scaled_KE,
            norms_B=cupy.empty(len(scaled_KE), cupy.float32),
            found=no_rows_found(2),
            num_padded=num_padded,
        )
    rows = min(BLOCK_ROWS, num_rows)
    block_BE = cupy.empty((rows, num_padded), dtype)
    norms_B = cupy.empty(rows, cupy.float32)
    scratch = cupy.empty(rows * COLUMN_TILE, cupy.float32)
    best_B8 = cupy.empty((rows, argmax.NUM_CLASSES), cupy.float32)
    column_B8 = cupy.empty((rows, argmax.NUM_CLASSES), cupy.int32)
    slope, offset = error_bound(prepared, UNIT_ROUNDOFF_32, UNIT_ROUNDOFF[precision])
    # Cut once: a tile takes the device about 25 microseconds, which cutting for every block would come near to.
    columns = [slice(first, first + COLUMN_TILE) for first in range(0, len(scaled_KE), COLUMN_TILE)]
    tiles = [(cut.start, scaled_KE[cut], prepared.bias_K[cut]) for cut in columns]
    for start in range(0, num_rows, rows):
        count = min(rows, num_rows - start)
        argmax.prepare_rows(
            *(x_ND, kind, start, count),
            layout=layout,
            out_BE=block_BE,
            norms_B=norms_B,
            found=found,
            num_padded=num_padded,
        )
        best_B8.fill(-np.inf)
        filled_BE = block_BE[:count]
        for first, tile_CE, bias_C in tiles:
            scores_BC = scratch[: count * len(tile_CE)].reshape(count, len(tile_CE))
            score_tile(filled_BE, tile_CE, scores_BC, precision=precision)
            argmax.merge_classes(scores_BC, bias_C, first, best_B8, column_B8)
        argmax.rescore_classes(
            *(x_ND, kind, start, count, prepared.centroids_KD, prepared.scale, prepared.bias_K, norms_B),
            *(slope, offset, best_B8, column_B8, list_no_N, found),
        )


def fused_agrees() -> bool:
    """Whether both paths give the same lists for small whole numbers, whose products and sums are exact in any order."""
    import cupy

    rng = np.random.default_rng(0)
    # Neither rows, centroids nor dimensions fill their tiles.
    x_ND, centroids_KD = (cupy.asarray(rng.integers(-4, 5, (rows, 200)).astype(np.float32)) for rows in (300, 1001))
    for metric in ("ip", "l2"):
        fused_N, tiled_N = (
            assign_nearest(x_ND, centroids_KD, metric=metric, precision="bf16", path=path) for path in PATHS
        )
        if not bool((fused_N == tiled_N).all()):
            return False
    return True
