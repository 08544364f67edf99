"""The training sample and the trained, empty index.

N vectors of d dimensions. The sample is chosen by hash of (doc_id, chunk_no), so it is the same on any cluster.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.assign_two_level import measure_slack
from kernels.ivfpq import SHARE_ROWS, IvfPq
from kernels.kmeans import Checkpoint, kmeans
from kernels.pq import pq_train
from operators.artifact.list_assignment import ListAssignment
from operators.artifact.list_run import splitmix64
from operators.artifact.quantizer import Quantizer
from operators.crash_points import crash_point
from operators.errors import ConfigError
from operators.index_config import IndexConfig, IndexSizes
from operators.piece_store import kept_mask, read_table, read_tables, vectors_of
from operators.storage.checked import CheckedFile, put_checked
from operators.storage.commits import CommitRecord, commit, new_attempt, read_record
from operators.storage.store import Store

# Rows that codebooks are trained with: a quarter of the sample, within these bounds. The first is 40 a codeword at nbits 8
# (faiss asks for 39), the second as many as pq_train uses. On 20,000 MiniLM vectors with M 48, 10,240, 16,384 and 20,000 rows
# gave recall@10 of the codes alone of 0.742, 0.739 and 0.742, squared errors of 0.190, 0.186 and 0.184, and took 0.45, 0.65
# and 0.75 s on one thread: what more rows gain is not worth the time of a small build, and no part of that of a large one.
PQ_TRAIN_POINTS = (10_240, 65_536)


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
    tables = read_tables(store, (record.objects["encoded"] for record, _ in pieces), ["doc_hash", "chunk_no"])
    for (record, dropped), keys in zip(pieces, tables, strict=True):
        entry = record.objects["encoded"]
        chunk_no = keys.column("chunk_no").to_numpy()
        row_hash = splitmix64(keys.column("doc_hash").to_numpy() ^ splitmix64(chunk_no.astype(np.uint64)))
        kept = kept_mask(chunk_no, dropped)
        chosen = np.flatnonzero(kept & below(row_hash, share))
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


def below(hashes: np.ndarray, share: float) -> np.ndarray:
    """bool [n]: whether the hash uint64 [n] is among the lowest `share` of all hashes."""
    if share >= 1:
        return np.ones(len(hashes), dtype=bool)
    return hashes < np.uint64(share * 2**64)


def train_quantizer(
    store: Store, prefix: str, sample_Nd: np.ndarray, config: IndexConfig, sizes: IndexSizes, inputs: str
) -> Quantizer:
    """Centroids and codebooks from the sample float16 or float32 [N, d].

    The coarse k-means is checkpointed under `prefix`, at most every `index.checkpoint_s` seconds; a resumed training goes on from the last
    one and ends with the same bytes, whatever the number of threads. With `index.assign_share` below 1 the lists are found
    on two levels, with a slack that is measured on the sample.
    """
    if not len(sample_Nd):
        raise ConfigError(
            f"the training sample must hold at least one row, got none: index.train_points ({sizes.train_points}) is too"
            " small for a draw by hash; leave it at 0"
        )
    sample = np.ascontiguousarray(sample_Nd, dtype=np.float32)
    saved_at = time.monotonic()

    def save(checkpoint: Checkpoint) -> None:
        nonlocal saved_at
        if time.monotonic() - saved_at < config.checkpoint_s:
            return
        _save_checkpoint(store, prefix, checkpoint, inputs)
        saved_at = time.monotonic()

    centroids = kmeans(
        sample,
        sizes.nlist,
        metric=config.metric,
        seed=config.seed,
        iterations=config.coarse_iterations,
        checkpoint=_last_checkpoint(store, prefix, config.coarse_iterations, inputs),
        on_iteration=save,
    )
    crash_point("train.before_pq")
    lists = _with_slack(centroids, sizes, sample, config)
    least, most = PQ_TRAIN_POINTS
    points = sample[: min(max(least, len(sample) // 4), most)]
    residuals = points - centroids[lists.assign(points)]
    codebooks = pq_train(residuals, sizes.M, sizes.nbits, seed=config.seed, iterations=config.pq_iterations)
    assignment = ListAssignment(lists.slack, lists.share, lists.seed)
    return Quantizer(config.metric, centroids, codebooks, sizes.nbits, assignment)


def _with_slack(centroids_Kd: np.ndarray, sizes: IndexSizes, sample_Nd: np.ndarray, config: IndexConfig) -> IvfPq:
    """Assigns with the least slack that leads `index.assign_share` of the sample to its nearest list; has no codebooks."""
    no_codebooks = np.empty((sizes.M, 1 << sizes.nbits, 0), np.float32)
    lists = IvfPq(config.metric, centroids_Kd, no_codebooks, config.seed)
    if config.assign_share >= 1:
        return lists
    # The sample is in the order of a hash, so its first rows are a random choice.
    slack, share = measure_slack(sample_Nd[:SHARE_ROWS], lists.groups, target=config.assign_share)
    return dataclasses.replace(lists, slack=slack, share=share)


def _checkpoint_key(prefix: str, iteration: int) -> str:
    return f"{prefix}/coarse-{iteration:03d}"


def _save_checkpoint(store: Store, prefix: str, checkpoint: Checkpoint, inputs: str) -> None:
    key, attempt = _checkpoint_key(prefix, checkpoint.iteration), new_attempt()
    objects = {
        "centroids": put_checked(store, f"{key}-{attempt}.f32", checkpoint.centroids_KD.astype("<f4").tobytes()),
        "lists": put_checked(store, f"{key}-{attempt}.i32", checkpoint.list_no_N.astype("<i4").tobytes()),
    }
    facts = {"shape": list(checkpoint.centroids_KD.shape)}
    commit(store, f"{key}.json", CommitRecord(f"checkpoint {checkpoint.iteration}", inputs, attempt, objects, facts))


def _last_checkpoint(store: Store, prefix: str, iterations: int, inputs: str) -> Checkpoint | None:
    for iteration in range(iterations, -1, -1):
        record = read_record(store, f"{_checkpoint_key(prefix, iteration)}.json")
        if record is not None and record.inputs == inputs:
            centroids = np.frombuffer(CheckedFile(store, record.objects["centroids"]).readall(), "<f4")
            lists = np.frombuffer(CheckedFile(store, record.objects["lists"]).readall(), "<i4")
            shape = record.facts["shape"]
            return Checkpoint(iteration, centroids.reshape(shape).astype(np.float32), lists.astype(np.int32))
    return None
