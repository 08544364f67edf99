"""Makes small indices without Ray and without a model: seeded vectors and texts -> pieces -> shards -> parts -> version.

The encoder is not the subject here, everything after it is: the operators of the build are called as the build does.
`make_version` makes a base; `add_delta` and `delete_rows` make the next version of one, with more segments, deleted rows
and a ledger that says the same. N chunks, Q queries, d dimensions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
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
from operators.artifact.deletions import live_rows, write_deleted
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
from operators.documents import (
    DELETED,
    SourceEntry,
    document_table,
    read_ledger,
    read_sources,
    write_documents,
    write_sources,
)
from operators.merger import merge_range, open_runs, split_lists
from operators.piece_store import EncodedPiece, commit_piece, read_table, write_table
from operators.query_sample import query_table
from operators.row_ids import RowIds, assign_row_ids
from operators.shard_builder import PieceOfShard, build_shard
from operators.sources.listing import SourceObject
from operators.storage.checked import ObjectEntry
from operators.storage.commits import CommitRecord
from operators.storage.fencing import Epoch, take_epoch
from operators.storage.store import Store, open_store

RUN = "runs/test"
REJECTED = ["empty_text", "not_utf8"]
WORDS = ["wing", "flow", "heat", "shock", "боundary", "層", "plate", "drag", "lift", "jet", "nozzle", "wake"]


@dataclass(frozen=True)
class Corpus:
    """Documents of one to three chunks: vectors float16 [N, d], doc_ids and chunk_no of N chunks, texts; queries [Q, d]."""

    vectors_Nd: np.ndarray
    queries_Qd: np.ndarray
    doc_ids: list[str]
    chunk_no: np.ndarray
    texts: list[str]


def make_corpus(
    num_docs: int,
    d: int = 16,
    *,
    seed: int = 0,
    num_queries: int = 16,
    unit: bool = True,
    name: str = "doc",
    centers_of: int | None = None,
) -> Corpus:
    """Seeded clustered vectors (of unit length if `unit`), each different, and texts of a few words.

    Ids begin with `name`; the clusters are those of the corpus with seed `centers_of`, else its own.
    """
    rng = np.random.default_rng(seed)
    chunks_of = 1 + np.arange(num_docs) % 3
    doc_no = np.repeat(np.arange(num_docs), chunks_of)
    chunk_no = np.concatenate([np.arange(n) for n in chunks_of]).astype(np.int32) if num_docs else np.empty(0, np.int32)
    centers = rng.standard_normal((12, d))
    if centers_of is not None:
        centers = np.random.default_rng(centers_of).standard_normal((12, d))
    vectors = centers[rng.integers(0, 12, len(doc_no))] + 0.5 * rng.standard_normal((len(doc_no), d))
    queries = centers[rng.integers(0, 12, num_queries)] + 0.5 * rng.standard_normal((num_queries, d))
    if unit:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    texts = [
        f"{name} {i} chunk {c} " + " ".join(rng.choice(WORDS, 4 + int(rng.integers(0, 30))))
        for i, c in zip(doc_no.tolist(), chunk_no.tolist(), strict=True)
    ]
    ids = [f"{name}-{i:06d}" for i in doc_no.tolist()]
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


def reject_lines(reasons: Sequence[str], source: str = "a.csv", outcome: str = "rejected") -> pa.Table:
    """Rows left out for the given reasons, schemas.REJECTS."""
    lines = [
        {
            "source": source,
            "row": 1000 + i,
            "doc_id": None,
            "outcome": outcome,
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


def commit_corpus(
    store: Store, corpus: Corpus, num_pieces: int, prefix: str = RUN, *, name: str = "piece", with_rejects: bool = True
) -> list[CommitRecord]:
    """The corpus in `num_pieces` pieces cut between documents, of an object each; the first has two rejected rows."""
    starts = np.flatnonzero(corpus.chunk_no == 0)
    firsts = [block[0] if len(block) else len(corpus.texts) for block in np.array_split(starts, num_pieces)]
    records = []
    for number, (lo, hi) in enumerate(zip(firsts, [*firsts[1:], len(corpus.texts)], strict=True)):
        table = encoded_table(
            corpus.doc_ids[lo:hi],
            corpus.chunk_no[lo:hi].tolist(),
            corpus.texts[lo:hi],
            corpus.vectors_Nd[lo:hi],
            source=f"{name}-{number}.csv",
        )
        reasons = REJECTED if number == 0 and with_rejects else []
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
    """What `make_version` made, step by step; or what `add_delta` made of that: then `rows` is still the base's.

    Row r of `corpus` is the row with row id r, also when it is deleted. pieces, shards: of all segments.
    """

    store: Store
    corpus: Corpus
    pieces: list[CommitRecord]
    rows: RowIds
    quantizer: Quantizer
    shards: list[CommitRecord]
    manifest: Manifest
    seed: int = 0

    def part_objects(self, part: int = 0, segment: int = 0) -> dict[str, ObjectEntry]:
        """Objects of a part by role."""
        from operators.artifact.manifest import read_part_record

        return read_part_record(self.store, self.manifest.segments[segment].parts[part]).objects

    @property
    def live_N(self) -> np.ndarray:
        """bool [N], by row id: False for the deleted rows."""
        return live_rows(self.store, self.manifest)


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
    folder_of = f"segments/s{epoch.number}"
    parts = merge_parts(store, shards, quantizer, segment=folder_of, part_rows=part_rows)
    segment = Segment(f"s{epoch.number}", 0, sum(rows.counts), parts)
    manifest = make_manifest(store, corpus, pieces, rows, quantizer, segment, folder_of, epoch.number)
    if publish:
        _publish(store, manifest, epoch)
    return Version(store, corpus, pieces, rows, quantizer, shards, manifest, seed)


def add_delta(
    version: Version,
    num_docs: int = 30,
    *,
    delete: Sequence[int] = (),
    seed: int | None = None,
    drifted: bool = False,
    num_pieces: int = 1,
    part_rows: int = 200,
    publish: bool = True,
) -> Version:
    """The next version: one more segment of `num_docs` new documents (of the base's clusters unless `drifted`; none: no
    segment), of a source object a piece, and without the documents that the row ids `delete` belong to, as if they
    were deleted by request. The given version is left as it is and named as the parent.
    """
    store, old = version.store, version.manifest
    epoch = take_epoch(store, f"delta-of-{old.version}")
    folder, first_row_id = f"segments/s{epoch.number}", old.next_row_id
    pieces, shards, segments, tables = [], [], list(old.segments), list(old.documents)
    entries, corpus = read_sources(store, old), version.corpus
    if num_docs:
        added = make_corpus(
            num_docs,
            old.d,
            seed=epoch.number + 1000 * version.seed if seed is None else seed,
            num_queries=0,
            unit=old.metric == "ip",
            name=f"delta{epoch.number}",
            centers_of=None if drifted else version.seed,
        )
        prefix = f"{RUN}-{epoch.number}"
        pieces = commit_corpus(store, added, num_pieces, prefix, name=f"delta{epoch.number}", with_rejects=False)
        rows = assign_row_ids(store, pieces)
        rows = dataclasses.replace(rows, bases=[base + first_row_id for base in rows.bases])
        shards = make_shards(store, pieces, rows, version.quantizer, 1, prefix)
        parts = merge_parts(store, shards, version.quantizer, segment=folder, part_rows=part_rows)
        segments.append(Segment(f"s{epoch.number}", first_row_id, sum(rows.counts), parts))
        first = sum(table["num_rows"] for table in tables)
        entries += source_entries(pieces, first, name=f"delta{epoch.number}")
        tables.append(write_documents(store, f"{folder}/documents.parquet", [documents_of(added, first_row_id)]))
        corpus = joined_corpus(corpus, added)
    listing = write_sources(store, f"{folder}/sources.parquet", entries)
    manifest = dataclasses.replace(
        old,
        version=f"v{epoch.number:06d}",
        parent=old.version,
        epoch=epoch.number,
        kind="update",
        sources={**old.sources, "num_objects": len(entries), "listing": listing.to_json()},
        documents=tables,
        segments=segments,
    )
    manifest = _deleted(store, manifest, old, folder, set(delete))
    manifest = dataclasses.replace(manifest, content_digest=compute_content_digest(manifest))
    if publish:
        _publish(store, manifest, epoch)
    return Version(
        store,
        corpus,
        [*version.pieces, *pieces],
        version.rows,
        version.quantizer,
        [*version.shards, *shards],
        manifest,
        version.seed,
    )


def delete_rows(version: Version, row_ids: Sequence[int], *, publish: bool = True) -> Version:
    """The next version: without the documents that these rows belong to (so all rows of each are deleted)."""
    return add_delta(version, 0, delete=row_ids, publish=publish)


def _deleted(store: Store, manifest: Manifest, old: Manifest, folder: str, row_ids: set[int]) -> Manifest:
    """The manifest with counts, bitmaps, amendments and rejects for the documents of the rows `row_ids` deleted."""
    ledger = read_ledger(store, manifest, read_sources(store, manifest))  # objects lie in the order of their positions
    had_rows = ledger.row_id_N >= 0
    wanted = np.array(sorted(row_ids), np.int64)
    begins = np.searchsorted(wanted, ledger.row_id_N)
    ends = np.searchsorted(wanted, ledger.row_id_N + ledger.num_chunks_N)
    gone = np.flatnonzero(had_rows & (ends > begins))
    live = np.zeros(manifest.next_row_id, bool)
    left = np.flatnonzero(had_rows & ~(ends > begins))
    for first, count in zip(ledger.row_id_N[left].tolist(), ledger.num_chunks_N[left].tolist(), strict=True):
        live[first : first + count] = True
    segments = []
    for segment in manifest.segments:
        deleted_N = ~live[segment.first_row_id : segment.first_row_id + segment.num_rows]
        count = int(deleted_N.sum())
        if count != segment.num_deleted:
            entry = write_deleted(store, f"{folder}/deleted-{segment.name}", deleted_N)
            segment = dataclasses.replace(segment, deleted=entry.to_json(), num_deleted=count)
        segments.append(segment)
    ledger.row_id_N[gone], ledger.num_chunks_N[gone], ledger.state_N[gone] = -1, 0, DELETED
    amended, rejects = manifest.amended, manifest.rejects
    if len(gone):
        changed = np.flatnonzero(ledger.state_N == DELETED)
        columns = [changed, ledger.row_id_N[changed], ledger.num_chunks_N[changed], ledger.state_N[changed]]
        table = pa.table(
            [pa.array(c, f.type) for c, f in zip(columns, schemas.AMENDED, strict=True)], schema=schemas.AMENDED
        )
        amended = write_table(store, f"{folder}/amended.parquet", table).to_json()
        assert rejects is not None
        lines = [
            read_table(store, ObjectEntry.from_json(rejects)),
            reject_lines(["deleted"] * len(gone), "", "dropped"),
        ]
        rejects = write_table(store, f"{folder}/rejects.parquet", pa.concat_tables(lines)).to_json()
    num_docs = int((ledger.row_id_N >= 0).sum())
    dropped = {"deleted": old.rows["dropped"].get("deleted", 0) + len(gone)}
    return dataclasses.replace(
        manifest,
        ntotal=sum(segment.num_live for segment in segments),
        num_docs=num_docs,
        rows={
            "read": len(ledger) + len(REJECTED),
            "indexed": num_docs,
            "rejected": old.rows["rejected"],
            "dropped": {reason: count for reason, count in dropped.items() if count},
        },
        segments=segments,
        rejects=rejects,
        amended=amended,
    )


def _publish(store: Store, manifest: Manifest, epoch: Epoch) -> None:
    current = read_current(store)
    publish_manifest(store, manifest, write_manifest(store, manifest), epoch, current[1] if current else None)


def joined_corpus(first: Corpus, second: Corpus) -> Corpus:
    """Both corpora's chunks; the queries of the first."""
    return Corpus(
        np.concatenate([first.vectors_Nd, second.vectors_Nd]),
        first.queries_Qd,
        first.doc_ids + second.doc_ids,
        np.concatenate([first.chunk_no, second.chunk_no]),
        first.texts + second.texts,
    )


def documents_of(corpus: Corpus, first_row_id: int = 0) -> pa.Table:
    """The ledger's table (schemas.DOCUMENTS) of a corpus without duplicates whose chunks have the row ids first_row_id ..."""
    starts = np.flatnonzero(corpus.chunk_no == 0)
    doc_ids = [corpus.doc_ids[start] for start in starts.tolist()]
    hashes = [hashlib.blake2b(doc_id.encode(), digest_size=16).digest() for doc_id in doc_ids]
    return document_table(
        pa.array(doc_ids, pa.string()),
        pa.array(np.arange(len(starts))),
        pa.array(hashes, pa.binary(16)),
        starts + first_row_id,
        np.diff(np.append(starts, len(corpus.chunk_no))),
        np.zeros(len(starts), np.int8),
    )


def source_entries(pieces: Sequence[CommitRecord], first: int = 0, *, name: str = "piece") -> list[SourceEntry]:
    """The listing: an object a piece, whose documents are at the positions first ... of the ledger."""
    entries = []
    for number, record in enumerate(pieces):
        source = f"{name}-{number}.csv"
        obj = SourceObject(f"/corpus/{source}", source, f"etag-{number}", 1000 + number, "csv")
        entries.append(SourceEntry(obj, record.facts["num_rows_read"], first, record.facts["num_docs"]))
        first += record.facts["num_docs"]
    return entries


def make_manifest(
    store: Store,
    corpus: Corpus,
    pieces: Sequence[CommitRecord],
    rows: RowIds,
    quantizer: Quantizer,
    base: Segment,
    folder: str,
    epoch: int,
) -> Manifest:
    """The candidate's manifest; its small objects are written below `folder`."""
    entry = quantizer.write(store)
    rejects = write_table(store, f"{folder}/rejects.parquet", reject_lines(REJECTED))
    listing = write_sources(store, f"{folder}/sources.parquet", source_entries(pieces))
    numbers = np.arange(len(corpus.queries_Qd), dtype=np.uint64)
    drawn = query_table(numbers, [f"question {i}" for i in numbers], corpus.queries_Qd)
    queries = write_table(store, f"{folder}/queries.parquet", drawn)
    sources: dict[str, Any] = {
        "arguments": ["/corpus"],
        "digest": "0" * 64,
        "num_objects": len(pieces),
        "size_bytes": 1,
        "ignored": 0,
    }
    manifest = Manifest(
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
        ntotal=base.num_rows,
        num_docs=rows.num_docs,
        rows={
            "read": sum(record.facts["num_rows_read"] for record in pieces),
            "indexed": rows.num_docs,
            "rejected": dict.fromkeys(REJECTED, 1),
            "dropped": {},
        },
        sources={**sources, "listing": listing.to_json()},
        quantizer=entry.to_json(),
        queries=queries.to_json(),
        segments=[base],
        rejects=rejects.to_json(),
        documents=[write_documents(store, f"{folder}/documents.parquet", [documents_of(corpus)])],
        amended=None,
        quality={"nprobe": min(4, quantizer.nlist), "refine_factor": 4, "recall@10": 1.0},
        content_digest="",
    )
    return dataclasses.replace(manifest, content_digest=compute_content_digest(manifest))


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
