"""Nearest codewords of rows and a step of their k-means, by kernels.pq_compiled where numba is and else by matrix products.

Shapes: N rows, B rows of a block, D dimensions, L lists, M sub-quantizers, K codewords each, S = D / M dimensions of a
sub-vector, P of them with padding.

Both ways let float64 decide what float32 rounding could tell otherwise, as kernels.assign does: the codes are the same.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.assign import assign_nearest
from kernels.kmeans import _rng, _split_biggest, partial_sums

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
CodeArray = npt.NDArray[np.uint8]


class Codewords(NamedTuple):
    """Codebooks as a scan of all codewords reads them; a score is scaled · row + bias, the larger the nearer."""

    scaled_MKP: Float32Array  # 2c, zeros beyond S
    bias_MK: Float32Array  # -|c|^2
    weight_MP: Float32Array  # largest |2c| of each dimension, then the largest |c|^2: they bound a score's magnitude
    words_MSK: Float64Array  # c
    norms_MK: Float64Array  # |c|^2

    @classmethod
    def of(cls, codebooks_MKS: Float32Array) -> Codewords:
        """ValueError that names the first codeword whose squared norm is not within float32."""
        M, num_codewords, sub_dims = codebooks_MKS.shape
        compiled = compiled_pq()
        padded_dims = sub_dims if compiled is None else compiled.padded_dims(sub_dims)
        scaled_MKP = np.zeros((M, num_codewords, padded_dims), np.float32)
        weight_MP = np.zeros((M, padded_dims + 1), np.float32)
        words_MKS = codebooks_MKS.astype(np.float64)
        norms_MK = np.einsum("mks,mks->mk", words_MKS, words_MKS)
        with np.errstate(over="ignore"):
            np.multiply(codebooks_MKS, np.float32(2.0), out=scaled_MKP[:, :, :sub_dims])
            bias_MK = -norms_MK.astype(np.float32)
        weight_MP[:, :padded_dims] = np.abs(scaled_MKP).max(axis=1)
        weight_MP[:, padded_dims] = -bias_MK.min(axis=1)
        if not np.isfinite(weight_MP).all():
            finite_MK = np.isfinite(bias_MK) & np.isfinite(scaled_MKP).all(axis=2)
            m, k = divmod(int(np.argmin(finite_MK)), num_codewords)
            raise ValueError(f"squared norms must be within float32: that of codeword {k} of sub-quantizer {m} is not")
        return cls(scaled_MKP, bias_MK, weight_MP, np.ascontiguousarray(words_MKS.transpose(0, 2, 1)), norms_MK)


def compiled_pq() -> ModuleType | None:
    """kernels.pq_compiled, or None where numba is not installed."""
    try:
        from kernels import pq_compiled
    except ImportError:
        return None
    return pq_compiled


def encode_block(
    block_BD: Float32Array,
    centroids_LD: Float32Array,
    list_no_B: Int64Array,
    codebooks_MKS: Float32Array,
    words: Codewords,
    codes: CodeArray,
) -> int:
    """Writes the codes of the rows less the centroids of their lists (of the rows where L is 0) into codes, all zero.

    codes: uint8 [B, code_size]. Returns the first row with a NaN, an infinity or scores that may not be within
    float32, and then codes are missing; or -1.
    """
    nbits = codebooks_MKS.shape[1].bit_length() - 1
    compiled = compiled_pq()
    if compiled is not None:
        encode = compiled.encoder(words.scaled_MKP.shape[2])
        return int(encode(block_BD, centroids_LD, list_no_B, *words, nbits, codes))
    with np.errstate(over="ignore", invalid="ignore"):
        residuals_BD = block_BD - centroids_LD[list_no_B] if len(centroids_LD) else block_BD
    bad = _first_bad_row(residuals_BD, words)
    for m in range(len(codebooks_MKS) if bad < 0 else 0):
        nearest_B = _nearest(residuals_BD, m, codebooks_MKS)
        if nbits == 8:
            codes[:, m] = nearest_B
        else:
            codes[:, m // 2] |= nearest_B << (4 * (m % 2))
    return bad


def lloyd_step(
    rows_NS: Float32Array, codebook_KS: Float32Array, *, step: float, seed: int, iteration: int
) -> tuple[Float32Array, CodeArray]:
    """Codebook [K, S] moved `step` times as far as to the means of the rows nearest, and these codewords, uint8 [N].

    Sums are in float64, the rows in their order. An empty cluster takes half of the biggest, seeded as by kernels.kmeans.
    Rows and codewords are within float32 with their squared norms; there are more rows than codewords.
    """
    nearest_N, sums_KS, counts_K = _sums_of_nearest(rows_NS, codebook_KS)
    means_KS = sums_KS / np.maximum(counts_K, 1)[:, None]
    if step != 1.0:
        means_KS = codebook_KS + step * (means_KS - codebook_KS)
    if not counts_K.all():
        _split_biggest(means_KS, counts_K, _rng(seed, iteration))
    return means_KS.astype(np.float32), nearest_N


def _sums_of_nearest(rows_NS: Float32Array, codebook_KS: Float32Array) -> tuple[CodeArray, Float64Array, Int64Array]:
    compiled = compiled_pq()
    if compiled is None:
        nearest_N = _nearest(rows_NS, 0, codebook_KS[None])
        return nearest_N, *partial_sums(rows_NS, nearest_N.astype(np.int32), len(codebook_KS))
    words = Codewords.of(codebook_KS[None])
    nearest_N1 = np.empty((len(rows_NS), 1), np.uint8)
    no_centroids_LD, no_lists = np.empty((0, rows_NS.shape[1]), np.float32), np.empty(0, np.int64)
    compiled.encoder(words.scaled_MKP.shape[2])(rows_NS, no_centroids_LD, no_lists, *words, 8, nearest_N1)
    sums_KS, counts_K = np.zeros(codebook_KS.shape), np.zeros(len(codebook_KS), np.int64)
    compiled.add_to_codewords(rows_NS, nearest_N1[:, 0], sums_KS, counts_K)
    return nearest_N1[:, 0], sums_KS, counts_K


def _first_bad_row(residuals_BD: Float32Array, words: Codewords) -> int:
    """First row whose scores' magnitudes have no finite bound, or -1; as kernels.pq_compiled finds it."""
    M, sub_dims, _ = words.words_MSK.shape
    with np.errstate(over="ignore", invalid="ignore"):
        terms_BMS = np.abs(residuals_BD.reshape(-1, M, sub_dims)) * words.weight_MP[:, :sub_dims]
        finite_B = np.isfinite(terms_BMS.sum(axis=2) + words.weight_MP[:, -1]).all(axis=1)
    return -1 if finite_B.all() else int(np.argmin(finite_B))


def _nearest(rows_ND: Float32Array, m: int, codebooks_MKS: Float32Array) -> CodeArray:
    sub_dims = codebooks_MKS.shape[2]
    sub_NS = np.ascontiguousarray(rows_ND[:, m * sub_dims : (m + 1) * sub_dims])
    return assign_nearest(sub_NS, codebooks_MKS[m], metric="l2").astype(np.uint8)
