"""Settings of the index, and the sizes that follow from the data when they are left at 0."""

from __future__ import annotations

import math
from dataclasses import dataclass

from operators.errors import ConfigError
from operators.settings import operational, semantic

METRICS = ("ip", "l2")
POINTS_PER_LIST = 39  # faiss's own minimum for k-means (ClusteringParameters.min_points_per_centroid)


@dataclass(frozen=True)
class IndexConfig:
    """How the corpus is quantized, cut into parts, and searched by default."""

    metric: str = semantic("ip", "ip (cosine for models that normalise) or l2")
    nlist: int = semantic(0, "inverted lists; 0: about 4 sqrt(n), at least 39 training points each")
    M: int = semantic(0, "sub-quantizers of a code; 0: the largest divisor of d up to d / 8")
    nbits: int = semantic(8, "bits a sub-quantizer: 4 or 8")
    seed: int = semantic(1234, "seed of k-means")
    train_points: int = semantic(0, "training sample; 0: max(100 nlist, 65536), at most all")
    coarse_iterations: int = semantic(8, "iterations of the coarse k-means")
    pq_iterations: int = semantic(
        16, "iterations of each sub-quantizer's k-means, most of them over a part of the rows"
    )
    assign_share: float = semantic(
        1.0, "of the vectors in their nearest list; below 1 (0.97): lists found on two levels, for an nlist of 10,000s"
    )
    checkpoint_s: float = operational(5.0, "least seconds between checkpoints of training; 0: after each iteration")
    train_threads: int = operational(0, "CPU threads of training; 0: all CPU slots of a node")
    refine_factor: int = semantic(10, "candidates per wanted hit that are scored again with the stored vectors")
    query_sample: int = semantic(256, "queries drawn from the corpus to measure recall and choose nprobe")
    target_recall: float = semantic(0.99, "recall@10 on the query sample that nprobe is chosen for")
    min_recall: float = operational(0.9, "below this recall@10 on the query sample nothing is published")
    part_bytes: int = semantic(256 << 20, "size of a published part (lists, vectors and rows together)")
    shard_rows: int = operational(131_072, "rows of a shard: the unit of parallel index building")
    merge_fan_in: int = operational(64, "runs that one merge task reads at once; more are merged in waves")
    merge_buffer_bytes: int = operational(64 << 20, "bytes of entries that a merge task holds at once")

    def __post_init__(self) -> None:
        rules = [
            ("metric", self.metric in METRICS, f"one of {', '.join(METRICS)}"),
            ("nlist", self.nlist >= 0, "at least 1, or 0 for a size chosen from the data"),
            ("M", self.M >= 0, "a divisor of d, or 0 for a size chosen from d"),
            ("nbits", self.nbits in (4, 8), "4 or 8"),
            ("refine_factor", self.refine_factor >= 1, "at least 1"),
            ("query_sample", self.query_sample >= 1, "at least 1"),
            ("target_recall", 0 < self.target_recall <= 1, "in (0, 1]"),
            ("min_recall", 0 <= self.min_recall <= 1, "in [0, 1]"),
            ("part_bytes", self.part_bytes >= 1, "at least 1"),
            ("shard_rows", self.shard_rows >= 1, "at least 1"),
            ("merge_fan_in", self.merge_fan_in >= 2, "at least 2"),
            ("merge_buffer_bytes", self.merge_buffer_bytes >= 1, "at least 1"),
            ("coarse_iterations", self.coarse_iterations >= 1, "at least 1"),
            ("pq_iterations", self.pq_iterations >= 1, "at least 1"),
            ("assign_share", 0 < self.assign_share <= 1, "in (0, 1]"),
            ("checkpoint_s", self.checkpoint_s >= 0, "at least 0"),
            ("train_threads", self.train_threads >= 0, "at least 1, or 0 for all CPU slots of a node"),
            ("train_points", self.train_points >= 0, "at least 1, or 0 for a size chosen from nlist"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ConfigError(f"index.{name} must be {rule}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class IndexSizes:
    """Resolved sizes of one index."""

    d: int
    nlist: int
    M: int
    nbits: int
    train_points: int

    @property
    def code_size(self) -> int:
        """Bytes of a code, as faiss counts them."""
        return (self.M * self.nbits + 7) // 8


def resolve_sizes(config: IndexConfig, ntotal: int, d: int) -> IndexSizes:
    """Sizes for `ntotal` vectors of `d` dimensions. Raises ConfigError when the given ones do not fit the data."""
    nlist = config.nlist or default_nlist(ntotal)
    if nlist > ntotal:
        raise ConfigError(f"index.nlist must be at most the number of vectors ({ntotal}), got {nlist}; leave it at 0")
    M = config.M or default_M(d)
    if d % M:
        raise ConfigError(f"index.M must divide d ({d}), got {M}; leave it at 0")
    train_points = config.train_points or max(100 * nlist, 65_536)
    return IndexSizes(d, nlist, M, config.nbits, min(train_points, ntotal))


def default_nlist(ntotal: int) -> int:
    """The power of two at or below min(4 sqrt(n), n / 39), at least 1."""
    bound = min(4 * math.sqrt(ntotal), ntotal / POINTS_PER_LIST)
    return 1 << max(0, int(math.log2(bound))) if bound >= 1 else 1


def default_M(d: int) -> int:
    """Largest divisor of d that leaves at least 8 dimensions a sub-quantizer (one byte for 16 of float16), at least 1."""
    return max((M for M in range(1, d // 8 + 1) if d % M == 0), default=1)
