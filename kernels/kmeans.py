"""k-means that gives the same centroids every time: seeded, resumable, sums in float64 in a fixed order.

Shapes: N rows of the sample, K centroids, D dimensions.

What may be spread over workers is `partial_sums` of a chunk; `reduce_pairwise` then adds the partial sums in the same
tree wherever they come from.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.assign import assign_nearest
from kernels.blocks import check_finite, check_matrix, check_metric

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
OnIteration = Callable[[int, Float32Array], None]

# Rows of one partial sum: a leaf of the reduction tree, so changing it changes the last bits of the centroids.
CHUNK_ROWS = 32768
# Rows widened to float64 at a time; does not change the result.
WIDEN_ROWS = 4096
# Beyond this many centroids, one level costs more than the two-level start and FULL_PASSES over all the centroids.
MAX_ONE_LEVEL = 4096
FULL_PASSES = 2
# Relative size of the symmetric perturbation that splits a cluster (faiss/Clustering.cpp, EPS = 1/1024).
SPLIT_EPSILON = 1.0 / 1024.0
# Streams of random numbers apart from those of the iterations, which are 0, 1, 2 ...
_REPEAT_STREAM = 1 << 40
_SUB_STREAM = 1 << 41


def kmeans(
    sample_ND: npt.NDArray[Any],
    num_centroids: int,
    *,
    metric: str,
    seed: int,
    iterations: int = 12,
    checkpoint: tuple[int, Float32Array] | None = None,
    on_iteration: OnIteration | None = None,
) -> Float32Array:
    """Centroids float32 [K, D] of the sample (float32 or float16), of unit length when the metric is "ip".

    The same bits for the same sample and seed, with any number of threads. `on_iteration(i, centroids)` is called after
    iteration i = 1, 2 ...; given back as `checkpoint=(i, centroids)` it leads to the same final bits.

    - At most K rows: the rows in order, repeated cyclically; repeats are moved by a seeded, tiny perturbation.
      No iterations, no calls.
    - More than MAX_ONE_LEVEL centroids: about sqrt(K) coarse clusters, each with centroids in proportion to its rows,
      then FULL_PASSES iterations over all of them. Here `on_iteration(0, centroids)` hands out the two-level start;
      a run that ends before it starts from the beginning.
    - An empty cluster takes half of the biggest one, by a seeded perturbation.

    Raises ValueError for no rows, a row that is not finite, or a checkpoint that does not fit.
    """
    check_matrix("sample_ND", sample_ND)
    check_metric(metric)
    if len(sample_ND) == 0:
        raise ValueError("k-means needs at least one row, got 0: is the training sample empty?")
    for name, value, least in (("num_centroids", num_centroids, 1), ("iterations", iterations, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if len(sample_ND) <= num_centroids:
        return _repeated_rows(sample_ND, num_centroids, metric, seed)
    two_level = num_centroids > MAX_ONE_LEVEL
    passes = FULL_PASSES if two_level else iterations
    if checkpoint is not None:
        done, centroids_KD = checkpoint
        _check_checkpoint(done, passes, centroids_KD, (num_centroids, sample_ND.shape[1]))
    elif two_level:
        done, centroids_KD = 0, _two_level_start(sample_ND, num_centroids, metric, seed, iterations)
        if on_iteration is not None:
            on_iteration(0, centroids_KD)
    else:
        done, centroids_KD = 0, _random_rows(sample_ND, num_centroids, metric, seed)
    return _lloyd(sample_ND, centroids_KD, metric, seed, done, passes, on_iteration)


def partial_sums(
    rows_ND: npt.NDArray[Any], list_no_N: npt.NDArray[np.int32], num_centroids: int
) -> tuple[Float64Array, Int64Array]:
    """Sum of each cluster's rows, float64 [K, D], and their number, int64 [K]; rows are added in their order."""
    sums_KD = torch.zeros((num_centroids, rows_ND.shape[1]), dtype=torch.float64)
    for start in range(0, len(rows_ND), WIDEN_ROWS):
        rows = torch.from_numpy(rows_ND[start : start + WIDEN_ROWS].astype(np.float64))
        # On the CPU index_add_ goes through the rows in order whatever the number of threads (torch 2.13).
        sums_KD.index_add_(0, torch.from_numpy(list_no_N[start : start + WIDEN_ROWS].astype(np.int64)), rows)
    return sums_KD.numpy(), np.bincount(list_no_N, minlength=num_centroids).astype(np.int64)


def reduce_pairwise(partials: Iterable[tuple[Float64Array, Int64Array]]) -> tuple[Float64Array, Int64Array]:
    """Total of the chunks' partial sums in a tree that depends on their number only; holds log2 of them at a time."""
    pending: list[tuple[int, Float64Array, Int64Array]] = []
    for sums_KD, counts_K in partials:
        pending.append((0, sums_KD, counts_K))
        while len(pending) > 1 and pending[-1][0] == pending[-2][0]:
            _add_last_two(pending)
    if not pending:
        raise ValueError("reduce_pairwise needs at least one partial sum, got none")
    while len(pending) > 1:
        _add_last_two(pending)
    return pending[0][1], pending[0][2]


def _add_last_two(pending: list[tuple[int, Float64Array, Int64Array]]) -> None:
    _, right_sums, right_counts = pending.pop()
    level, left_sums, left_counts = pending.pop()
    pending.append((level + 1, left_sums + right_sums, left_counts + right_counts))


def _lloyd(
    sample_ND: npt.NDArray[Any],
    centroids_KD: Float32Array,
    metric: str,
    seed: int,
    done: int,
    passes: int,
    on_iteration: OnIteration | None,
) -> Float32Array:
    num_centroids = len(centroids_KD)
    for iteration in range(done + 1, passes + 1):
        list_no_N = assign_nearest(sample_ND, centroids_KD, metric=metric)
        chunks = (slice(start, start + CHUNK_ROWS) for start in range(0, len(sample_ND), CHUNK_ROWS))
        sums_KD, counts_K = reduce_pairwise(
            partial_sums(sample_ND[chunk], list_no_N[chunk], num_centroids) for chunk in chunks
        )
        means_KD = sums_KD / np.maximum(counts_K, 1)[:, None]
        _split_biggest(means_KD, counts_K, _rng(seed, iteration))
        centroids_KD = _finished(means_KD, metric)
        if on_iteration is not None:
            on_iteration(iteration, centroids_KD)
    return centroids_KD


def _split_biggest(means_KD: Float64Array, counts_K: Int64Array, rng: np.random.Generator) -> None:
    """Gives every empty cluster half of the cluster that is biggest at that moment (the lowest id of equals), in place.

    There are more rows than clusters, so while one is empty another has two rows.
    """
    biggest = [(-int(count), cluster) for cluster, count in enumerate(counts_K) if count > 1]
    heapq.heapify(biggest)
    for empty in np.flatnonzero(counts_K == 0).tolist():
        negated, cluster = heapq.heappop(biggest)
        moved_D = _perturbation(means_KD[cluster], rng)
        means_KD[empty] = means_KD[cluster] + moved_D
        means_KD[cluster] -= moved_D
        half = -negated // 2
        for rows, owner in ((half, empty), (-negated - half, cluster)):
            if rows > 1:
                heapq.heappush(biggest, (-rows, owner))


def _perturbation(row_D: Float64Array, rng: np.random.Generator) -> Float64Array:
    signs_D = rng.integers(0, 2, len(row_D)) * 2.0 - 1.0
    size = float(np.sqrt(np.mean(np.square(row_D)))) or 1.0
    return np.asarray(signs_D * (size * SPLIT_EPSILON))


def _finished(means_KD: Float64Array, metric: str) -> Float32Array:
    """Float32 centroids, normalised for "ip"; a zero centroid has no direction and stays zero."""
    if metric == "ip":
        norms_K = np.sqrt(np.square(means_KD).sum(axis=1))
        means_KD = means_KD / np.where(norms_K > 0, norms_K, 1.0)[:, None]
    return means_KD.astype(np.float32)


def _random_rows(sample_ND: npt.NDArray[Any], num_centroids: int, metric: str, seed: int) -> Float32Array:
    rows = np.sort(_rng(seed, 0).choice(len(sample_ND), num_centroids, replace=False))
    return _finished(sample_ND[rows].astype(np.float64), metric)


def _repeated_rows(sample_ND: npt.NDArray[Any], num_centroids: int, metric: str, seed: int) -> Float32Array:
    check_finite("row", sample_ND)
    rng = _rng(seed, _REPEAT_STREAM)
    rows_KD = sample_ND[np.arange(num_centroids) % len(sample_ND)].astype(np.float64)
    for repeat in range(len(sample_ND), num_centroids):
        rows_KD[repeat] += _perturbation(rows_KD[repeat], rng)
    return _finished(rows_KD, metric)


def _two_level_start(
    sample_ND: npt.NDArray[Any], num_centroids: int, metric: str, seed: int, iterations: int
) -> Float32Array:
    num_coarse = round(num_centroids**0.5)
    coarse_seed = _sub_seed(seed, num_coarse)
    coarse = _random_rows(sample_ND, num_coarse, metric, coarse_seed)
    coarse = _lloyd(sample_ND, coarse, metric, coarse_seed, 0, iterations, None)
    list_no_N = assign_nearest(sample_ND, coarse, metric=metric)
    counts = np.bincount(list_no_N, minlength=num_coarse)
    ends = np.cumsum(counts)
    by_list = np.argsort(list_no_N, kind="stable")
    parts = []
    for cluster, size in enumerate(_shares(counts, num_centroids)):
        if size == 0:
            continue
        rows = sample_ND[by_list[ends[cluster] - counts[cluster] : ends[cluster]]]
        if len(rows) == size:
            parts.append(_finished(rows.astype(np.float64), metric))
            continue
        sub_seed = _sub_seed(seed, cluster)
        start = _random_rows(rows, int(size), metric, sub_seed)
        parts.append(_lloyd(rows, start, metric, sub_seed, 0, iterations, None))
    return np.concatenate(parts)


def _shares(counts: Int64Array, total: int) -> Int64Array:
    """`total` centroids in proportion to the rows of each cluster: int64, from 1 (0 for no rows) to its rows."""
    ideal = counts * (total / counts.sum())
    shares: Int64Array = np.clip(np.floor(ideal).astype(np.int64), np.minimum(counts, 1), counts)
    while shares.sum() != total:
        step = 1 if shares.sum() < total else -1
        open_to_change = shares < counts if step == 1 else shares > 1
        shares[np.argmax(np.where(open_to_change, (ideal - shares) * step, -np.inf))] += step
    return shares


def _rng(seed: int, stream: int) -> np.random.Generator:
    """Own random numbers for every iteration, so that a checkpoint needs no generator state."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream])))


def _sub_seed(seed: int, part: int) -> int:
    return int(np.random.SeedSequence([seed, _SUB_STREAM, part]).generate_state(1, np.uint64)[0])


def _check_checkpoint(done: int, passes: int, centroids_KD: Float32Array, shape: tuple[int, int]) -> None:
    if not 0 <= done <= passes:
        raise ValueError(f"the checkpoint's iteration must be in 0..{passes}, got {done}")
    if centroids_KD.shape != shape or centroids_KD.dtype != np.float32:
        raise ValueError(
            f"the checkpoint's centroids must be float32 {shape}, got {centroids_KD.dtype} {centroids_KD.shape}"
        )
