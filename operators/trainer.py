"""The training sample and the trained, empty index.

N vectors of d dimensions. The sample is chosen by hash of (doc_id, chunk_no), so it is the same on any cluster.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.assign import assign_nearest
from kernels.kmeans import kmeans
from kernels.pq import pq_train
from operators.artifact.list_run import splitmix64
from operators.artifact.quantizer import Quantizer
from operators.crash_points import crash_point
from operators.errors import ConfigError
from operators.index_config import IndexConfig, IndexSizes
from operators.piece_store import kept_mask, read_table, vectors_of
from operators.storage.checked import CheckedFile, put_checked
from operators.storage.commits import CommitRecord, commit, new_attempt, read_record
from operators.storage.store import Store

# 40 rows a centroid at nbits 8 (faiss asks for 39). On 20,000 MiniLM vectors with M 48, recall@10 of the codes alone was
# 0.72 with 8,192 rows and with all, 0.73 with 16,384 (8 to 12 iterations): noise, and the refinement makes up for far more.
PQ_TRAIN_POINTS = 10_240


@dataclass
class SampledRows:
    """A share of the training sample; `order` values decide the order in the whole."""

    order: np.ndarray  # uint64 [n]
    vectors: np.ndarray  # float16 [n, d]


def sample_pieces(
    store: Store,
    pieces: Sequence[tuple[CommitRecord, list[int]]],
    *,
    share: float,
) -> SampledRows:
    """The rows of `pieces` (record, dropped documents) whose hash falls below `share` in [0, 1]."""
    parts: list[SampledRows] = []
    for record, dropped in pieces:
        entry = record.objects["encoded"]
        keys = read_table(store, entry, ["doc_hash", "chunk_no"])
        chunk_no = keys.column("chunk_no").to_numpy()
        row_hash = splitmix64(keys.column("doc_hash").to_numpy() ^ splitmix64(chunk_no.astype(np.uint64)))
        kept = kept_mask(chunk_no, dropped)
        chosen = np.flatnonzero(kept & _below(row_hash, share))
        d = record.facts["d"]
        vectors = (
            vectors_of(read_table(store, entry, ["vector"]))[chosen] if len(chosen) else np.empty((0, d), np.float16)
        )
        parts.append(SampledRows(row_hash[chosen], vectors))
    return join_samples(parts)


def join_samples(parts: Sequence[SampledRows]) -> SampledRows:
    """Several shares as one, sorted by hash: the same whatever the order in which they came."""
    parts = [p for p in parts if len(p.order)] or list(parts[:1])
    order = np.concatenate([p.order for p in parts])
    vectors = np.concatenate([p.vectors for p in parts])
    # Rows of equal hash (equal doc_id and chunk_no cannot be, hash collisions can) are ordered by their bytes.
    by_hash = np.lexsort((vectors[:, 0].view(np.uint16), order)) if len(order) else np.empty(0, np.int64)
    return SampledRows(order[by_hash], vectors[by_hash])


def _below(hashes: np.ndarray, share: float) -> np.ndarray:
    if share >= 1:
        return np.ones(len(hashes), dtype=bool)
    return hashes < np.uint64(share * 2**64)


def train_quantizer(
    store: Store, prefix: str, sample_Nd: np.ndarray, config: IndexConfig, sizes: IndexSizes, inputs: str
) -> Quantizer:
    """Centroids and codebooks from the sample float16 or float32 [N, d].

    The coarse k-means is checkpointed under `prefix`, at most every `index.checkpoint_s` seconds; a resumed training goes on from the last
    one and ends with the same bytes. Deterministic for a given number of threads.
    """
    if not len(sample_Nd):
        raise ConfigError(
            f"the training sample must hold at least one row, got none: index.train_points ({sizes.train_points}) is too"
            " small for a draw by hash; leave it at 0"
        )
    sample = np.ascontiguousarray(sample_Nd, dtype=np.float32)
    checkpoint = _last_checkpoint(store, prefix, config.coarse_iterations, inputs)

    saved_at = time.monotonic()

    def save(iteration: int, centroids_KD: np.ndarray) -> None:
        nonlocal saved_at
        if time.monotonic() - saved_at < config.checkpoint_s:
            return
        key = _checkpoint_key(prefix, iteration)
        attempt = new_attempt()
        saved_at = time.monotonic()
        entry = put_checked(store, f"{key}-{attempt}.f32", np.ascontiguousarray(centroids_KD, "<f4").tobytes())
        facts = {"shape": list(centroids_KD.shape)}
        commit(
            store, f"{key}.json", CommitRecord(f"checkpoint {iteration}", inputs, attempt, {"centroids": entry}, facts)
        )

    centroids = kmeans(
        sample,
        sizes.nlist,
        metric=config.metric,
        seed=config.seed,
        iterations=config.coarse_iterations,
        checkpoint=checkpoint,
        on_iteration=save,
    )
    crash_point("train.before_pq")
    points = sample[:PQ_TRAIN_POINTS]
    residuals = points - centroids[assign_nearest(points, centroids, metric=config.metric)]
    codebooks = pq_train(residuals, sizes.M, sizes.nbits, seed=config.seed, iterations=config.pq_iterations)
    return Quantizer(config.metric, centroids, codebooks, sizes.nbits)


def _checkpoint_key(prefix: str, iteration: int) -> str:
    return f"{prefix}/coarse-{iteration:03d}"


def _last_checkpoint(store: Store, prefix: str, iterations: int, inputs: str) -> tuple[int, np.ndarray] | None:
    for iteration in range(iterations, -1, -1):
        record = read_record(store, f"{_checkpoint_key(prefix, iteration)}.json")
        if record is not None and record.inputs == inputs:
            data = CheckedFile(store, record.objects["centroids"]).readall()
            return iteration, np.frombuffer(data, "<f4").reshape(record.facts["shape"]).copy()
    return None
