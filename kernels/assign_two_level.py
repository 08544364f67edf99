"""Nearest centroid among many, at the cost of a few: centroids in groups, and only a row's near groups are looked at.

Shapes: N rows, K centroids, D dimensions, G groups (about sqrt(K)), B rows of a block, R those that look at one group.

A row's list is defined exactly: the best centroid in float64, ties to the lowest id, among the members of the groups
whose float64 score is within `slack` of the best group's. As in kernels/assign.py float32 products propose and float64
decides what their rounding cannot, so a list depends on the row, the groups and the slack alone. It is the nearest of
all centroids for a share of the rows that `measure_slack` states. (A slack costs a third fewer candidates than a fixed
number of groups at the same share: rows in the middle of a group need one, rows at a border several.)
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.assign import (
    UNIT_ROUNDOFF_32,
    UNIT_ROUNDOFF_64,
    assign_nearest,
    compiled_assign,
    prepare_centroids,
    row_norms,
    score_error,
)
from kernels.blocks import check_finite, check_matrix, check_same_dims
from kernels.threads import run_blocks

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

# Rows of a block: few enough for the shared cache, which they are gathered from several times, and many enough that
# those that look at one group make a matrix product of some size.
# There are BLOCKS_PER_THREAD of them, or blocks of MIN_BLOCK_ROWS. None of it changes a list.
BLOCK_BYTES, MIN_BLOCK_ROWS, BLOCKS_PER_THREAD = 12 << 20, 2048, 2
# Shapes of the products are multiples of these (see _padded).
MEMBER_STEP, ROW_STEP = 16, 64
UNIT_ROUNDOFF_BF16 = 2.0**-8  # 8 bits of significand, one of them implicit
# Relative rounding of a product that is known after it, with a margin for the arithmetic of the bound itself.
PRODUCT_ROUNDING = 1.01 * UNIT_ROUNDOFF_BF16


@dataclass(frozen=True, eq=False)
class Deviations:
    """Centroids less their group's centroid, group by group and padded (twice that for l2): [>= K, D].

    A centroid's product with a row is that of its group's centroid and that of the deviation, which is small and so has
    a small rounding error even in bfloat16.
    """

    typed_KD: torch.Tensor  # float32 or bfloat16
    largest_norm_G: Float64Array  # of each group's, and of what the type rounds off, a little up
    largest_rounding_G: Float64Array


@dataclass(frozen=True, eq=False)
class CentroidGroups:
    """Centroids float32 [K, D] in G groups: group g holds the ids members[starts[g] : starts[g + 1]], ascending."""

    metric: str
    centroids_KD: Float32Array
    group_centroids_GD: Float32Array
    starts: Int64Array  # [G + 1]
    members: Int32Array  # [K]

    @property
    def num_groups(self) -> int:
        return len(self.group_centroids_GD)

    @cached_property
    def padded_starts(self) -> Int64Array:
        """`starts` of groups that zeros fill up to a multiple of MEMBER_STEP, int64 [G + 1]."""
        return np.concatenate([[0], np.cumsum(-(-np.diff(self.starts) // MEMBER_STEP) * MEMBER_STEP)])

    @cached_property
    def _float32_deviations(self) -> Deviations:
        return self._typed_deviations(torch.float32)

    @cached_property
    def _bfloat16_deviations(self) -> Deviations:
        return self._typed_deviations(torch.bfloat16)

    def deviations(self, dtype: torch.dtype) -> Deviations:
        return self._bfloat16_deviations if dtype == torch.bfloat16 else self._float32_deviations

    def _typed_deviations(self, dtype: torch.dtype) -> Deviations:
        scale = 2.0 if self.metric == "l2" else 1.0
        typed_KD = torch.zeros((int(self.padded_starts[-1]), self.centroids_KD.shape[1]), dtype=dtype)
        norm_G, rounding_G = np.empty(self.num_groups), np.empty(self.num_groups)
        for g, place in enumerate(self.padded_starts[:-1].tolist()):
            members = self.members[self.starts[g] : self.starts[g + 1]]
            exact = self.centroids_KD[members].astype(np.float64) - self.group_centroids_GD[g]
            typed = typed_KD[place : place + len(members)]
            typed.copy_(torch.from_numpy(scale * exact))
            wide = typed.double().numpy()
            norm_G[g] = np.linalg.norm(wide, axis=1).max()
            rounding_G[g] = np.linalg.norm(wide - scale * exact, axis=1).max()
        return Deviations(typed_KD, 1.01 * norm_G, 1.01 * rounding_G)

    @cached_property
    def member_bias(self) -> Float32Array:
        """What is added to the products of the members, float32 [K], group by group."""
        return prepare_centroids(self.centroids_KD[self.members], self.metric)[1]

    @cached_property
    def scaled_groups(self) -> tuple[torch.Tensor, Float32Array]:
        return prepare_centroids(self.group_centroids_GD, self.metric)

    @cached_property
    def max_norms(self) -> tuple[float, float]:
        """Largest norm of the group centroids and of the centroids."""
        group_norms_G, norms_K = row_norms(self.group_centroids_GD), row_norms(self.centroids_KD)
        return float(group_norms_G.max()), float(norms_K.max())


def form_groups(centroids_KD: Float32Array, group_centroids_GD: Float32Array, *, metric: str) -> CentroidGroups:
    """Every centroid in the group of the nearest group centroid; groups that stay empty are left out."""
    group_K = assign_nearest(centroids_KD, group_centroids_GD, metric=metric)
    sizes_G = np.bincount(group_K, minlength=len(group_centroids_GD))
    members = np.argsort(group_K, kind="stable").astype(np.int32)
    kept = sizes_G > 0
    starts = np.concatenate([[0], np.cumsum(sizes_G[kept])])
    return CentroidGroups(metric, centroids_KD, np.ascontiguousarray(group_centroids_GD[kept]), starts, members)


def assign_two_level(
    x_ND: npt.NDArray[Any], groups: CentroidGroups, *, slack: float, current_N: Int32Array | None = None
) -> Int32Array:
    """Nearest centroid of every row among the groups whose score is within `slack` of its best group's: int32 [N].

    x_ND: float32 or float16 on the host, may be memory-mapped. `slack` is in units of the score (inner product, or
    squared distance) and comes from `measure_slack`; an infinite one gives assign_nearest. Deterministic, for a row in
    whatever call it comes (see the module). A row keeps its list of `current_N` (int32; -1 for none) where that one's
    centroid is strictly nearer, in float64, than what is found: an iteration of a training never loses ground.
    Raises ValueError that names the first row with a NaN, an infinity or a score beyond float32.
    """
    if not slack >= 0:
        raise ValueError(f"slack must be at least 0, got {slack}")
    if np.isinf(slack):
        return assign_nearest(x_ND, groups.centroids_KD, metric=groups.metric)
    check_matrix("x_ND", x_ND)
    check_same_dims("x_ND", x_ND, "the centroids", groups.centroids_KD.shape[1])
    few_rows = -(-len(x_ND) // (BLOCKS_PER_THREAD * torch.get_num_threads()))
    block_rows = max(MIN_BLOCK_ROWS, min(few_rows, BLOCK_BYTES // (4 * x_ND.shape[1])))
    list_no_N = np.empty(len(x_ND), np.int32)
    compiled = compiled_assign()
    scratch = threading.local()
    if compiled is not None:
        groups.deviations(_product_type())  # once, and not by each thread

    def assign_block(start: int) -> None:
        block_BD = np.array(x_ND[start : start + block_rows], dtype=np.float32, order="C")
        if compiled is None:
            check_finite("row", block_BD, start)
            found = _assign_in_float64(block_BD, groups, slack)
        else:
            try:
                found = _assign_block(block_BD, groups, slack, compiled, scratch)
            except ScoreError as error:
                check_finite("row", block_BD, start)
                row = start + int(np.abs(block_BD).max(axis=1).argmax())
                raise ValueError(
                    f"scores must be within float32: those of row {row} are not (its values are too large)"
                ) from error
        if current_N is not None:
            _keep_nearer(block_BD, groups, current_N[start : start + block_rows], found, compiled)
        list_no_N[start : start + len(block_BD)] = found

    run_blocks(assign_block, range(0, len(x_ND), block_rows))
    return list_no_N


def measure_slack(sample_ND: npt.NDArray[Any], groups: CentroidGroups, *, target: float) -> tuple[float, float]:
    """(slack, share): the least slack that leads at least `target` of the sample's rows to their nearest centroid.

    `share` is the share of the sample's rows that it does. Costs one exact assignment of the sample.
    """
    if len(sample_ND) == 0:
        raise ValueError("measure_slack needs at least one row, got 0")
    if not 0 < target <= 1:
        raise ValueError(f"target must be in (0, 1], got {target}")
    group_K = np.empty(len(groups.centroids_KD), np.int64)
    group_K[groups.members] = np.repeat(np.arange(groups.num_groups), np.diff(groups.starts))
    nearest_N = assign_nearest(sample_ND, groups.centroids_KD, metric=groups.metric)
    scores_NG = _float64_scores(sample_ND.astype(np.float64), groups.group_centroids_GD, groups.metric)
    own_N = np.take_along_axis(scores_NG, group_K[nearest_N][:, None], axis=1)[:, 0]
    needed_N = np.sort(scores_NG.max(axis=1) - own_N)
    place = int(np.ceil(target * len(needed_N))) - 1
    # A little more than needed, so that the row that sets it is in whatever way its scores round.
    slack = float(needed_N[place]) * (1 + 1e-9)
    return slack, float((needed_N <= slack).mean())


def _assign_block(
    block_BD: Float32Array, groups: CentroidGroups, slack: float, compiled: Any, scratch: threading.local
) -> Int32Array:
    """The lists of a block's rows. Matrix products, in bfloat16 where the processor has it, bound every score from both
    sides; the few pairs that may be a row's best go to float64."""
    from kernels import assign_bf16_compiled as near_best

    num_rows, num_dims = block_BD.shape
    block = torch.from_numpy(block_BD)
    norms_B = row_norms(block_BD)
    starts_G, rows, offsets_GB = _pairs(block, norms_B, groups, slack, compiled)
    dtype = _product_type()
    bits, rounding = (np.uint16, PRODUCT_ROUNDING) if dtype == torch.bfloat16 else (np.uint32, 0.0)
    typed, deviations = block.to(dtype), groups.deviations(dtype)
    errors = error_B, *_ = _score_errors(block, typed, norms_B, groups)
    bound_B = np.full(num_rows, -np.inf, np.float32)
    candidates, uppers = np.empty((2, 8 * num_rows + 64), np.int32), np.empty(8 * num_rows + 64, np.float32)
    found = 0
    members, padded = groups.starts.tolist(), groups.padded_starts.tolist()
    widths_G = _padded(np.diff(starts_G))
    starts = starts_G.tolist()
    gathered = _buffer(scratch, "gathered", int(widths_G.max()) * num_dims, dtype)
    product = _buffer(scratch, "product", int((widths_G * np.diff(groups.padded_starts)).max()), dtype)
    for g in np.flatnonzero(widths_G).tolist():
        rows_R, width = rows[starts[g] : starts[g + 1]], int(widths_G[g])
        rows_RD = gathered[: width * num_dims].view(width, num_dims)
        torch.index_select(typed, 0, torch.from_numpy(rows_R), out=rows_RD[: len(rows_R)])
        shape = (padded[g + 1] - padded[g], width)
        products_KR = product[: shape[0] * width].view(shape)
        torch.mm(deviations.typed_KD[padded[g] : padded[g + 1]], rows_RD.t(), out=products_KR)
        arguments = (
            products_KR.view(torch.int16 if bits == np.uint16 else torch.int32).numpy().view(bits),
            groups.member_bias[members[g] : members[g + 1]],
            rounding,
            rows_R,
            groups.members[members[g] : members[g + 1]],
            offsets_GB[g],
            *errors,
            deviations.largest_norm_G[g],
            deviations.largest_rounding_G[g],
            bound_B,
        )
        while (more := near_best.find_near_best_of_group(*arguments, candidates, uppers, found)) < 0:
            candidates = np.concatenate([candidates, np.empty_like(candidates)], axis=1)
            uppers = np.concatenate([uppers, np.empty_like(uppers)])
        found = more
    if not np.isfinite(bound_B).all():
        raise ScoreError
    nearest_B = np.empty(num_rows, np.int32)
    error64_B = score_error(norms_B, groups.max_norms[1], num_dims, groups.metric, UNIT_ROUNDOFF_64)
    alone = compiled.decide_candidates(
        candidates[:, :found],
        uppers[:found],
        bound_B,
        error_B,  # of the roundings of the upper bound itself, by far
        block_BD,
        groups.centroids_KD,
        groups.metric == "l2",
        error64_B,
        nearest_B,
    )
    assert alone < 0, f"row {alone} of a block has no candidate"
    return nearest_B


def _padded(sizes: Int64Array) -> Int64Array:
    """Sizes rounded up by at most an eighth to one of few: oneDNN compiles a bfloat16 product for every shape."""
    steps = np.maximum(ROW_STEP, 1 << np.maximum(np.log2(np.maximum(sizes, 1)).astype(np.int64) - 3, 0))
    return -(-sizes // steps) * steps


def _score_errors(
    block: torch.Tensor, typed: torch.Tensor, norms_B: Float64Array, groups: CentroidGroups
) -> tuple[Float32Array, Float32Array, Float32Array]:
    """(error, rounding, norm) float32 [B], rounded up, such that but for the rounding of the bfloat16 product itself a
    row's scores are within error + rounding * largest_norm_G + norm * largest_rounding_G of the true ones.

    With x^ and d^ for what the type makes of row and deviation, xd - x^d^ = (x - x^) d^ + x (d - d^), and Cauchy-Schwarz.
    error: sums in float32, of the products of both parts and their sum, as kernels.assign.score_error; and numbers below
    bfloat16's smallest normal one, which the processor takes for zero.
    """
    largest, num_dims = max(groups.max_norms), block.shape[1]
    error_B = 4.0 * score_error(1.01 * norms_B, 1.01 * largest, num_dims, groups.metric, UNIT_ROUNDOFF_32)
    rounding_B = np.zeros_like(norms_B)
    if typed.dtype == torch.bfloat16:
        rounding_B = row_norms((block - typed).numpy())
        error_B += num_dims * 2.0**-125 * (norms_B + 4.0 * largest)
    with np.errstate(over="ignore"):  # bounds that are not finite are looked for
        error, rounding, norm = ((1.01 * each).astype(np.float32) for each in (error_B, rounding_B, norms_B))
    return error, rounding, norm


def _keep_nearer(
    block_BD: Float32Array, groups: CentroidGroups, current_B: Int32Array, found_B: Int32Array, compiled: Any
) -> None:
    """Puts back the current list where its centroid is strictly nearer than the one found, in place."""
    squared = groups.metric == "l2"
    if compiled is not None:
        compiled.keep_nearer(block_BD, groups.centroids_KD, np.ascontiguousarray(current_B), squared, found_B)
        return
    rows = np.flatnonzero((current_B >= 0) & (current_B != found_B))
    scores = []
    for lists in (current_B[rows], found_B[rows]):
        row_D = block_BD[rows].astype(np.float64)
        centroids_RD = groups.centroids_KD[lists].astype(np.float64)
        twice = 2.0 * (row_D * centroids_RD).sum(axis=1)
        scores.append(twice - np.square(centroids_RD).sum(axis=1) if squared else twice)
    rows = rows[scores[0] > scores[1]]
    found_B[rows] = current_B[rows]


def _pairs(
    block: torch.Tensor, norms_B: Float64Array, groups: CentroidGroups, slack: float, compiled: Any
) -> tuple[Int64Array, Int64Array, Float32Array]:
    """(starts [G + 1], rows, products [G, B] of the rows with the scaled group centroids).

    rows[starts[g] : starts[g + 1]] of the block look at group g, which is within slack of their best.
    """
    scaled_GD, bias_G = groups.scaled_groups
    products_GB: Float32Array = torch.mm(scaled_GD, block.t()).numpy()
    best_B = np.empty(len(block), np.float32)
    num_pairs = compiled.count_near_groups(products_GB, bias_G, slack, best_B)
    if not np.isfinite(best_B).all():
        raise ScoreError
    error_B = score_error(norms_B, groups.max_norms[0], block.shape[1], groups.metric, UNIT_ROUNDOFF_32)
    starts_G = np.empty(groups.num_groups + 1, np.int64)
    # A group's rows are written before they are counted, hence the room for one more group.
    rows = np.empty(num_pairs + 2 * len(block), np.int64)
    arguments = (products_GB, bias_G, slack, best_B, error_B, block.numpy(), groups.group_centroids_GD)
    while not compiled.rows_of_groups(*arguments, groups.metric == "l2", starts_G, rows):
        rows = np.empty(2 * len(rows), np.int64)
    return starts_G, rows, products_GB


def _assign_in_float64(block_BD: Float32Array, groups: CentroidGroups, slack: float) -> Int32Array:
    """What _assign_block computes, where numba is absent."""
    wide_BD = block_BD.astype(np.float64)
    scores_BG = _float64_scores(wide_BD, groups.group_centroids_GD, groups.metric)
    near_BG = scores_BG >= scores_BG.max(axis=1, keepdims=True) - slack
    norms_B = np.sqrt(np.einsum("bd,bd->b", wide_BD, wide_BD))
    error_B = score_error(norms_B, groups.max_norms[1], block_BD.shape[1], groups.metric, UNIT_ROUNDOFF_64)
    nearest_B = np.empty(len(block_BD), np.int32)
    for row, near_G in enumerate(near_BG):
        members = groups.members[np.repeat(near_G, np.diff(groups.starts))]
        scores = _float64_scores(wide_BD[row : row + 1], groups.centroids_KD[members], groups.metric)[0]
        nearest_B[row] = members[scores >= scores.max() - 2.0 * error_B[row]].min()
    return nearest_B


class ScoreError(ValueError):
    """A row of a block has no finite score."""


def _float64_scores(wide_BD: Float64Array, centroids_KD: Float32Array, metric: str) -> Float64Array:
    """Scores float64 [B, K]; larger is better."""
    wide_KD = centroids_KD.astype(np.float64)
    # einsum without BLAS adds a pair's terms in the same order wherever the pair stands.
    products_BK: Float64Array = np.einsum("bd,kd->bk", wide_BD, wide_KD)
    if metric == "ip":
        return products_BK
    return 2.0 * products_BK - np.einsum("kd,kd->k", wide_KD, wide_KD)


def _product_type() -> torch.dtype:
    return torch.bfloat16 if has_bfloat16() else torch.float32


@lru_cache(maxsize=1)
def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices faster than float32 ones."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _buffer(scratch: threading.local, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """A buffer of this thread, kept from block to block: fresh memory costs page faults."""
    buffer = getattr(scratch, name, None)
    if buffer is None or len(buffer) < size:
        buffer = torch.empty(size + size // 4, dtype=dtype)
        setattr(scratch, name, buffer)
    return buffer
