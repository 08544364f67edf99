"""From an array of vectors, which may be a memory-mapped file of any length, to a trained quantizer and lists of codes.

Shapes: N vectors, D dimensions, K lists, M sub-quantizers, S = D / M, B vectors of a block, C bytes of a code.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.assign import assign_nearest
from kernels.assign_two_level import CentroidGroups, assign_two_level, measure_slack
from kernels.blocks import check_matrix, check_metric
from kernels.kmeans import group_centroids, kmeans
from kernels.pq import ROWS_PER_CODEWORD, check_quantizer, pq_encode_residuals, pq_train

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
CodeArray = npt.NDArray[np.uint8]

DEFAULT_BUDGET_BYTES = 2 << 30
# Rows a list in the training sample, where the caller does not say: faiss warns below 39.
ROWS_PER_LIST = 50
# Up to so many lists every vector goes to its nearest; beyond, SHARE of them do and the rest goes near it.
MAX_EXACT_LISTS = 1024
SHARE = 0.99
SHARE_ROWS = 4096
# Of the budget, the part that blocks of vectors may take while they are encoded (float32, and the gathered copies).
BLOCK_SHARE = 16


@dataclass(frozen=True, eq=False)
class IvfPq:
    """Centroids float32 [K, D], codebooks float32 [M, 2^nbits, S], and how vectors find their list.

    slack: that of kernels.assign_two_level, or infinity where every vector goes to its nearest centroid. share: of the
    training sample's vectors that go to their nearest centroid.
    """

    metric: str
    centroids_KD: Float32Array
    codebooks_MKS: Float32Array
    seed: int
    slack: float = float("inf")
    share: float = 1.0

    @cached_property
    def groups(self) -> CentroidGroups:
        return group_centroids(self.centroids_KD, metric=self.metric, seed=self.seed)

    def assign(self, x_ND: npt.NDArray[Any]) -> Int32Array:
        """List of every vector, int32 [N]; depends on the vector alone."""
        if np.isinf(self.slack):
            return assign_nearest(x_ND, self.centroids_KD, metric=self.metric)
        return assign_two_level(x_ND, self.groups, slack=self.slack)

    def encode(self, x_ND: npt.NDArray[Any]) -> tuple[Int32Array, CodeArray]:
        """(lists int32 [N], codes uint8 [N, C]) of vectors that fit in memory; codes are of x minus its centroid."""
        list_no_N = self.assign(x_ND)
        return list_no_N, pq_encode_residuals(x_ND, self.centroids_KD, list_no_N, self.codebooks_MKS)


def train_ivfpq(
    x_ND: npt.NDArray[Any],
    *,
    nlist: int,
    M: int,
    nbits: int = 8,
    metric: str,
    seed: int,
    train_rows: int = 0,
    iterations: int = 8,
    pq_iterations: int = 16,
    exact: bool = False,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    on_stage: Callable[[str], None] | None = None,
) -> IvfPq:
    """A quantizer of `nlist` lists and M codes a vector, trained on `train_rows` rows of x_ND drawn by the seed.

    x_ND: float32 or float16, may be memory-mapped; only the drawn rows are read. train_rows 0: ROWS_PER_LIST a list, at
    least what the codebooks use, at most N. exact: every vector to its nearest centroid whatever nlist is.
    Deterministic. `on_stage` hears "sample", "coarse", "codebooks" as each begins.
    Raises ValueError when what training holds beside the libraries would not fit in budget_bytes.
    """
    check_matrix("x_ND", x_ND)
    check_metric(metric)
    check_quantizer(x_ND.shape[1], M, nbits)
    if nlist < 1:
        raise ValueError(f"nlist must be at least 1, got {nlist}")
    pq_rows = ROWS_PER_CODEWORD[-1] << nbits
    num_rows = min(len(x_ND), train_rows or max(ROWS_PER_LIST * nlist, pq_rows))
    needed = training_bytes(num_rows, x_ND.shape[1], nlist, nbits)
    if needed > budget_bytes:
        raise ValueError(
            f"training must fit in budget_bytes ({budget_bytes}), but {num_rows} rows of {x_ND.shape[1]} dimensions and"
            f" {nlist} lists need about {needed}: lower train_rows, or give more"
        )
    say = on_stage or (lambda stage: None)
    say("sample")
    sample_ND = _drawn_rows(x_ND, num_rows, seed)
    say("coarse")
    centroids_KD = kmeans(sample_ND, nlist, metric=metric, seed=seed, iterations=iterations)
    found = IvfPq(metric, centroids_KD, np.empty((M, 1 << nbits, 0), np.float32), seed)
    slack, share = float("inf"), 1.0
    if nlist > MAX_EXACT_LISTS and not exact:
        few_SD = np.ascontiguousarray(sample_ND[:: -(-len(sample_ND) // SHARE_ROWS)])
        slack, share = measure_slack(few_SD, found.groups, target=SHARE)
    say("codebooks")
    points_PD = sample_ND[:: max(1, len(sample_ND) // pq_rows)][:pq_rows]
    list_no_P = replace(found, slack=slack).assign(points_PD)
    codebooks_MKS = pq_train(points_PD - centroids_KD[list_no_P], M, nbits, seed=seed, iterations=pq_iterations)
    return IvfPq(metric, centroids_KD, codebooks_MKS, seed, slack, share)


def encode_blocks(
    x_ND: npt.NDArray[Any], quantizer: IvfPq, *, budget_bytes: int = DEFAULT_BUDGET_BYTES
) -> Iterator[tuple[int, Int32Array, CodeArray]]:
    """(first row, lists int32 [B], codes uint8 [B, C]) of one block after the other.

    Holds a block of vectors at a time, and lets go of the pages of a read-only memory-mapped file as it goes, so the
    memory is bounded whatever N is. The lists and codes do not depend on the budget.
    Raises ValueError when what the quantizer holds and a block of one vector would not fit in budget_bytes.
    """
    check_matrix("x_ND", x_ND)
    nlist, num_dims = quantizer.centroids_KD.shape
    own_bytes, row_bytes = quantizer_bytes(nlist, num_dims), BLOCK_SHARE * 4 * num_dims
    if own_bytes + row_bytes > budget_bytes:
        raise ValueError(
            f"encoding must fit in budget_bytes ({budget_bytes}), but a quantizer of {nlist} lists and {num_dims}"
            f" dimensions needs about {own_bytes}, and {row_bytes} more for a vector at a time: give more"
        )
    block_rows = (budget_bytes - own_bytes) // row_bytes
    for start in range(0, len(x_ND), block_rows):
        list_no_B, codes = quantizer.encode(x_ND[start : start + block_rows])
        release_pages(x_ND)
        yield start, list_no_B, codes


def training_bytes(num_rows: int, num_dims: int, nlist: int, nbits: int = 8) -> int:
    """About what train_ivfpq holds at its peak beside the libraries: the sample and the larger of its two stages."""
    sums = 8 * nlist * num_dims  # float64; a handful of partial sums are alive at once
    pq_rows = min(num_rows, ROWS_PER_CODEWORD[-1] << nbits)
    return 4 * num_rows * num_dims + max(6 * sums + (256 << 20), 3 * 4 * pq_rows * num_dims)


def quantizer_bytes(nlist: int, num_dims: int) -> int:
    """About what a quantizer of so many lists makes of its centroids to find lists: copies in float32 and float64 while
    they are put in groups or made ready, and deviations from the groups' centroids in the type that products are in."""
    return (4 + 8 + 4) * nlist * num_dims


def release_pages(x_ND: npt.NDArray[Any]) -> None:
    """Lets go of the pages of a read-only memory-mapped file; they are read again when they are needed."""
    mapped = getattr(x_ND, "_mmap", None)
    if isinstance(x_ND, np.memmap) and x_ND.mode == "r" and isinstance(mapped, mmap.mmap):
        mapped.madvise(mmap.MADV_DONTNEED)


def _drawn_rows(x_ND: npt.NDArray[Any], num_rows: int, seed: int) -> Float32Array:
    """One row of each of `num_rows` equal stretches of the array, float32, in their order."""
    if num_rows == len(x_ND):
        in_memory = x_ND if not isinstance(x_ND, np.memmap) else np.array(x_ND, np.float32)
        return np.ascontiguousarray(in_memory, np.float32)
    edges = (np.arange(num_rows + 1, dtype=np.int64) * len(x_ND)) // num_rows
    rows = np.random.Generator(np.random.PCG64(seed)).integers(edges[:-1], edges[1:])
    sample_ND = np.empty((num_rows, x_ND.shape[1]), np.float32)
    for start in range(0, num_rows, 16384):
        sample_ND[start : start + 16384] = x_ND[rows[start : start + 16384]]
        release_pages(x_ND)
    return sample_ND
