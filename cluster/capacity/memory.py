"""Peak memory of the driver and of a worker in each stage of a build: private bytes, without mapped library code.

A worker process goes from stage to stage and gives little back, so what a task takes stands on top of what the process
has imported (`task_worker_bytes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.capacity.workload import HASHES_PER_PASS, Workload

PQ_TRAIN_POINTS = (10_240, 65_536)  # operators/trainer.py


@dataclass(frozen=True)
class MemoryPeak:
    """Peak of one process in one stage; `parallel`: as many at once as there are CPU slots, else one in the cluster."""

    stage: str
    process: str  # driver, encoder, task
    size_bytes: float
    parallel: bool
    grows_with: str = ""


def memory_peaks(work: Workload, c: Mapping[str, float]) -> list[MemoryPeak]:
    """The peaks of a build, in the order of its stages."""
    corpus, sizes = work.corpus, work.sizes
    base, d = c["task_worker_bytes"], work.model.d
    row_text = corpus.bytes_per_doc / corpus.chunks_per_doc
    piece_text = work.docs_per_piece * corpus.bytes_per_doc
    piece_rows = work.rows_per_piece
    encoded = piece_rows * (2 * d + row_text)
    together = work.pieces_per_task  # a stage holds all pieces of its block
    more_weights = max(0.0, work.model.num_weights - c["encoder_weights"])
    encoder = c["encoder_bytes"] + more_weights * c["encoder_bytes_per_weight"] + together * 2 * encoded
    hashes = min(corpus.num_docs, HASHES_PER_PASS)
    # kernels/ivfpq.py training_bytes: the sample in float16 and float32, and sums of the lists or residuals of the codebooks.
    least, most = PQ_TRAIN_POINTS
    points = min(max(least, sizes.train_points // 4), most, sizes.train_points)
    train = sizes.train_points * 6 * d + max(6 * 8 * sizes.nlist * d, 3 * 4 * points * d)
    sample = 3 * 2 * d * sizes.train_points / work.num_shards  # of a group: pieces' shares, all of them, all in order
    shard_row = 2 * d * c["shard_bytes_per_vector_byte"] + row_text * c["shard_bytes_per_text_byte"]
    shard = min(work.rows_per_shard, corpus.num_vectors) * shard_row
    merge = min(c["merge_buffers"] * work.index.merge_buffer_bytes, 2 * corpus.num_vectors * (2 * d + row_text))
    records = work.num_pieces * c["driver_bytes_per_piece"]
    return [
        MemoryPeak("all stages", "driver", c["driver_bytes"] + records, False, "pieces"),
        MemoryPeak("encode pieces", "encoder", encoder, True, "piece, batch_tokens"),
        MemoryPeak("encode pieces", "task", base + together * (4 * piece_text + 2 * encoded), True, "piece"),
        # One task has the records of all pieces, those of passes share them.
        MemoryPeak(
            "number rows",
            "task",
            base + hashes * c["number_rows_bytes_per_hash"] + (0.0 if work.num_passes > 1 else records),
            work.num_passes > 1,
            "documents",
        ),
        MemoryPeak("draw samples", "task", base + 2 * encoded + sample, True, "piece, train_points"),
        MemoryPeak("train quantizer", "task", base + train, False, "train_points"),
        MemoryPeak("build shards", "task", base + shard, True, "shard_rows"),
        MemoryPeak("merge parts", "task", base + merge, True, "merge_buffer_bytes"),
        MemoryPeak("write ledger", "task", base + 2 * encoded, True, "piece"),
        MemoryPeak("verify", "task", base + corpus.num_docs * c["ledger_check_bytes_per_doc"], False, "documents"),
        MemoryPeak("measure recall", "task", base + sizes.nlist * d * 4 * 4, False, "nlist"),
    ]


def update_driver_bytes(work: Workload, c: Mapping[str, float]) -> float:
    """Peak of the driver of an update: it holds the ledger of the whole corpus."""
    return c["driver_bytes"] + work.corpus.num_docs * c["update_bytes_per_doc"]
