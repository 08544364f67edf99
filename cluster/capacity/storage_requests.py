"""Requests to S3 of each stage of a build, as tests/pipelines/test_plan_requests.py counts them against a local server.

Reads are GET, HEAD and LIST; writes are PUT and POST. DELETE costs nothing and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from cluster.capacity.objects import BLOCK_BYTES, encoded_bytes, num_parts, num_scans, object_bytes
from cluster.capacity.workload import Workload

READ_AT_ONCE = 70_000  # bytes of a row store that one request brings: a block, and what is left of a row group
MULTIPART_BYTES = 16 << 20  # operators/storage/s3_store.py
SCANNED_AT_ONCE = 65_536  # rows that a scan reads with one request (operators/artifact/part_scan.py)
COPIED_AT_ONCE = 8 << 20  # bytes of lists (operators/artifact/mapped_segment.py local_copy)
CACHE_BYTES = 256 << 20  # operators/artifact/index.py: a third of it for vectors
PROBE_RECALL_K = 10  # pipelines/recall.py


def stage_requests(work: Workload, c: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """(reads, writes) by stage."""
    pieces, shards, parts = work.num_pieces, work.num_shards, num_parts(work, c)
    sizes = object_bytes(work, c)
    run_puts = 4  # three objects and the record
    row_reads = sizes["rows"] / READ_AT_ONCE
    blocks = math.ceil(
        encoded_bytes(work, c) / pieces / BLOCK_BYTES
    )  # a piece of one is read at once, with all columns

    def of_piece(columns: float) -> float:
        return 1 + min(columns, blocks)

    merges: dict[str, tuple[float, float]] = {}
    before = shards
    for number, runs in enumerate(work.runs_of_waves, 1):
        merges[f"merge wave {number}"] = (6 * before + runs + row_reads, runs * run_puts + _parts_of(sizes, runs))
        before = runs
    merges["merge parts"] = (
        6 * before * parts + 4 * before + parts + row_reads,
        parts * run_puts + _parts_of(sizes, parts),
    )
    return {
        "list sources": (11 + 3 * work.corpus.num_objects + work.corpus.num_objects / 1000, 2),
        "check encoder": (20, 1),
        "encode pieces": (8 * pieces, 3 * pieces + encoded_bytes(work, c) / MULTIPART_BYTES),
        "number rows": (of_piece(2) * pieces + 2 * work.num_hash_runs * work.num_passes, work.num_hash_runs),
        "draw samples": ((2 + 2 * of_piece(2)) * pieces + 2 * shards, shards * run_puts),
        "train quantizer": (20 + 4 * shards, 3),
        "build shards": (of_piece(2.5) * pieces + 6 * shards, shards * run_puts + _parts_of(sizes, shards)),
        **merges,
        "write ledger": (of_piece(3.5) * pieces + 2 * shards + 6, 2 + work.num_tables),
        "verify": (10 * parts + 20 + row_reads * 1.5, 0),
        "measure recall": (scan_reads(work, c) + search_reads(work, c), 1),
        "publish": (8 + 2 * parts, 2),
    }


def scan_reads(work: Workload, c: Mapping[str, float]) -> float:
    """Of the tasks that scan for exact neighbours: records, sizes and headers of the parts, and their vectors in blocks."""
    if not num_scans(work, c):
        return 0.0
    return 5 * num_parts(work, c) + work.corpus.num_vectors / SCANNED_AT_ONCE


def search_reads(work: Workload, c: Mapping[str, float]) -> float:
    """Of the task that searches: it opens the index, copies the lists, and reads the vectors that are scored again.

    Each of those lies in a block of its own where there are more blocks than candidates; they are read in every search
    where they do not fit in the cache of an open index.
    """
    parts, sizes = num_parts(work, c), object_bytes(work, c)
    blocks = sizes["vectors for refinement"] / BLOCK_BYTES
    scored: float = min(work.index.query_sample, work.corpus.num_vectors) * PROBE_RECALL_K * work.index.refine_factor
    scored *= c["refine_growth"]
    cached = sizes["vectors for refinement"] < CACHE_BYTES / 3
    again = min(scored, blocks) * (1 if cached else c["searches"])
    return 6 * parts + 8 + sizes["inverted lists"] / COPIED_AT_ONCE + again


def _parts_of(sizes: Mapping[str, float], runs: int) -> float:
    """Further writes for what is larger than one: each object goes up in parts of MULTIPART_BYTES."""
    total = 0.0
    for kind in ("inverted lists", "vectors for refinement", "rows"):
        each = sizes[kind] / runs
        if each > MULTIPART_BYTES:
            total += runs * (each / MULTIPART_BYTES + 1)
    return total
