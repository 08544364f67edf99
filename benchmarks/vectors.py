"""Vectors to build indices of: clustered ones made from a seed, or files; and their exact neighbours.

Shapes: N base vectors, Q queries, D dimensions, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
NUM_NEIGHBOURS = 10
CLUSTERS = 4000


@dataclass(frozen=True)
class Collection:
    """base float32 [N, D], queries float32 [Q, D] and the exact neighbours of the queries, int64 [Q, k]."""

    name: str
    base_ND: Float32Array
    queries_QD: Float32Array
    neighbours_Qk: npt.NDArray[np.int64]


def clustered(num_rows: int, num_dims: int, seed: int, num_queries: int) -> tuple[Float32Array, Float32Array]:
    """(base, queries) of unit length, drawn alike: clusters of unequal size in a space whose variance falls as 1 / i.

    4,000 cluster centres with Pareto-distributed weights (shape 1.5), spread within a cluster 0.9 of that between; the
    i-th principal direction has a variance of 1 / i, about as text embeddings have. Queries are not in the base.
    """
    rng = np.random.default_rng(seed)
    rotation_DD, _ = np.linalg.qr(rng.standard_normal((num_dims, num_dims)))
    basis_DD = (np.arange(1, num_dims + 1)[:, None] ** -0.5 * rotation_DD).astype(np.float32)
    centres = rng.standard_normal((CLUSTERS, num_dims), dtype=np.float32)
    weights = rng.pareto(1.5, CLUSTERS) + 0.2
    weights /= weights.sum()
    parts = []
    for size in (num_rows, num_queries):
        x = np.empty((size, num_dims), np.float32)
        for start in range(0, size, 50_000):
            rows = min(50_000, size - start)
            spread = rng.standard_normal((rows, num_dims), dtype=np.float32)
            x[start : start + rows] = (centres[rng.choice(CLUSTERS, rows, p=weights)] + 0.9 * spread) @ basis_DD
        parts.append(normalised(x))
    return parts[0], parts[1]


def normalised(x_ND: Float32Array) -> Float32Array:
    """The rows at unit length."""
    return np.asarray(x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True), np.float32)


def read_vectors(path: str) -> Float32Array:
    """A .npy file as float32 [N, D]; SystemExit with one line when it is something else."""
    if not Path(path).is_file():
        raise SystemExit(f"no such file: {path}")
    x_ND = np.load(path)
    if x_ND.ndim != 2 or not np.issubdtype(x_ND.dtype, np.floating):
        raise SystemExit(f"vectors must be a floating-point matrix, {path} holds {x_ND.dtype} {x_ND.shape}")
    return np.ascontiguousarray(x_ND, np.float32)


def exact_neighbours(base_ND: Float32Array, queries_QD: Float32Array, metric: str) -> npt.NDArray[np.int64]:
    """Rows of the exact NUM_NEIGHBOURS nearest, by faiss's exhaustive search."""
    import faiss

    index: Any = faiss.IndexFlatIP(base_ND.shape[1]) if metric == "ip" else faiss.IndexFlatL2(base_ND.shape[1])
    index.add(base_ND)
    return np.asarray(index.search(queries_QD, NUM_NEIGHBOURS)[1])


def recall(found_Qk: npt.NDArray[Any], neighbours_Qk: npt.NDArray[Any]) -> float:
    """Mean share of the exact nearest NUM_NEIGHBOURS among the found, order ignored (`intersection` recall@10)."""
    return float(np.mean([len(np.intersect1d(f, e)) / len(e) for f, e in zip(found_Qk, neighbours_Qk, strict=True)]))
