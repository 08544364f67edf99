"""What every kernel means: plain NumPy in float64, or integers, with loops where they say it best. Slow, and the measure.

Shapes: T tokens, S segments, N rows, Q queries, K centroids or codewords, D dimensions, C candidates, M sub-quantizers,
B bytes of packed bits, H hashes. Inputs are good ones: the kernels check theirs, this does not. Larger scores are better,
and ties go to the lowest id. Scores are rounded to float32 before they are ordered where the kernel returns them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]


def pooled(
    states_TD: Array, offsets: Int64Array, mode: str, normalize: bool, truncate_dim: int | None = None
) -> Float64Array:
    """kernels.pool.pool_normalize before the cast: float64 [S, D]."""
    vectors_SD = np.empty((len(offsets) - 1, truncate_dim or states_TD.shape[1]), np.float64)
    for segment in range(len(vectors_SD)):
        tokens = states_TD[offsets[segment] : offsets[segment + 1], :truncate_dim].astype(np.float64)
        if mode == "cls":
            vectors_SD[segment] = tokens[0]
        elif mode == "last":
            vectors_SD[segment] = tokens[-1]
        elif mode == "max":
            vectors_SD[segment] = tokens.max(axis=0)
        elif mode == "weighted_mean":
            weights = np.arange(1, len(tokens) + 1, dtype=np.float64)
            vectors_SD[segment] = (tokens * weights[:, None]).sum(axis=0) / weights.sum()
        else:
            divisor = len(tokens) if mode == "mean" else len(tokens) ** 0.5
            vectors_SD[segment] = tokens.sum(axis=0) / divisor
    if normalize:
        norms_S = np.sqrt(np.square(vectors_SD).sum(axis=1))
        vectors_SD /= np.where(norms_S > 0, norms_S, 1.0)[:, None]
    return vectors_SD


def quantized_int8(vectors_SD: Float64Array) -> tuple[npt.NDArray[np.int8], Float32Array]:
    """Codes int8 [S, D] and scales float32 [S]: a vector is about scale * codes, and scale is max |v| / 127."""
    largest_S = np.abs(vectors_SD).max(axis=1, initial=0.0)
    scale_S = (largest_S / 127.0).astype(np.float32)
    divisor_S = np.where(scale_S > 0, largest_S, np.inf)  # a scale that float32 cannot hold is 0, and so are the codes
    return np.rint(vectors_SD / divisor_S[:, None] * 127.0).astype(np.int8), scale_S


def pool_normalize(
    states_TD: Array,
    offsets: Int64Array,
    *,
    mode: str,
    normalize: bool = True,
    truncate_dim: int | None = None,
    dtype: str = "float32",
) -> Any:
    """As kernels.pool.pool_normalize."""
    vectors_SD = pooled(states_TD, offsets, mode, normalize, truncate_dim)
    if dtype == "int8":
        return quantized_int8(vectors_SD)
    if dtype == "binary":
        return np.packbits(vectors_SD > 0, axis=1)
    return vectors_SD.astype(dtype)


def scores(q_QD: Array, x_ND: Array, metric: str) -> Float64Array:
    """Inner products ("ip") or negative squared distances ("l2") of all pairs, float64 [Q, N]."""
    q_QD, x_ND = q_QD.astype(np.float64), x_ND.astype(np.float64)
    scores_QN = np.empty((len(q_QD), len(x_ND)))
    for query in range(len(q_QD)):
        if metric == "ip":
            scores_QN[query] = (x_ND * q_QD[query]).sum(axis=1)
        else:
            scores_QN[query] = -np.square(x_ND - q_QD[query]).sum(axis=1)
    return scores_QN


def assign_nearest(x_ND: Array, centroids_KD: Array, *, metric: str) -> Int32Array:
    """As kernels.assign.assign_nearest."""
    return scores(x_ND, centroids_KD, metric).argmax(axis=1).astype(np.int32)


def assign_topk(q_QD: Array, centroids_KD: Array, k: int, *, metric: str) -> tuple[Float32Array, Int32Array]:
    """As kernels.assign.assign_topk."""
    best_Qk, list_no_Qk = topk(scores(q_QD, centroids_KD, metric).astype(np.float32), k)
    return best_Qk, list_no_Qk.astype(np.int32)


def assign_two_level(
    x_ND: Array, group_K: Int64Array, centroids_KD: Array, groups_GD: Array, metric: str, slack: float
) -> Int32Array:
    """As kernels.assign_two_level.assign_two_level, of centroids that are in the groups group_K."""
    near_NG = scores(x_ND, groups_GD, metric)
    near_NG = near_NG >= near_NG.max(axis=1, keepdims=True) - slack
    scores_NK = np.where(near_NG[:, group_K], scores(x_ND, centroids_KD, metric), -np.inf)
    return scores_NK.argmax(axis=1).astype(np.int32)


def partial_sums(rows_ND: Array, list_no_N: Int32Array, num_centroids: int) -> tuple[Float64Array, Int64Array]:
    """As kernels.kmeans.partial_sums."""
    sums_KD = np.zeros((num_centroids, rows_ND.shape[1]))
    counts_K = np.zeros(num_centroids, np.int64)
    for row_D, list_no in zip(rows_ND, list_no_N, strict=True):
        sums_KD[list_no] += row_D.astype(np.float64)
        counts_K[list_no] += 1
    return sums_KD, counts_K


def lloyd_iteration(x_ND: Array, centroids_KD: Array, *, metric: str) -> tuple[Float64Array, Int64Array]:
    """Means of the rows nearest to each centroid, float64 [K, D], of unit length for "ip", and their numbers.

    The mean of no rows is 0 here; kernels.kmeans puts half of the biggest cluster in its place.
    """
    sums_KD, counts_K = partial_sums(x_ND, assign_nearest(x_ND, centroids_KD, metric=metric), len(centroids_KD))
    means_KD = sums_KD / np.maximum(counts_K, 1)[:, None]
    if metric == "ip":
        norms_K = np.sqrt(np.square(means_KD).sum(axis=1))
        means_KD /= np.where(norms_K > 0, norms_K, 1.0)[:, None]
    return means_KD, counts_K


def pq_encode(residuals_ND: Array, codebooks_MKS: Float32Array) -> UInt8Array:
    """As kernels.pq.pq_encode."""
    M, num_codewords, sub_dims = codebooks_MKS.shape
    nearest_NM = np.empty((len(residuals_ND), M), np.uint8)
    for m in range(M):
        sub_NS = residuals_ND[:, m * sub_dims : (m + 1) * sub_dims]
        nearest_NM[:, m] = assign_nearest(sub_NS, codebooks_MKS[m], metric="l2")
    if num_codewords == 256:
        return nearest_NM
    pairs_NM = np.pad(nearest_NM, ((0, 0), (0, M % 2)))
    return pairs_NM[:, 0::2] + 16 * pairs_NM[:, 1::2]


def pq_decode(codes: UInt8Array, codebooks_MKS: Float32Array) -> Float32Array:
    """As kernels.pq.pq_decode."""
    M, num_codewords, _ = codebooks_MKS.shape
    if num_codewords == 16:
        codes = np.stack([codes % 16, codes // 16], axis=2).reshape(len(codes), 2 * codes.shape[1])
    return np.concatenate([codebooks_MKS[m][codes[:, m]] for m in range(M)], axis=1)


def topk(scores_QN: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
    """As kernels.topk.topk."""
    index = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k].astype(np.int64)
    missing = ((0, 0), (0, k - index.shape[1]))
    best = np.take_along_axis(scores_QN, index, axis=1)
    return np.pad(best, missing, constant_values=-np.inf), np.pad(index, missing, constant_values=-1)


def merge_topk(lists: list[tuple[Float32Array, Int64Array]], k: int) -> tuple[Float32Array, Int64Array]:
    """As kernels.topk.merge_topk."""
    num_queries = len(lists[0][0])
    best = (np.full((num_queries, k), -np.inf, np.float32), np.full((num_queries, k), -1, np.int64))
    for query in range(num_queries):
        pairs = [(-score, row) for found, ids in lists for score, row in zip(found[query], ids[query], strict=True)]
        for place, (negated, row) in enumerate(sorted(pair for pair in pairs if pair[1] >= 0)[:k]):
            best[0][query, place], best[1][query, place] = -negated, row
    return best


def exact_search(queries_QD: Array, x_ND: Array, k: int, *, metric: str) -> tuple[Float32Array, Int64Array]:
    """As kernels.topk.exact_search of one block that starts at row 0."""
    return topk(scores(queries_QD, x_ND, metric).astype(np.float32), k)


def rescore(queries_QD: Array, candidates_QCD: Array, *, metric: str) -> Float32Array:
    """As kernels.topk.rescore."""
    rows = [
        scores(query_D[None], own_CD, metric)[0] for query_D, own_CD in zip(queries_QD, candidates_QCD, strict=True)
    ]
    return np.array(rows, np.float32).reshape(candidates_QCD.shape[:2])


def hamming_distances(q_QB: UInt8Array, x_NB: UInt8Array) -> Int32Array:
    """As kernels.hamming.hamming_distances."""
    differ_QNb = np.unpackbits(q_QB, axis=1)[:, None] != np.unpackbits(x_NB, axis=1)[None]
    return differ_QNb.sum(axis=2).astype(np.int32)


def hamming_search(q_QB: UInt8Array, x_NB: UInt8Array, k: int) -> tuple[Int32Array, Int64Array]:
    """As kernels.hamming.hamming_search."""
    distances_QN = hamming_distances(q_QB, x_NB)
    rows = np.argsort(distances_QN, axis=1, kind="stable")[:, :k].astype(np.int64)
    missing = ((0, 0), (0, k - rows.shape[1]))
    found = np.take_along_axis(distances_QN, rows, axis=1)
    most = np.iinfo(np.int32).max
    return np.pad(found, missing, constant_values=most), np.pad(rows, missing, constant_values=-1)


def minhash(
    tokens_T: Array, offsets: Int64Array, *, num_hashes: int = 128, shingle: int = 5, seed: int
) -> npt.NDArray[np.uint32]:
    """As kernels.minhash.minhash, which has the formulas; Python's own integers, cut to 64 bits."""
    word, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z &= word
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        return z ^ (z >> 31)

    signatures = np.empty((len(offsets) - 1, num_hashes), np.uint32)
    for segment in range(len(signatures)):
        tokens = tokens_T[offsets[segment] : offsets[segment + 1]].tolist()
        keys = []
        for start in range(max(1, len(tokens) - shingle + 1)):
            key = 0
            for token in tokens[start : start + shingle]:
                key = key * 0xD1342543DE82EF95 + mix(token + golden)
            keys.append(mix(key + mix(seed + golden)))
        for i in range(num_hashes):
            a, b = mix(seed + (2 * i + 2) * golden) | 1, mix(seed + (2 * i + 3) * golden)
            signatures[segment, i] = min((a * x + b) & word for x in keys) >> 32
    return signatures
