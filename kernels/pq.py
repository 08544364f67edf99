"""Product quantizer: codebooks, codes in faiss's layout, and rows back from codes.

Shapes: N rows, D dimensions, L lists, M sub-quantizers, K = 2^nbits codewords each, S = D / M dimensions of a
sub-vector, B rows of a block.

A row's codes and its decoded values do not depend on the other rows of the call, on their number, on the number of
threads, the kind of processor or whether numba is there (see kernels.pq_codewords).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.blocks import check_finite, check_matrix, check_same_dims, on_device
from kernels.kmeans import _rng, kmeans
from kernels.pq_codewords import Codewords, encode_block, lloyd_step
from kernels.threads import run_blocks

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
CodeArray = npt.NDArray[np.uint8]

NBITS = (4, 8)
# Rows encoded by one thread at a time: at 384 dimensions 1.5 MiB of float32. Does not change the codes.
BLOCK_ROWS = 1024
# Rows a codeword that a training uses: of its first, its next and its last iterations. The last is also faiss's most
# (ClusteringParameters::max_points_per_centroid).
ROWS_PER_CODEWORD = (16, 64, 256)
# A codeword goes 1.9 times as far as to its mean. Below twice, the error of the present assignment still falls; 16
# iterations, six of them over all rows, then come within 0.5 % of the error of 25 plain ones over all rows.
STEP = 1.9
# Squares and sums of them stay within float32.
LARGEST_VALUE = 2.0**50
# A stream of random numbers apart from those of the iterations, as in kernels.kmeans.
_ORDER_STREAM = 1 << 42


def check_quantizer(num_dims: int, M: int, nbits: int) -> None:
    """Raises ValueError unless M divides D and nbits is one of NBITS."""
    if M < 1 or num_dims % M:
        raise ValueError(f"M must divide D ({num_dims}), got {M}")
    if nbits not in NBITS:
        raise ValueError(f"nbits must be one of {', '.join(map(str, NBITS))}, got {nbits}")


def code_size(M: int, nbits: int) -> int:
    """Bytes of one row's code."""
    return (M * nbits + 7) // 8


def pq_train(residuals_ND: npt.NDArray[Any], M: int, nbits: int, *, seed: int, iterations: int = 16) -> Float32Array:
    """Codebooks float32 [M, 2^nbits, D/M]: an l2 k-means of each sub-space. M must divide D, nbits be 4 or 8.

    Deterministic: the same bits for the same rows and seed, with any number of threads, with numba and without.
    - At most 256 rows a codeword are used: a seeded choice of them where there are more.
    - The first iterations go over a seeded part of these, the last third of the iterations over all (_part_sizes).
    - Fewer rows than codewords are repeated, and an empty cluster takes half of the biggest, as `kmeans` documents.

    residuals_ND as for pq_encode. ValueError for no rows, or for rows that are used and hold a NaN, an infinity or
    more than LARGEST_VALUE; it names the first.
    """
    check_matrix("residuals_ND", residuals_ND)
    num_rows, num_dims = residuals_ND.shape
    check_quantizer(num_dims, M, nbits)
    for name, value, least in (("iterations", iterations, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    sub_dims, num_codewords = num_dims // M, 1 << nbits
    sizes = _part_sizes(num_rows, num_codewords, iterations)
    order_N = _nested_order(num_rows, sizes, seed)

    def train_one(m: int) -> Float32Array | None:
        columns = slice(m * sub_dims, (m + 1) * sub_dims)
        sub_seed = int(np.random.SeedSequence([seed, m]).generate_state(1, np.uint64)[0])
        if num_rows <= num_codewords:
            return kmeans(residuals_ND[:, columns], num_codewords, metric="l2", seed=sub_seed)
        rows_NS = residuals_ND[order_N, columns].astype(np.float32)
        # Not more than, so that a NaN is found as well.
        if not np.abs(rows_NS).max() <= LARGEST_VALUE:
            return None
        return _lloyd(rows_NS, num_codewords, sizes, sub_seed)

    # Sub-quantizers side by side on one thread each.
    codebooks = [codebook for codebook in run_blocks(train_one, range(M)) if codebook is not None]
    if len(codebooks) < M:
        check_finite("row", residuals_ND)
        row = int(np.argmax(np.abs(residuals_ND).max(axis=1) > LARGEST_VALUE))
        raise ValueError(f"values must be within -2^50 .. 2^50: row {row} holds a larger one")
    return np.stack(codebooks)


def pq_encode(residuals_ND: npt.NDArray[Any], codebooks_MKS: Float32Array) -> CodeArray:
    """Codes uint8 [N, code_size]: nearest codeword of each sub-vector, ties to the lowest, as faiss packs them.

    residuals_ND: float32 or float16 on the host, of any layout, also memory-mapped, read block by block; or a CuPy
    array, and then the codes are one.
    nbits 8: one byte a sub-quantizer. nbits 4: two a byte, the first in the low four bits; an odd M leaves the last
    four bits zero. Raises ValueError that names the first row with a NaN, an infinity or scores beyond float32.
    """
    if on_device(residuals_ND):
        from kernels.cuda.pq import pq_encode as encode_on_device

        return encode_on_device(residuals_ND, codebooks_MKS)
    check_matrix("residuals_ND", residuals_ND)
    no_centroids_LD = np.empty((0, residuals_ND.shape[1]), np.float32)
    return _encode("residuals_ND", residuals_ND, no_centroids_LD, np.empty(0, np.int64), codebooks_MKS)


def pq_encode_residuals(
    x_ND: npt.NDArray[Any], centroids_LD: npt.NDArray[Any], list_no_N: npt.NDArray[Any], codebooks_MKS: Float32Array
) -> CodeArray:
    """The codes of pq_encode for x_ND - centroids_LD[list_no_N] (in float32), which is never held as a whole.

    x_ND, centroids_LD: float32 or float16 on the host (x_ND also memory-mapped), or CuPy arrays, and then the codes are
    one; list_no_N: integers [N] in 0..L-1.
    """
    if on_device(x_ND):
        from kernels.cuda.pq import pq_encode_residuals as encode_on_device

        return encode_on_device(x_ND, centroids_LD, list_no_N, codebooks_MKS)
    check_matrix("x_ND", x_ND)
    check_matrix("centroids_LD", centroids_LD)
    check_same_dims("centroids_LD", centroids_LD, "x_ND", x_ND.shape[1])
    check_finite("centroid", centroids_LD)
    if list_no_N.shape != (len(x_ND),) or not np.issubdtype(list_no_N.dtype, np.integer):
        raise ValueError(f"list_no_N must be integers [{len(x_ND)}], got {list_no_N.dtype} {list_no_N.shape}")
    if len(x_ND) and not 0 <= list_no_N.min() <= list_no_N.max() < len(centroids_LD):
        raise ValueError(
            f"list_no_N must be in 0..L-1 ({len(centroids_LD) - 1}), got {list_no_N.min()}..{list_no_N.max()}"
        )
    return _encode(
        "x_ND", x_ND, np.require(centroids_LD, np.float32, ["C", "ALIGNED", "ENSUREARRAY"]), list_no_N, codebooks_MKS
    )


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


def _encode(
    name: str,
    x_ND: npt.NDArray[Any],
    centroids_LD: Float32Array,
    list_no_N: npt.NDArray[Any],
    codebooks_MKS: Float32Array,
) -> CodeArray:
    """Codes of the rows less the centroids of their lists; of the rows themselves where there are no centroids."""
    M, nbits, sub_dims = _check_codebooks(codebooks_MKS)
    check_same_dims(name, x_ND, "the codebooks", M * sub_dims)
    words = Codewords.of(codebooks_MKS)
    codes = np.zeros((len(x_ND), code_size(M, nbits)), np.uint8)

    def encode_rows(start: int) -> None:
        stop = min(start + BLOCK_ROWS, len(x_ND))
        # Numba takes plain arrays of aligned values.
        block_BD = np.require(x_ND[start:stop], np.float32, ["ALIGNED", "ENSUREARRAY"])
        list_no_B = np.require(list_no_N[start:stop], np.int64, ["C", "ALIGNED", "ENSUREARRAY"])
        bad = encode_block(block_BD, centroids_LD, list_no_B, codebooks_MKS, words, codes[start:stop])
        if bad >= 0:
            row = start + bad
            check_finite("row", x_ND[row : row + 1], row)
            raise ValueError(f"scores must be within float32: those of row {row} are not (its values are too large)")

    run_blocks(encode_rows, range(0, len(x_ND), BLOCK_ROWS))
    return codes


def _part_sizes(num_rows: int, num_codewords: int, iterations: int) -> list[int]:
    """Rows of each iteration: of 16, six over 16 rows a codeword, four over 64 and six over 256."""
    last = -(-iterations // 3)
    middle = (iterations - last) * 2 // 5
    per_codeword = np.repeat(ROWS_PER_CODEWORD, (iterations - last - middle, middle, last))
    return [min(num_rows, rows * num_codewords) for rows in per_codeword.tolist()]


def _nested_order(num_rows: int, sizes: list[int], seed: int) -> Int64Array:
    """Rows such that the first of each size are a random choice; ascending in between, which is read faster."""
    drawn_N = _rng(seed, _ORDER_STREAM).permutation(num_rows)
    parts = np.split(drawn_N[: sizes[-1]], sorted(set(sizes)))
    return np.concatenate([np.sort(part) for part in parts])


def _lloyd(rows_NS: Float32Array, num_codewords: int, sizes: list[int], seed: int) -> Float32Array:
    """Codebook [K, S] after iterations over the first rows of these sizes, from random ones of the first."""
    first_K = np.sort(_rng(seed, 0).choice(sizes[0], num_codewords, replace=False))
    codebook_KS = rows_NS[first_K]
    for iteration, size in enumerate(sizes, 1):
        step = STEP if 1 < iteration < len(sizes) else 1.0
        codebook_KS, _ = lloyd_step(rows_NS[:size], codebook_KS, step=step, seed=seed, iteration=iteration)
    return codebook_KS


def _check_codebooks(codebooks_MKS: Float32Array) -> tuple[int, int, int]:
    """M, nbits and S of the codebooks."""
    if codebooks_MKS.ndim != 3 or codebooks_MKS.shape[1] not in (16, 256) or codebooks_MKS.dtype != np.float32:
        raise ValueError(
            f"codebooks must be float32 [M, 16 or 256, D/M], got {codebooks_MKS.dtype} {codebooks_MKS.shape}"
        )
    M, num_codewords, sub_dims = codebooks_MKS.shape
    return M, num_codewords.bit_length() - 1, sub_dims
