"""What the format takes beside vectors and codes, from objects of the made pieces: fixed bytes, bytes a row and a byte of text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from operators.artifact.manifest import part_ref
from operators.documents import SourceEntry, write_sources
from operators.piece_store import piece_key, write_table
from operators.query_sample import query_table
from operators.sources.listing import SourceObject
from operators.storage.commits import CommitRecord
from operators.storage.store import Store

OBJECTS = 1000
BLOCK_BYTES, CHECKSUM_BYTES = 64 << 10, 16 / 3


def two_sizes(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """(fixed, a unit) from (units, bytes) of two objects."""
    unit = (large[1] - small[1]) / (large[0] - small[0])
    return max(0.0, small[1] - unit * small[0]), unit


def without_checksums(record_bytes: float, record: CommitRecord) -> float:
    """Bytes of a record but for its blocks' checksums, which grow with its objects."""
    return record_bytes - record.size_bytes / BLOCK_BYTES * CHECKSUM_BYTES


def small_objects(store: Store, piece: CommitRecord, run_key: str, texts: Sequence[str], d: int) -> dict[str, float]:
    """Bytes of records, queries, listing and manifest entries by coefficient. piece: one of the run `few/0`."""
    name = piece.unit.split()[1]
    stored = float(len(store.read(piece_key("few/0", name))))
    found: dict[str, float] = {"record_bytes": without_checksums(stored, piece)}
    rng = np.random.default_rng(11)

    def queries(count: int) -> tuple[float, float]:
        vectors = rng.standard_normal((count, d)).astype(np.float32)
        words = [" ".join(text.split()[:12]) for text in texts[:count]]
        table = query_table(rng.integers(0, 1 << 63, count).astype(np.uint64), words, vectors)
        return count, write_table(store, f"bytes/queries-{count}.parquet", table).size_bytes - 4.0 * d * count

    found["queries_bytes"], found["queries_bytes_per_query"] = two_sizes(queries(32), queries(256))

    def listing(count: int) -> tuple[float, float]:
        entries = [
            SourceEntry(
                SourceObject(
                    f"s3://bucket/corpus/part-{n:05d}.parquet", f"part-{n:05d}.parquet", f"{n:032x}", 1 << 28, "parquet"
                ),
                4000 + n,
                4000 * n,
                4000,
            )
            for n in range(count)
        ]
        return count, write_sources(store, f"bytes/sources-{count}.parquet", entries).size_bytes

    found["listing_bytes"], found["listing_bytes_per_object"] = two_sizes(listing(1), listing(OBJECTS))
    ref: dict[str, Any] = asdict(part_ref(store, run_key))
    found["manifest_bytes_per_part"] = float(len(json.dumps(ref, indent=4)))
    return found
