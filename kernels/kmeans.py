"""k-means that gives the same centroids every time: seeded, resumable, sums in float64 in a fixed order.

Shapes: N rows of the sample, K centroids, D dimensions.

What may be spread over workers is `partial_sums` of a chunk; `reduce_pairwise` then adds the partial sums in the same
tree wherever they come from.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.assign import assign_nearest, compiled_assign
from kernels.assign_two_level import CentroidGroups, assign_two_level, form_groups, measure_slack
from kernels.blocks import check_finite, check_matrix, check_metric, on_device, to_host
from kernels.threads import run_blocks

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

# Rows of one partial sum: a leaf of the reduction tree, so changing it changes the last bits of the centroids.
CHUNK_ROWS = 262144
# Rows widened to float64 at a time; does not change the result.
WIDEN_ROWS = 4096
# Beyond this many centroids an iteration looks at the near groups of centroids only, with a slack that finds the nearest
# for this share of the rows (LAST_SHARE in the last iteration); the slack is measured on about SLACK_ROWS rows.
MAX_EXACT = 1024
SHARE, LAST_SHARE = 0.93, 0.97
SLACK_ROWS = 1024
GROUP_ITERATIONS = 6
# From the second iteration to the last but PLAIN_AT_END a centroid goes this many times as far as to its mean. Below twice
# the error of the present assignment still falls, and fewer iterations are needed (benchmarks/results/ivfpq_build.json).
OVERSHOOT, OVERSHOOT_FROM, PLAIN_AT_END = 1.8, 2, 1
MIN_ROWS_PER_CENTROID = 12
# Dimensions that a thread sums up at a time.
SUM_DIMS = 192
# Relative size of the symmetric perturbation that splits a cluster (faiss/Clustering.cpp, EPS = 1/1024).
SPLIT_EPSILON = 1.0 / 1024.0
# Streams of random numbers apart from those of the iterations, which are 0, 1, 2 ...
_REPEAT_STREAM = 1 << 40
_SUB_STREAM = 1 << 41


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """State of a training after an iteration, from which it goes on to the same bits."""

    iteration: int
    centroids_KD: Float32Array
    list_no_N: Int32Array  # lists of the sample's rows; -1 where a row has had none yet


OnIteration = Callable[[Checkpoint], None]


def kmeans(
    sample_ND: npt.NDArray[Any],
    num_centroids: int,
    *,
    metric: str,
    seed: int,
    iterations: int = 8,
    checkpoint: Checkpoint | None = None,
    on_iteration: OnIteration | None = None,
) -> Float32Array:
    """Centroids float32 [K, D] of the sample (float32 or float16), of unit length when the metric is "ip".

    The same bits for the same sample and seed, with any number of threads. `on_iteration(checkpoint)` is called after
    iteration 1, 2 ...; its argument given back as `checkpoint` leads to the same final bits.

    - The start is a random choice of the rows. At most K rows: these in order, repeated cyclically, the repeats moved
      by a seeded, tiny perturbation; no iterations, no calls.
    - Early iterations use every fourth, then every second row (see _row_step), and centroids go past their means
      (see OVERSHOOT); the last ones are plain ones over all rows.
    - Beyond MAX_EXACT centroids an iteration is on two levels: it scores near groups of centroids only, and a row goes
      elsewhere only if it is nearer there. The cost of an iteration then grows with sqrt(K).
    - An empty cluster takes half of the biggest one, by a seeded perturbation.

    A CuPy sample is assigned and summed on its device (exact assignment, plain iterations' bits apart).
    Raises ValueError for no rows, a row that is not finite, or a checkpoint that does not fit.
    """
    check_metric(metric)
    if not on_device(sample_ND):
        check_matrix("sample_ND", sample_ND)
    if len(sample_ND) == 0:
        raise ValueError("k-means needs at least one row, got 0: is the training sample empty?")
    for name, value, least in (("num_centroids", num_centroids, 1), ("iterations", iterations, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if len(sample_ND) <= num_centroids:
        return _repeated_rows(sample_ND, num_centroids, metric, seed)
    if checkpoint is None:
        centroids_KD = _random_rows(sample_ND, num_centroids, metric, seed)
        checkpoint = Checkpoint(0, centroids_KD, np.full(len(sample_ND), -1, np.int32))
    _check_checkpoint(checkpoint, iterations, (num_centroids, sample_ND.shape[1]), len(sample_ND))
    return _lloyd(sample_ND, checkpoint, metric, seed, iterations, on_iteration)


def partial_sums(
    rows_ND: npt.NDArray[Any], list_no_N: npt.NDArray[np.int32], num_centroids: int
) -> tuple[Float64Array, Int64Array]:
    """Sum of each cluster's rows, float64 [K, D], and their number, int64 [K]; rows are added in their order."""
    if on_device(rows_ND):
        import cupy

        from kernels.cuda.kmeans import partial_sums as sums_on_device

        sums_on, counts_on = sums_on_device(rows_ND, cupy.asarray(list_no_N), num_centroids)
        return sums_on.get(), counts_on.get()
    counts_K = np.bincount(list_no_N, minlength=num_centroids).astype(np.int64)
    compiled = compiled_assign()
    if compiled is not None and rows_ND.dtype == np.float32:
        sums_KD = np.zeros((num_centroids, rows_ND.shape[1]), np.float64)
        rows_ND = np.ascontiguousarray(rows_ND)
        # By dimensions, not by rows: each sum is added up in the same order whatever the number of threads.
        starts = range(0, rows_ND.shape[1], SUM_DIMS)
        run_blocks(
            lambda start: compiled.add_rows(
                rows_ND, list_no_N, start, min(start + SUM_DIMS, rows_ND.shape[1]), sums_KD
            ),
            starts,
        )
        return sums_KD, counts_K
    sums = torch.zeros((num_centroids, rows_ND.shape[1]), dtype=torch.float64)
    for start in range(0, len(rows_ND), WIDEN_ROWS):
        rows = torch.from_numpy(rows_ND[start : start + WIDEN_ROWS].astype(np.float64))
        # On the CPU index_add_ goes through the rows in order whatever the number of threads (torch 2.13).
        sums.index_add_(0, torch.from_numpy(list_no_N[start : start + WIDEN_ROWS].astype(np.int64)), rows)
    return sums.numpy(), counts_K


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
    state: Checkpoint,
    metric: str,
    seed: int,
    iterations: int,
    on_iteration: OnIteration | None,
) -> Float32Array:
    centroids_KD, num_centroids = state.centroids_KD, len(state.centroids_KD)
    list_no_N = state.list_no_N.copy()
    for iteration in range(state.iteration + 1, iterations + 1):
        step = _row_step(iteration, iterations, len(sample_ND), num_centroids)
        rows_ND = sample_ND[::step]
        last = iteration == iterations
        lists = _assign(rows_ND, list_no_N[::step], centroids_KD, metric, seed, iteration, last=last)
        list_no_N[::step] = lists
        chunk_rows = max(CHUNK_ROWS, num_centroids)
        chunks = (slice(start, start + chunk_rows) for start in range(0, len(rows_ND), chunk_rows))
        sums_KD, counts_K = reduce_pairwise(
            partial_sums(rows_ND[chunk], lists[chunk], num_centroids) for chunk in chunks
        )
        means_KD = sums_KD / np.maximum(counts_K, 1)[:, None]
        _split_biggest(means_KD, counts_K, _rng(seed, iteration))
        if OVERSHOOT_FROM <= iteration <= iterations - PLAIN_AT_END:
            # From centroid to centroid: for ip both of unit length, for a mean's own length says nothing.
            targets_KD = _finished(means_KD, metric).astype(np.float64)
            filled_K1 = (counts_K > 0)[:, None]
            means_KD = np.where(filled_K1, centroids_KD + OVERSHOOT * (targets_KD - centroids_KD), means_KD)
        centroids_KD = _finished(means_KD, metric)
        if on_iteration is not None:
            on_iteration(Checkpoint(iteration, centroids_KD, list_no_N.copy()))
    return centroids_KD


def _row_step(iteration: int, iterations: int, num_rows: int, num_centroids: int) -> int:
    """Every how many rows this iteration uses: 4 in the first quarter, 2 in the second, while 8 a centroid are left."""
    wanted = 4 if 4 * (iteration - 1) < iterations else 2 if 2 * (iteration - 1) < iterations else 1
    if iterations < 4:
        return 1
    return max(1, min(wanted, num_rows // (MIN_ROWS_PER_CENTROID * num_centroids)))


def group_centroids(
    centroids_KD: Float32Array, *, metric: str, seed: int, num_groups: int = 0, iterations: int = GROUP_ITERATIONS
) -> CentroidGroups:
    """The centroids in `num_groups` groups (0: about sqrt(K)) by a k-means of their own; seeded and deterministic."""
    num_groups = num_groups or max(1, round(len(centroids_KD) ** 0.5))
    if num_groups >= len(centroids_KD):
        return form_groups(centroids_KD, centroids_KD, metric=metric)
    groups_GD = kmeans(centroids_KD, num_groups, metric=metric, seed=seed, iterations=iterations)
    return form_groups(centroids_KD, groups_GD, metric=metric)


def _assign(
    rows_ND: npt.NDArray[Any],
    current_N: Int32Array,
    centroids_KD: Float32Array,
    metric: str,
    seed: int,
    iteration: int,
    *,
    last: bool,
) -> Int32Array:
    """Lists int32 of the rows on the host: the nearest, or beyond MAX_EXACT centroids mostly the nearest."""
    if on_device(rows_ND):
        import cupy

        return to_host(assign_nearest(rows_ND, cupy.asarray(centroids_KD), metric=metric))
    if len(centroids_KD) <= MAX_EXACT:
        return assign_nearest(rows_ND, centroids_KD, metric=metric)
    # Other groups in every iteration: a row that one grouping leads astray is put right by another.
    groups = group_centroids(centroids_KD, metric=metric, seed=_sub_seed(seed, iteration))
    sample_SD = np.ascontiguousarray(rows_ND[:: -(-len(rows_ND) // SLACK_ROWS)])
    slack, _ = measure_slack(sample_SD, groups, target=LAST_SHARE if last else SHARE)
    return assign_two_level(rows_ND, groups, slack=slack, current_N=current_N)


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
    return _finished(to_host(sample_ND[rows]).astype(np.float64), metric)


def _repeated_rows(sample_ND: npt.NDArray[Any], num_centroids: int, metric: str, seed: int) -> Float32Array:
    sample_ND = to_host(sample_ND)
    check_finite("row", sample_ND)
    rng = _rng(seed, _REPEAT_STREAM)
    rows_KD = sample_ND[np.arange(num_centroids) % len(sample_ND)].astype(np.float64)
    for repeat in range(len(sample_ND), num_centroids):
        rows_KD[repeat] += _perturbation(rows_KD[repeat], rng)
    return _finished(rows_KD, metric)


def _rng(seed: int, stream: int) -> np.random.Generator:
    """Own random numbers for every iteration, so that a checkpoint needs no generator state."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream])))


def _sub_seed(seed: int, part: int) -> int:
    return int(np.random.SeedSequence([seed, _SUB_STREAM, part]).generate_state(1, np.uint64)[0])


def _check_checkpoint(checkpoint: Checkpoint, iterations: int, shape: tuple[int, int], num_rows: int) -> None:
    if not 0 <= checkpoint.iteration <= iterations:
        raise ValueError(f"the checkpoint's iteration must be in 0..{iterations}, got {checkpoint.iteration}")
    for name, array, dtype, expected in (
        ("centroids", checkpoint.centroids_KD, np.float32, shape),
        ("lists", checkpoint.list_no_N, np.int32, (num_rows,)),
    ):
        if array.shape != expected or array.dtype != dtype:
            raise ValueError(
                f"the checkpoint's {name} must be {np.dtype(dtype)} {expected}, got {array.dtype} {array.shape}"
            )
