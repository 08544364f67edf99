"""MinHash signatures on a CUDA device: the bits of kernels/minhash.py, which states the arithmetic.

Shapes: T tokens of all segments one behind the other, S segments, H hashes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.cuda.arrays import NOT_FOUND, as_device, no_rows_found
from kernels.cuda.compile import kernel
from kernels.minhash import BASE, GOLDEN, MIX_1, MIX_2, hash_parameters
from kernels.pool import check_segments

THREADS = 128

# A block has a segment and 128 hashes, one a thread. The keys of 128 shingles at a time are made by the threads together
# and read from shared memory by all. Minima of whole numbers: the order does not matter.
SOURCE = (
    f"""
#define GOLDEN {GOLDEN}ull
#define MIX_1 {MIX_1}ull
#define MIX_2 {MIX_2}ull
#define BASE {BASE}ull
"""
    + r"""
#define THREADS 128

__device__ __forceinline__ u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * MIX_1;
    z = (z ^ (z >> 27)) * MIX_2;
    return z ^ (z >> 31);
}

extern "C" __global__ void __launch_bounds__(128) minhash(
    const u32* __restrict__ tokens, const i64* __restrict__ offsets, i64 num_tokens, int shingle, u64 seed_key,
    const u64* __restrict__ factors, const u64* __restrict__ shifts, int num_hashes, u32* __restrict__ signatures,
    u64* __restrict__ found) {
    __shared__ u64 keys[THREADS];
    const i64 segment = blockIdx.x;
    const i64 start = offsets[segment], end = offsets[segment + 1];
    if (start < 0 || end > num_tokens || end <= start || (segment == 0 && start != 0) ||
        (segment == gridDim.x - 1 && end != num_tokens)) {
        if (threadIdx.x == 0) atomicMin(found, (u64)segment);
        return;
    }
    const i64 length = end - start < shingle ? end - start : shingle;
    const i64 num_shingles = end - start - length + 1;
    const int hash = blockIdx.y * THREADS + threadIdx.x;
    const u64 factor = hash < num_hashes ? factors[hash] : 0, shift = hash < num_hashes ? shifts[hash] : 0;
    u64 smallest = ~0ull;
    for (i64 first = 0; first < num_shingles; first += THREADS) {
        const int here = (int)(num_shingles - first < THREADS ? num_shingles - first : THREADS);
        __syncthreads();
        if (threadIdx.x < here) {
            u64 key = 0;
            for (i64 j = 0; j < length; ++j) key = key * BASE + mix(tokens[start + first + threadIdx.x + j] + GOLDEN);
            keys[threadIdx.x] = mix(key + seed_key);
        }
        __syncthreads();
#pragma unroll 4
        for (int w = 0; w < here; ++w) {
            const u64 value = factor * keys[w] + shift;
            smallest = value < smallest ? value : smallest;
        }
    }
    if (hash < num_hashes) signatures[segment * num_hashes + hash] = (u32)(smallest >> 32);
}
"""
)


def minhash(tokens_T: Any, offsets: Any, *, num_hashes: int = 128, shingle: int = 5, seed: int) -> Any:
    """As kernels.minhash.minhash, for arrays on the device: CuPy uint32 [S, H], the same bits.

    tokens_T: any integer type. offsets: int64 [S + 1], on the device or the host.
    """
    import cupy

    for name, value in (("num_hashes", num_hashes), ("shingle", shingle)):
        if not 1 <= value < 1 << 31:
            raise ValueError(f"{name} must be in 1..2^31 - 1, got {value}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in 0..2^64 - 1, got {seed}")
    tokens_T = as_device("tokens_T", tokens_T)
    if tokens_T.ndim != 1 or tokens_T.dtype.kind not in "iu":
        raise ValueError(f"tokens must be integers [T], got {tokens_T.dtype} {tokens_T.shape}")
    if len(tokens_T) and not (int(tokens_T.min()) >= 0 and int(tokens_T.max()) < 1 << 32):
        host_T = tokens_T.get()
        wrong = int(np.argmax((host_T < 0) | (host_T >= 1 << 32)))
        raise ValueError(f"tokens must be in 0..2^32 - 1: token {wrong} is {int(host_T[wrong])}")
    on_host = not hasattr(offsets, "__cuda_array_interface__")
    if on_host:
        check_segments(offsets, len(tokens_T))
    offsets = cupy.asarray(offsets) if on_host else as_device("offsets", offsets)
    if offsets.ndim != 1 or len(offsets) < 2 or offsets.dtype != np.int64:
        check_segments(cupy.asnumpy(offsets), len(tokens_T))
    num_segments = len(offsets) - 1
    signatures_SH = cupy.empty((num_segments, num_hashes), cupy.uint32)
    if num_segments == 0:
        return signatures_SH
    key, factors, shifts = hash_parameters(num_hashes, seed)
    found = no_rows_found(1)
    kernel(SOURCE, "minhash")(
        (num_segments, -(-num_hashes // THREADS)),
        (THREADS,),
        (
            *(tokens_T.astype(cupy.uint32, copy=False), offsets, np.int64(len(tokens_T)), np.int32(shingle)),
            *(np.uint64(key), cupy.asarray(factors), cupy.asarray(shifts), np.int32(num_hashes), signatures_SH, found),
        ),
    )
    if int(found.get()[0]) != NOT_FOUND:
        check_segments(cupy.asnumpy(offsets), len(tokens_T))
    return signatures_SH
