"""Bytes of every kind of object that a build writes. Formats: docs/artifact-format.md.

What the format fixes is counted exactly (vectors, codes, row ids, list sizes); what is compressed has a measured mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from cluster.capacity.workload import Workload

BLOCK_BYTES = 64 << 10  # of a checksum (operators/storage/checked.py)
CHECKSUM_BYTES = 16 / 3  # base64 of 4 bytes
EXACT_KEPT, EXACT_ENTRY = 64, 12  # neighbours of a query, and bytes of each (operators/artifact/exact_neighbours.py)
QUERIES_PER_PIECE = 32
GROUP_ROWS, MOST_GROUPS = 1 << 20, 512  # of the scan for exact neighbours (operators/artifact/part_scan.py)
VECTORS_HEADER, LISTS_HEADER = 128, 32
PUBLISHED = (
    "inverted lists",
    "vectors for refinement",
    "rows",
    "quantizer",
    "documents tables",
    "queries and neighbours",
    "source listing",
    "part records",
    "manifest",
)


def object_bytes(work: Workload, c: Mapping[str, float]) -> dict[str, float]:
    """Bytes by kind of object, each unit done once. Kinds that are not in PUBLISHED go when the run has published."""
    corpus, sizes, d = work.corpus, work.sizes, work.model.d
    n = corpus.num_vectors
    queries = min(work.index.query_sample, n, QUERIES_PER_PIECE * work.num_pieces)
    sampled, of_piece = _queries_bytes(queries, d, c), _queries_bytes(min(QUERIES_PER_PIECE, work.rows_per_piece), d, c)
    encoded = encoded_bytes(work, c)
    checksums = (encoded + work.num_pieces * of_piece) / BLOCK_BYTES * CHECKSUM_BYTES
    parts = num_parts(work, c)
    lists, vectors, rows, records = _runs_bytes(work, c, parts, sizes.nlist / parts)
    # An intermediate run has all lists, as a shard has.
    intermediate = sum(sum(_runs_bytes(work, c, runs, sizes.nlist)) for runs in work.runs_of_waves)
    documents = work.num_tables * c["documents_bytes_per_table"] + corpus.num_docs * c["documents_bytes_per_doc"]
    return {
        "pieces' vectors": encoded,
        "pieces' queries": work.num_pieces * of_piece,
        "pieces' records": work.num_pieces * c["record_bytes"] + checksums,
        "samples": sizes.train_points * (2 * d + 8) + work.num_shards * (sampled + c["record_bytes"]),
        "shards": sum(_runs_bytes(work, c, work.num_shards, sizes.nlist)),
        "merge waves": intermediate,
        "inverted lists": lists,
        "vectors for refinement": vectors,
        "rows": rows,
        "part records": records,
        "quantizer": 4 * d * (sizes.nlist + (1 << sizes.nbits)) + c["quantizer_bytes"],
        "documents tables": documents,
        "queries and neighbours": sampled + queries * EXACT_KEPT * EXACT_ENTRY + c["exact_bytes"],
        "source listing": c["listing_bytes"] + corpus.num_objects * c["listing_bytes_per_object"],
        "manifest": c["manifest_bytes"]
        + parts * c["manifest_bytes_per_part"]
        + documents / BLOCK_BYTES * CHECKSUM_BYTES,
    }


def encoded_bytes(work: Workload, c: Mapping[str, float]) -> float:
    """Bytes of the committed pieces' vectors and texts."""
    corpus = work.corpus
    rows = corpus.num_vectors * (2 * work.model.d + c["encoded_bytes_per_row"])
    texts = corpus.num_docs * corpus.bytes_per_doc * c["encoded_bytes_per_text_byte"]
    return work.num_pieces * c["encoded_bytes_per_piece"] + rows + texts


def num_parts(work: Workload, c: Mapping[str, float]) -> int:
    """Parts of about index.part_bytes, of whole lists (pipelines/index_build.py part_ranges)."""
    entries = encoded_bytes(work, c) + work.corpus.num_vectors * (work.sizes.code_size + 8)
    return min(work.sizes.nlist, max(1, math.ceil(entries / work.index.part_bytes)))


def num_scans(work: Workload, c: Mapping[str, float]) -> int:
    """Tasks that scan all vectors; 0: the task that searches does (pipelines/recall.py scan_in_tasks)."""
    vectors, parts = work.corpus.num_vectors, num_parts(work, c)
    of_part = vectors / parts
    groups = math.ceil(parts / max(1.0, max(GROUP_ROWS, vectors / MOST_GROUPS) // of_part))
    return groups if groups > 1 else 0


def _runs_bytes(
    work: Workload, c: Mapping[str, float], num_runs: int, lists_each: float
) -> tuple[float, float, float, float]:
    """(lists, vectors, rows, records) of runs that together hold all entries (operators/artifact/list_run.py)."""
    corpus, n = work.corpus, work.corpus.num_vectors
    lists = n * (work.sizes.code_size + 8) + num_runs * (LISTS_HEADER + 8 * lists_each)
    vectors = float(2 * work.model.d * n + num_runs * VECTORS_HEADER)
    texts = corpus.num_docs * corpus.bytes_per_doc * c["rows_bytes_per_text_byte"]
    rows = num_runs * c["rows_bytes_per_run"] + n * c["rows_bytes_per_row"] + texts
    records = num_runs * c["record_bytes"] + (lists + vectors + rows) / BLOCK_BYTES * CHECKSUM_BYTES
    return lists, vectors, rows, records


def _queries_bytes(count: float, d: int, c: Mapping[str, float]) -> float:
    """A Parquet object of so many queries with their vectors in float32."""
    return c["queries_bytes"] + count * (4 * d + c["queries_bytes_per_query"])
