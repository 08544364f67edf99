"""Hamming distances of packed bits, and the k nearest rows by them.

Shapes: Q queries, N rows or rows of a block, B bytes of a row, W words of 64 bits (the bytes beyond B are zeros), k results.
Integer arithmetic: the result depends neither on blocks nor on threads.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.blocks import on_device
from kernels.threads import run_blocks

UInt8Array = npt.NDArray[np.uint8]
UInt64Array = npt.NDArray[np.uint64]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

# Rows of a block: 16384 of 48 bytes stay in the second cache while all the queries pass over them.
BLOCK_ROWS = 16384
# Fewer queries do not pay for turning the rows: with one, 2M rows of 96 bytes take 10 ms unturned and 33 ms turned (one
# thread, AVX-512).
FEW_QUERIES = 4
# Rows whose counts are in the first cache at a time, and queries at a time where numba is absent.
TILE_ROWS = 512
TILE_QUERIES = 32
MISSING_DISTANCE = np.iinfo(np.int32).max


def hamming_distances(q_QB: Any, x_NB: Any) -> Any:
    """Number of different bits of every pair: int32 [Q, N].

    q_QB, x_NB: packed bits, uint8, of one B (pool_normalize(..., dtype="binary") gives them), on the host, x_NB may be
    memory-mapped; or CuPy arrays, and then the result is one.
    """
    if on_device(x_NB):
        from kernels.cuda.hamming import hamming_distances as distances_on_device

        return distances_on_device(q_QB, x_NB)
    _check_bits(q_QB, x_NB)
    distances_QN = np.empty((len(q_QB), len(x_NB)), np.int32)
    q_QW = _words(q_QB, by_row=True)
    count, _ = compiled_hamming() or (_count, None)

    def fill_block(start: int) -> None:
        count(q_QW, _words(x_NB[start : start + BLOCK_ROWS]), distances_QN[:, start : start + BLOCK_ROWS])

    run_blocks(fill_block, range(0, len(x_NB), BLOCK_ROWS))
    return distances_QN


def hamming_search(q_QB: UInt8Array, x_NB: UInt8Array, k: int) -> tuple[Int32Array, Int64Array]:
    """The k nearest rows of every query, nearest first: distances int32 [Q, k] and row numbers int64 [Q, k].

    Inputs as hamming_distances, on the host. Ties go to the lowest row. Fewer rows than k: distance 2^31 - 1, row -1.
    Memory is bounded by a block for each thread; never holds Q x N distances.
    """
    _check_bits(q_QB, x_NB)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    q_QW = _words(q_QB, by_row=True)
    compiled = compiled_hamming()
    keep = _keep_nearest if compiled is None else compiled[1]
    by_row = compiled is not None and len(q_QB) < FEW_QUERIES

    def search_part(part: range) -> tuple[Int32Array, Int64Array]:
        best_Qk = np.full((len(q_QB), k), MISSING_DISTANCE, np.int32)
        rows_Qk = np.full((len(q_QB), k), -1, np.int64)
        for start in part:
            words = _words(x_NB[start : min(start + BLOCK_ROWS, part.stop)], by_row)
            keep(q_QW, words, by_row, start, best_Qk, rows_Qk)
        return best_Qk, rows_Qk

    part_rows = max(BLOCK_ROWS, -(-len(x_NB) // torch.get_num_threads()))
    stops = [min(start + part_rows, len(x_NB)) for start in range(0, max(len(x_NB), 1), part_rows)]
    parts = [range(i * part_rows, stop, BLOCK_ROWS) for i, stop in enumerate(stops)]
    found = run_blocks(search_part, parts)
    # Parts ascend, so a stable sort leaves the lowest row first among equals.
    return _stable_best(np.hstack([best for best, _ in found]), np.hstack([rows for _, rows in found]), k)


def _words(x_NB: UInt8Array, by_row: bool = False) -> UInt64Array:
    """The rows as words, C-contiguous: uint64 [N, W], or [W, N], where the rows lie in the lanes of a register."""
    num_rows, num_bytes = x_NB.shape
    # Of read-only or unaligned memory too a copy: numba would compile everything once more for it.
    if num_bytes % 8 or not x_NB.flags.c_contiguous or not x_NB.flags.writeable or x_NB.ctypes.data % 8:
        padded = np.zeros((num_rows, -(-num_bytes // 8) * 8), np.uint8)
        padded[:, :num_bytes] = x_NB
        x_NB = padded
    words_NW = x_NB.view(np.uint64)
    return words_NW if by_row else words_NW.T.copy()


def _count(q_QW: UInt64Array, x_WN: UInt64Array, distances_QN: Int32Array) -> None:
    """Distances of all pairs, by array operations."""
    for start in range(0, len(q_QW), TILE_QUERIES):
        tile = distances_QN[start : start + TILE_QUERIES]
        tile[:] = 0
        for w in range(len(x_WN)):
            tile += np.bitwise_count(q_QW[start : start + TILE_QUERIES, w, None] ^ x_WN[w])


def _keep_nearest(
    q_QW: UInt64Array, x_WN: UInt64Array, by_row: bool, first_row: int, best_Qk: Int32Array, rows_Qk: Int64Array
) -> None:
    """Merges a block's rows, above all the earlier ones, into each query's nearest so far, in place.

    by_row: the compiled one takes the words as [N, W] as well.
    """
    k = best_Qk.shape[1]
    for start in range(0, len(q_QW), TILE_QUERIES):
        best, rows = best_Qk[start : start + TILE_QUERIES], rows_Qk[start : start + TILE_QUERIES]
        distances = np.empty((len(best), x_WN.shape[1]), np.int32)
        _count(q_QW[start : start + TILE_QUERIES], x_WN, distances)
        columns = np.flatnonzero((distances < best[:, -1:]).any(axis=0))
        new_rows = np.broadcast_to(first_row + columns, (len(best), len(columns)))
        best[:], rows[:] = _stable_best(np.hstack([best, distances[:, columns]]), np.hstack([rows, new_rows]), k)


def _stable_best(distances: Int32Array, rows: Int64Array, k: int) -> tuple[Int32Array, Int64Array]:
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(rows, order, axis=1)


@functools.cache
def compiled_hamming() -> Any:
    """`_count` and `_keep_nearest` compiled by numba; None where it is not installed."""
    try:
        from numba import njit
    except ImportError:
        return None

    @njit(nogil=True, cache=True)
    def ones(z: Any) -> Any:
        # LLVM knows this pattern and makes it the processor's instruction, where there is one, also of registers.
        z = z - ((z >> np.uint64(1)) & np.uint64(0x5555555555555555))
        z = (z & np.uint64(0x3333333333333333)) + ((z >> np.uint64(2)) & np.uint64(0x3333333333333333))
        z = (z + (z >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        return (z * np.uint64(0x0101010101010101)) >> np.uint64(56)

    # Slices, and indices from 0: numba then knows that none is negative, and the loops over n become vector code.
    @njit(nogil=True, cache=True)
    def count_tile(q_W: Any, x_WN: Any, start: int, total_N: Any) -> None:
        total_N[:] = 0
        stop = start + len(total_N)
        num_words = len(q_W)
        for w in range(0, num_words - 1, 2):
            one, two = q_W[w], q_W[w + 1]
            one_N, two_N = x_WN[w, start:stop], x_WN[w + 1, start:stop]
            for n in range(len(total_N)):
                total_N[n] += ones(one ^ one_N[n]) + ones(two ^ two_N[n])
        if num_words % 2:
            one = q_W[num_words - 1]
            one_N = x_WN[num_words - 1, start:stop]
            for n in range(len(total_N)):
                total_N[n] += ones(one ^ one_N[n])

    @njit(nogil=True, cache=True)
    def count_rows(q_W: Any, x_NW: Any, start: int, total_N: Any) -> None:
        for n in range(len(total_N)):
            row_W = x_NW[start + n]
            total = np.uint64(0)
            for w in range(len(q_W)):
                total += ones(q_W[w] ^ row_W[w])
            total_N[n] = total

    @njit(nogil=True, cache=True)
    def count(q_QW: Any, x_WN: Any, distances_QN: Any) -> None:
        buffer = np.empty(TILE_ROWS, np.uint64)
        for start in range(0, x_WN.shape[1], TILE_ROWS):
            total_N = buffer[: min(TILE_ROWS, x_WN.shape[1] - start)]
            for q in range(len(q_QW)):
                count_tile(q_QW[q], x_WN, start, total_N)
                distances_N = distances_QN[q, start : start + len(total_N)]
                for n in range(len(total_N)):
                    distances_N[n] = total_N[n]

    @njit(nogil=True, cache=True)
    def keep_nearest(q_QW: Any, words: Any, by_row: bool, first_row: int, best_Qk: Any, rows_Qk: Any) -> None:
        buffer = np.empty(TILE_ROWS, np.uint64)
        k = best_Qk.shape[1]
        num_rows = words.shape[0] if by_row else words.shape[1]
        for start in range(0, num_rows, TILE_ROWS):
            total_N = buffer[: min(TILE_ROWS, num_rows - start)]
            for q in range(len(q_QW)):
                if by_row:
                    count_rows(q_QW[q], words, start, total_N)
                else:
                    count_tile(q_QW[q], words, start, total_N)
                least = total_N[0]
                for n in range(len(total_N)):
                    least = min(least, total_N[n])
                limit = np.uint64(best_Qk[q, k - 1])
                # Not where equal: rows ascend, and the lower one is in already.
                if least >= limit:
                    continue
                for n in range(len(total_N)):
                    if total_N[n] < limit:
                        distance = np.int32(total_N[n])
                        place = k - 1
                        while place > 0 and best_Qk[q, place - 1] > distance:
                            best_Qk[q, place] = best_Qk[q, place - 1]
                            rows_Qk[q, place] = rows_Qk[q, place - 1]
                            place -= 1
                        best_Qk[q, place] = distance
                        rows_Qk[q, place] = first_row + start + n
                        limit = np.uint64(best_Qk[q, k - 1])

    return count, keep_nearest


def _check_bits(q_QB: UInt8Array, x_NB: UInt8Array) -> None:
    for name, bits in (("q_QB", q_QB), ("x_NB", x_NB)):
        if not isinstance(bits, np.ndarray) or bits.ndim != 2 or bits.shape[1] == 0 or bits.dtype != np.uint8:
            got = f"{bits.dtype} {tuple(bits.shape)}" if hasattr(bits, "dtype") else type(bits).__name__
            raise ValueError(f"{name} must be a uint8 matrix on the host with B >= 1, got {got}")
    if q_QB.shape[1] != x_NB.shape[1]:
        raise ValueError(f"q_QB must have the B of x_NB ({x_NB.shape[1]}), got {q_QB.shape[1]}")
