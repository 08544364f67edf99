"""Product quantizer: codebooks, codes in faiss's layout, and rows back from codes.

Shapes: N rows, D dimensions, M sub-quantizers, K = 2^nbits codewords each, S = D / M dimensions of a sub-vector.
A row's codes and its decoded values do not depend on the other rows of the call or on their number.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.assign import assign_nearest
from kernels.blocks import check_finite, check_matrix, check_same_dims
from kernels.kmeans import kmeans

Float32Array = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.uint8]

NBITS = (4, 8)


def code_size(M: int, nbits: int) -> int:
    """Bytes of one row's code."""
    return (M * nbits + 7) // 8


def pq_train(residuals_ND: npt.NDArray[Any], M: int, nbits: int, *, seed: int, iterations: int = 15) -> Float32Array:
    """Codebooks float32 [M, 2^nbits, D/M]: an l2 k-means of each sub-space. M must divide D, nbits be 4 or 8.

    Fewer rows than codewords are repeated as `kmeans` documents. Deterministic as `kmeans`. ValueError for no rows.
    """
    check_matrix("residuals_ND", residuals_ND)
    num_dims = residuals_ND.shape[1]
    if M < 1 or num_dims % M:
        raise ValueError(f"M must divide D ({num_dims}), got {M}")
    if nbits not in NBITS:
        raise ValueError(f"nbits must be one of {', '.join(map(str, NBITS))}, got {nbits}")
    sub_dims = num_dims // M
    num_threads = torch.get_num_threads()

    def train_one(m: int) -> Float32Array:
        torch.set_num_threads(1)  # of this pool thread; the products are too small to be worth splitting
        sub_NS = np.ascontiguousarray(residuals_ND[:, m * sub_dims : (m + 1) * sub_dims])
        sub_seed = int(np.random.SeedSequence([seed, m]).generate_state(1, np.uint64)[0])
        return kmeans(sub_NS, 1 << nbits, metric="l2", seed=sub_seed, iterations=iterations)

    # Sub-quantizers side by side on one thread each; the bits do not depend on the number of threads (kmeans).
    with ThreadPoolExecutor(num_threads) as pool:
        codebooks = list(pool.map(train_one, range(M)))
    torch.set_num_threads(num_threads)
    return np.stack(codebooks)


def pq_encode(residuals_ND: npt.NDArray[Any], codebooks_MKS: Float32Array) -> CodeArray:
    """Codes uint8 [N, code_size]: nearest codeword of each sub-vector, ties to the lowest, as faiss packs them.

    nbits 8: one byte a sub-quantizer. nbits 4: two a byte, the first in the low four bits; an odd M leaves the last
    four bits zero. Raises ValueError that names the first row that is not finite.
    """
    M, nbits, sub_dims = _check_codebooks(codebooks_MKS)
    check_matrix("residuals_ND", residuals_ND)
    check_same_dims("residuals_ND", residuals_ND, "the codebooks", M * sub_dims)
    check_finite("row", residuals_ND)
    num_rows = len(residuals_ND)
    columns = code_size(M, nbits)
    codes = np.zeros((num_rows, columns), np.uint8)
    for m in range(M):
        sub_NS = residuals_ND[:, m * sub_dims : (m + 1) * sub_dims]
        nearest_N = assign_nearest(sub_NS, codebooks_MKS[m], metric="l2").astype(np.uint8)
        if nbits == 8:
            codes[:, m] = nearest_N
        else:
            codes[:, m // 2] |= nearest_N << (4 * (m % 2))
    return codes


def pq_decode(codes: CodeArray, codebooks_MKS: Float32Array) -> Float32Array:
    """Rows float32 [N, D] that the codes stand for: the codewords side by side."""
    M, nbits, sub_dims = _check_codebooks(codebooks_MKS)
    if codes.ndim != 2 or codes.dtype != np.uint8 or codes.shape[1] != code_size(M, nbits):
        raise ValueError(f"codes must be uint8 [N, {code_size(M, nbits)}], got {codes.dtype} {codes.shape}")
    rows_ND = np.empty((len(codes), M * sub_dims), np.float32)
    for m in range(M):
        index_N = codes[:, m] if nbits == 8 else (codes[:, m // 2] >> (4 * (m % 2))) & 15
        rows_ND[:, m * sub_dims : (m + 1) * sub_dims] = codebooks_MKS[m][index_N]
    return rows_ND


def _check_codebooks(codebooks_MKS: Float32Array) -> tuple[int, int, int]:
    """M, nbits and S of the codebooks."""
    if codebooks_MKS.ndim != 3 or codebooks_MKS.shape[1] not in (16, 256) or codebooks_MKS.dtype != np.float32:
        raise ValueError(
            f"codebooks must be float32 [M, 16 or 256, D/M], got {codebooks_MKS.dtype} {codebooks_MKS.shape}"
        )
    M, num_codewords, sub_dims = codebooks_MKS.shape
    return M, num_codewords.bit_length() - 1, sub_dims
