"""MinHash signatures of documents' shingles, from which their Jaccard similarity is estimated.

Shapes: T tokens of all segments one behind the other, S segments (documents), W shingles of a block, H hashes.

The arithmetic, all of it on unsigned 64-bit integers modulo 2^64, so that every processor gives the same bits
(kernels/reference.py has it as loops):

- mix(z) is the finalizer of splitmix64: z ^= z >> 30; z *= MIX_1; z ^= z >> 27; z *= MIX_2; z ^= z >> 31.
- A shingle is `shingle` consecutive tokens of one segment; a segment with fewer has one shingle, all of its tokens.
- Its key: k = 0, and for each token t in order k = k * BASE + mix(t + GOLDEN); then x = mix(k + mix(seed + GOLDEN)).
- Hash i = 0 .. H - 1 of the shingle: a_i * x + b_i, with a_i = mix(seed + (2i + 2) * GOLDEN) | 1 and
  b_i = mix(seed + (2i + 3) * GOLDEN). An odd a_i makes that a permutation of the 64-bit numbers: the multiply-shift
  family (Dietzfelbinger, Hagerup, Katajainen, Penttonen, Journal of Algorithms 25, 1997), on keys that are mixed already.
- Column i of a signature: the smallest hash i of the segment's shingles, shifted right by 32 bits.

So the first columns do not depend on H, and a signature neither on the other segments nor on their order.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.blocks import on_device
from kernels.pool import check_segments
from kernels.threads import run_blocks

UInt64Array = npt.NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
BASE = 0xD1342543DE82EF95  # odd, and 5 modulo 8: its powers repeat after 2^62 tokens
# Tokens of a block of whole segments, one thread's work; and of a tile of hashes where numba is absent, 128 KiB.
BLOCK_TOKENS = 1 << 16
TILE_SHINGLES = 1 << 14


def minhash(tokens_T: Any, offsets: Any, *, num_hashes: int = 128, shingle: int = 5, seed: int) -> Any:
    """Signatures uint32 [S, H] of the segments' shingles; `minhash_similarity` compares them.

    tokens_T: token ids, any integer type, each in 0 .. 2^32 - 1. offsets: int64 [S + 1] from 0 to T; segment s is
    tokens offsets[s]:offsets[s + 1]. Arrays on the host, or CuPy arrays, and then the result is one. seed: 0 ..
    2^64 - 1; signatures compare only where num_hashes, shingle and seed are the same.
    Deterministic: the module says which bits. Raises ValueError that names an empty segment, or a token out of range.
    """
    _check_settings(num_hashes, shingle, seed)
    if on_device(tokens_T):
        from kernels.cuda.minhash import minhash as minhash_on_device

        return minhash_on_device(tokens_T, offsets, num_hashes=num_hashes, shingle=shingle, seed=seed)
    tokens_T = np.asarray(tokens_T)
    if tokens_T.ndim != 1 or tokens_T.dtype.kind not in "iu":
        raise ValueError(f"tokens must be integers [T], got {tokens_T.dtype} {tokens_T.shape}")
    starts, ends = check_segments(offsets, len(tokens_T))
    _check_tokens(tokens_T)
    key, a_H, b_H = hash_parameters(num_hashes, seed)
    function = compiled_segments() or _signatures

    def signatures_of(first_last: tuple[int, int]) -> npt.NDArray[np.uint32]:
        first, last = first_last
        begin, end = int(starts[first]), int(ends[last - 1])
        local = np.append(starts[first:last], end) - begin
        return function(tokens_T[begin:end].astype(np.uint64), local, shingle, key, a_H, b_H)

    blocks = run_blocks(signatures_of, _blocks_of_segments(ends))
    return np.concatenate(blocks) if blocks else np.empty((0, num_hashes), np.uint32)


def minhash_similarity(a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """Estimated Jaccard similarity of the shingle sets: the share of equal columns, float64, over the last axis.

    a, b: uint32 [..., H] that broadcast. Standard error sqrt(J (1 - J) / H) for a true similarity of J.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != np.uint32 or b.dtype != np.uint32 or a.shape[-1:] != b.shape[-1:] or not a.shape[-1:]:
        raise ValueError(
            f"signatures must be uint32 [..., H] of one H, got {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
    return np.asarray((a == b).mean(axis=-1), np.float64)


def hash_parameters(num_hashes: int, seed: int) -> tuple[int, UInt64Array, UInt64Array]:
    """mix(seed + GOLDEN), and a and b, uint64 [H], of the hashes."""
    steps = np.arange(1, 2 * num_hashes + 2, dtype=np.uint64)
    mixed = mix(np.uint64(seed) + steps * np.uint64(GOLDEN))
    return int(mixed[0]), mixed[1::2] | np.uint64(1), mixed[2::2].copy()


def mix(z: UInt64Array) -> UInt64Array:
    """The finalizer of splitmix64 of every number; the input stays as it is."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return z ^ (z >> np.uint64(31))


def _signatures(
    tokens_T: UInt64Array,
    offsets: npt.NDArray[np.int64],
    shingle: int,
    key: int,
    a_H: UInt64Array,
    b_H: UInt64Array,
) -> npt.NDArray[np.uint32]:
    """Signatures of whole segments by array operations: the same bits as the compiled loops."""
    lengths = np.diff(offsets)
    counts = np.maximum(lengths - shingle + 1, 1)
    ends = np.cumsum(counts)
    mixed_T = mix(tokens_T + np.uint64(GOLDEN))
    signatures_HS = np.full((len(a_H), len(lengths)), np.iinfo(np.uint64).max)
    for begin in range(0, int(ends[-1]), TILE_SHINGLES):
        number_W = np.arange(begin, min(begin + TILE_SHINGLES, int(ends[-1])))
        segment_W = np.searchsorted(ends, number_W, side="right")
        first_W = offsets[segment_W] + number_W - (ends - counts)[segment_W]
        length_W = np.minimum(lengths[segment_W], shingle)
        key_W = np.zeros(len(number_W), np.uint64)
        for j in range(int(length_W.max())):
            token_W = mixed_T[np.minimum(first_W + j, len(mixed_T) - 1)]
            key_W = np.where(j < length_W, key_W * np.uint64(BASE) + token_W, key_W)
        x_W = mix(key_W + np.uint64(key))
        first, last = int(segment_W[0]), int(segment_W[-1]) + 1
        tile_starts = np.maximum((ends - counts)[first:last] - begin, 0)
        for h, (a, b) in enumerate(zip(a_H, b_H, strict=True)):
            smallest = np.minimum.reduceat(x_W * a + b, tile_starts)
            np.minimum(signatures_HS[h, first:last], smallest, out=signatures_HS[h, first:last])
    return np.ascontiguousarray((signatures_HS >> np.uint64(32)).astype(np.uint32).T)


@functools.cache
def compiled_segments() -> Any:
    """`_signatures` as loops compiled by numba, which let go of the interpreter; None where numba is not installed."""
    try:
        from numba import njit
    except ImportError:
        return None
    golden, mix_1, mix_2, base = np.uint64(GOLDEN), np.uint64(MIX_1), np.uint64(MIX_2), np.uint64(BASE)

    @njit(nogil=True, cache=True)
    def mixed(z: Any) -> Any:
        z = (z ^ (z >> np.uint64(30))) * mix_1
        z = (z ^ (z >> np.uint64(27))) * mix_2
        return z ^ (z >> np.uint64(31))

    @njit(nogil=True, cache=True)
    def signatures(tokens_T: Any, offsets: Any, shingle: int, key: Any, a_H: Any, b_H: Any) -> Any:
        num_segments, num_hashes = len(offsets) - 1, len(a_H)
        result = np.empty((num_segments, num_hashes), np.uint32)
        mixed_T = np.empty(len(tokens_T), np.uint64)
        for t in range(len(tokens_T)):
            mixed_T[t] = mixed(tokens_T[t] + golden)
        key_W = np.empty(len(tokens_T) + 3, np.uint64)
        smallest_H = np.empty(num_hashes, np.uint64)
        for s in range(num_segments):
            start, end = offsets[s], offsets[s + 1]
            length = min(shingle, end - start)
            num_shingles = end - start - length + 1
            for w in range(num_shingles):
                k = np.uint64(0)
                for j in range(length):
                    k = k * base + mixed_T[start + w + j]
                key_W[w] = mixed(k + key)
            # Four shingles at a time share the loads of a, b and the minimum; repeats change no minimum.
            for w in range(num_shingles, num_shingles + 3):
                key_W[w] = key_W[num_shingles - 1]
            smallest_H[:] = np.uint64(0xFFFFFFFFFFFFFFFF)
            for w in range(0, num_shingles, 4):
                x_0, x_1, x_2, x_3 = key_W[w], key_W[w + 1], key_W[w + 2], key_W[w + 3]
                for h in range(num_hashes):
                    a, b = a_H[h], b_H[h]
                    one = min(a * x_0 + b, a * x_1 + b)
                    two = min(a * x_2 + b, a * x_3 + b)
                    smallest_H[h] = min(smallest_H[h], min(one, two))
            for h in range(num_hashes):
                result[s, h] = np.uint32(smallest_H[h] >> np.uint64(32))
        return result

    def with_key(
        tokens_T: UInt64Array,
        offsets: npt.NDArray[np.int64],
        shingle: int,
        key: int,
        a_H: UInt64Array,
        b_H: UInt64Array,
    ) -> npt.NDArray[np.uint32]:
        # A Python int would be compiled as int64, and int64 with uint64 is float64 to numba.
        found: npt.NDArray[np.uint32] = signatures(tokens_T, offsets, shingle, np.uint64(key), a_H, b_H)
        return found

    return with_key


def _blocks_of_segments(ends: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """(first, one past last) of whole segments in blocks of about BLOCK_TOKENS tokens."""
    if len(ends) == 0:
        return []
    cuts = np.searchsorted(ends, np.arange(BLOCK_TOKENS, int(ends[-1]), BLOCK_TOKENS), side="left") + 1
    bounds = np.unique(np.concatenate([[0], cuts, [len(ends)]])).tolist()
    return list(pairwise(bounds))


def _check_settings(num_hashes: int, shingle: int, seed: int) -> None:
    for name, value in (("num_hashes", num_hashes), ("shingle", shingle)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in 0..2^64 - 1, got {seed}")


def _check_tokens(tokens_T: npt.NDArray[Any]) -> None:
    if len(tokens_T) == 0 or (tokens_T.min() >= 0 and tokens_T.max() < 1 << 32):
        return
    wrong = int(np.argmax((tokens_T < 0) | (tokens_T >= 1 << 32)))
    raise ValueError(f"tokens must be in 0..2^32 - 1: token {wrong} is {int(tokens_T[wrong])}")
