"""Every CUDA source of this package, with the variants that are compiled of it: what the compile test goes through."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.cuda import argmax, assign_fused, hamming, kmeans, minhash, pool, pq
from kernels.cuda.arrays import BFLOAT16, FLOAT16, FLOAT32

# A100, and H100 and H200.
ARCHITECTURES = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Source:
    """A source with the options of one variant."""

    name: str
    source: str
    kernels: tuple[str, ...]
    options: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ARCHITECTURES


def _pool() -> list[Source]:
    variants = [(FLOAT32, 4), (FLOAT32, 1), (FLOAT16, 8), (FLOAT16, 1), (BFLOAT16, 8), (BFLOAT16, 1)]
    return [
        Source(f"pool-{kind}-{vector}", pool.SOURCE, ("pool_normalize",), (f"-DKIND={kind}", f"-DVECTOR={vector}"))
        for kind, vector in variants
    ]


def _pq() -> list[Source]:
    variants = [(FLOAT32, 8, 8, True), (FLOAT16, 8, 8, True), (FLOAT32, 16, 8, True), (FLOAT32, 4, 8, True)]
    variants += [(FLOAT32, 1, 8, False), (FLOAT32, 7, 8, False), (FLOAT32, 15, 4, False), (FLOAT16, 12, 4, True)]
    return [
        Source(f"pq-{kind}-{sub_dims}x{nbits}", pq.SOURCE, ("pq_encode",), pq.options(kind, sub_dims, nbits, aligned))
        for kind, sub_dims, nbits, aligned in variants
    ]


ARGMAX_KERNELS = ("prepare_rows", "merge_best_two", "merge_classes", "rescore_classes")
SOURCES = (
    *_pool(),
    Source("argmax", argmax.SOURCE, ARGMAX_KERNELS),
    Source("assign-fused", assign_fused.SOURCE, ("assign_fused",), architectures=(assign_fused.ARCH,)),
    *_pq(),
    Source("hamming", hamming.SOURCE, ("hamming_distances",)),
    Source("minhash", minhash.SOURCE, ("minhash",)),
    *(Source(f"kmeans-{kind}", kmeans.SOURCE, ("cluster_sums",), (f"-DKIND={kind}",)) for kind in (FLOAT32, FLOAT16)),
)
