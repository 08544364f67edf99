"""Makes small indices without Ray and without a model: seeded vectors and texts -> pieces -> shards -> parts -> version.

The encoder is not the subject here, everything after it is: the operators of the build are called as the build does.
N chunks, Q queries, d dimensions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from kernels.assign import assign_nearest
from kernels.kmeans import kmeans
from kernels.pq import pq_train
from operators import schemas
from operators.artifact.manifest import (
    Manifest,
    PartRef,
    Segment,
    compute_content_digest,
    part_ref,
    read_current,
    write_manifest,
)
from operators.artifact.manifest import publish as publish_manifest
from operators.artifact.quantizer import Quantizer
from operators.merger import merge_range, open_runs, split_lists
from operators.piece_store import EncodedPiece, commit_piece, write_table
from operators.query_sample import query_table
from operators.row_ids import RowIds, assign_row_ids
from operators.shard_builder import PieceOfShard, build_shard
from operators.storage.checked import ObjectEntry, put_checked
from operators.storage.commits import CommitRecord
from operators.storage.fencing import take_epoch
from operators.storage.store import Store, open_store

RUN = "runs/test"
WORDS = ["wing", "flow", "heat", "shock", "боundary", "層", "plate", "drag", "lift", "jet", "nozzle", "wake"]


@dataclass(frozen=True)
class Corpus:
    """Documents of one to three chunks: vectors float16 [N, d], doc_ids and chunk_no of N chunks, texts; queries [Q, d]."""

    vectors_Nd: np.ndarray
    queries_Qd: np.ndarray
    doc_ids: list[str]
    chunk_no: np.ndarray
    texts: list[str]


def make_corpus(num_docs: int, d: int = 16, *, seed: int = 0, num_queries: int = 16, unit: bool = True) -> Corpus:
    """Seeded clustered vectors (of unit length if `unit`), each different, and texts of a few words."""
    rng = np.random.default_rng(seed)
    chunks_of = 1 + np.arange(num_docs) % 3
    doc_no = np.repeat(np.arange(num_docs), chunks_of)
    chunk_no = np.concatenate([np.arange(n) for n in chunks_of]).astype(np.int32) if num_docs else np.empty(0, np.int32)
    centers = rng.standard_normal((12, d))
    vectors = centers[rng.integers(0, 12, len(doc_no))] + 0.5 * rng.standard_normal((len(doc_no), d))
    queries = centers[rng.integers(0, 12, num_queries)] + 0.5 * rng.standard_normal((num_queries, d))
    if unit:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    texts = [
        f"doc {i} chunk {c} " + " ".join(rng.choice(WORDS, 4 + int(rng.integers(0, 30))))
        for i, c in zip(doc_no.tolist(), chunk_no.tolist(), strict=True)
    ]
    ids = [f"doc-{i:06d}" for i in doc_no.tolist()]
    return Corpus(vectors.astype(np.float16), queries.astype(np.float32), ids, chunk_no, texts)


def encoded_table(
    doc_ids: Sequence[str], chunk_no: Sequence[int], texts: Sequence[str], vectors_Nd: np.ndarray, source: str = "a.csv"
) -> pa.Table:
    """A piece's rows, schemas.encoded(d); `row` counts documents."""
    d = vectors_Nd.shape[1]
    flat = pa.array(np.ascontiguousarray(vectors_Nd, np.float16).ravel(), pa.float16())
    columns = {
        "doc_id": list(doc_ids),
        "chunk_no": list(chunk_no),
        "start": [0] * len(texts),
        "end": [len(text) for text in texts],
        "text": list(texts),
        "source": [source] * len(texts),
        "row": (np.cumsum(np.asarray(chunk_no) == 0) - 1).tolist(),
        "text_hash": [hashlib.blake2b(doc_id.encode(), digest_size=16).digest() for doc_id in doc_ids],
    }
    schema = schemas.encoded(d)
    arrays = [pa.array(columns[name], schema.field(name).type) for name in columns]
    return pa.table([*arrays, pa.FixedSizeListArray.from_arrays(flat, type=schemas.vector_type(d))], schema=schema)


def reject_lines(reasons: Sequence[str], source: str = "a.csv") -> pa.Table:
    """Rejected rows for the given reasons, schemas.REJECTS."""
    lines = [
        {
            "source": source,
            "row": 1000 + i,
            "doc_id": None,
            "outcome": "rejected",
            "reason": reason,
            "detail": "made up",
        }
        for i, reason in enumerate(reasons)
    ]
    return pa.Table.from_pylist(lines, schema=schemas.REJECTS)


def commit_table(
    store: Store, piece_id: str, table: pa.Table, reasons: Sequence[str] = (), prefix: str = RUN
) -> CommitRecord:
    """A committed piece with `reasons` rejected rows."""
    num_docs = int((table.column("chunk_no").to_numpy() == 0).sum())
    piece = EncodedPiece(piece_id, table, reject_lines(reasons), num_docs + len(reasons))
    return commit_piece(store, prefix, piece, "inputs-of-pieces")


def commit_corpus(store: Store, corpus: Corpus, num_pieces: int, prefix: str = RUN) -> list[CommitRecord]:
    """The corpus in `num_pieces` pieces cut between documents; the first has two rejected rows."""
    starts = np.flatnonzero(corpus.chunk_no == 0)
    firsts = [block[0] if len(block) else len(corpus.texts) for block in np.array_split(starts, num_pieces)]
    records = []
    for number, (lo, hi) in enumerate(zip(firsts, [*firsts[1:], len(corpus.texts)], strict=True)):
        table = encoded_table(
            corpus.doc_ids[lo:hi],
            corpus.chunk_no[lo:hi].tolist(),
            corpus.texts[lo:hi],
            corpus.vectors_Nd[lo:hi],
            source=f"piece-{number}.csv",
        )
        reasons = ["empty_text", "not_utf8"] if number == 0 else []
        records.append(commit_table(store, f"{number:04d}", table, reasons, prefix))
    return records


def make_quantizer(vectors_Nd: np.ndarray, nlist: int, M: int, nbits: int, metric: str, seed: int = 1) -> Quantizer:
    """A quantizer trained on all vectors."""
    sample = vectors_Nd.astype(np.float32)
    centroids = kmeans(sample, nlist, metric=metric, seed=seed, iterations=4)
    residuals = sample - centroids[assign_nearest(sample, centroids, metric=metric)]
    return Quantizer(metric, centroids, pq_train(residuals, M, nbits, seed=seed, iterations=4), nbits)


def make_shards(
    store: Store, pieces: Sequence[CommitRecord], rows: RowIds, quantizer: Quantizer, num_shards: int, prefix: str = RUN
) -> list[CommitRecord]:
    """One shard for each of `num_shards` runs of consecutive pieces."""
    places = [
        PieceOfShard(record, rows.bases[i], rows.counts[i], rows.dropped.get(i, [])) for i, record in enumerate(pieces)
    ]
    bounds = [round(i * len(places) / num_shards) for i in range(num_shards + 1)]
    return [
        build_shard(store, f"{prefix}/shards-{num_shards}/shard-{i:05d}", places[lo:hi], quantizer, f"inputs-{i}")
        for i, (lo, hi) in enumerate(itertools.pairwise(bounds))
    ]


def merge_parts(
    store: Store,
    runs: Sequence[CommitRecord],
    quantizer: Quantizer,
    *,
    segment: str = "segments/s1",
    part_rows: int = 200,
    buffer_bytes: int = 20_000,
) -> list[PartRef]:
    """Parts of about `part_rows` entries, merged from the runs."""
    sizes = sum((reader.list_sizes_L for reader in open_runs(store, runs, quantizer.digest)), np.zeros(1, np.int64))
    refs = []
    for number, lists in enumerate(split_lists(sizes.astype(float), 0, part_rows)):
        key = f"{segment}/part-{number:05d}"
        merge_range(
            store, key, runs, lists, quantizer_digest=quantizer.digest, buffer_bytes=buffer_bytes, inputs="inputs"
        )
        refs.append(part_ref(store, f"{key}.json"))
    return refs


@dataclass(frozen=True)
class Version:
    """What `make_version` made, step by step."""

    store: Store
    corpus: Corpus
    pieces: list[CommitRecord]
    rows: RowIds
    quantizer: Quantizer
    shards: list[CommitRecord]
    manifest: Manifest

    def part_objects(self, part: int = 0) -> dict[str, ObjectEntry]:
        """Objects of a part by role."""
        from operators.artifact.manifest import read_part_record

        return read_part_record(self.store, self.manifest.segments[0].parts[part]).objects


def make_version(
    folder: Path | str,
    *,
    num_docs: int = 300,
    d: int = 16,
    nlist: int = 16,
    M: int = 8,
    nbits: int = 8,
    metric: str = "ip",
    seed: int = 0,
    num_pieces: int = 5,
    num_shards: int = 3,
    part_rows: int = 200,
    publish: bool = True,
) -> Version:
    """A whole version at `folder` (a path or URL), published unless told otherwise."""
    store = open_store(str(folder))
    corpus = make_corpus(num_docs, d, seed=seed, unit=metric == "ip")
    epoch = take_epoch(store, f"run-{seed}")
    prefix = f"{RUN}-{epoch.number}"
    pieces = commit_corpus(store, corpus, num_pieces, prefix)
    rows = assign_row_ids(store, pieces)
    quantizer = make_quantizer(corpus.vectors_Nd, nlist, M, nbits, metric)
    shards = make_shards(store, pieces, rows, quantizer, num_shards, prefix)
    segment = f"segments/s{epoch.number}"
    parts = merge_parts(store, shards, quantizer, segment=segment, part_rows=part_rows)
    manifest = make_manifest(store, corpus, pieces, rows, quantizer, parts, segment, epoch.number)
    if publish:
        current = read_current(store)
        publish_manifest(store, manifest, write_manifest(store, manifest), epoch, current[1] if current else None)
    return Version(store, corpus, pieces, rows, quantizer, shards, manifest)


def make_manifest(
    store: Store,
    corpus: Corpus,
    pieces: Sequence[CommitRecord],
    rows: RowIds,
    quantizer: Quantizer,
    parts: list[PartRef],
    segment: str,
    epoch: int,
) -> Manifest:
    """The candidate's manifest; its small objects are written below `segment`."""
    entry = quantizer.write(store)
    rejects = write_table(store, f"{segment}/rejects.parquet", reject_lines(["empty_text", "not_utf8"]))
    listing = put_checked(store, f"{segment}/sources.jsonl", json.dumps({"source": "a.csv"}).encode() + b"\n")
    numbers = np.arange(len(corpus.queries_Qd), dtype=np.uint64)
    drawn = query_table(numbers, [f"question {i}" for i in numbers], corpus.queries_Qd)
    queries = write_table(store, f"{segment}/queries.parquet", drawn)
    ntotal = sum(rows.counts)
    base = Segment(segment.removeprefix("segments/"), 0, ntotal, parts, rejects.to_json())
    sources: dict[str, Any] = {
        "arguments": ["a.csv"],
        "digest": "0" * 64,
        "num_objects": 1,
        "size_bytes": 1,
        "ignored": 0,
    }
    return Manifest(
        version=f"v{epoch:06d}",
        parent=None,
        run_id="test",
        epoch=epoch,
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        config={},
        fingerprint={},
        model={"name": "made up", "fingerprint": "0" * 64},
        metric=quantizer.metric,
        d=quantizer.d,
        nlist=quantizer.nlist,
        M=quantizer.M,
        nbits=quantizer.nbits,
        ntotal=ntotal,
        num_docs=rows.num_docs,
        rows={
            "read": sum(record.facts["num_rows_read"] for record in pieces),
            "indexed": rows.num_docs,
            "rejected": {"empty_text": 1, "not_utf8": 1},
            "dropped": {},
        },
        sources={**sources, "listing": listing.to_json()},
        quantizer=entry.to_json(),
        queries=queries.to_json(),
        segments=[base],
        quality={"nprobe": min(4, quantizer.nlist), "refine_factor": 4, "recall@10": 1.0},
        content_digest=compute_content_digest(entry, queries, [base]),
    )


def faiss_index(quantizer: Quantizer, vectors_Nd: np.ndarray) -> Any:
    """One plain faiss.IndexIVFPQ that assigned, encoded and holds all vectors under the ids 0..N-1."""
    index = quantizer.to_faiss()
    index.add(vectors_Nd.astype(np.float32))
    assert isinstance(index, faiss.IndexIVFPQ)
    return index


def flip_bit(store: Store, key: str, position: int, bit: int = 0) -> None:
    """Damage one bit of an object in place."""
    path = store.local_path(key)
    assert path is not None
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def truncate(store: Store, key: str, size_bytes: int) -> None:
    """Cut an object short in place."""
    path = store.local_path(key)
    assert path is not None
    path.write_bytes(path.read_bytes()[:size_bytes])
