"""From committed pieces to a candidate version: the functions that run as parallel tasks after the streaming job.

Each opens the store by its URL, does one unit of work and commits it. All are deterministic in their arguments.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from operators import schemas
from operators.artifact.list_assignment import ListAssignment
from operators.artifact.manifest import Manifest, PartRef, Segment, read_part_record
from operators.artifact.quantizer import Quantizer, read_quantizer
from operators.artifact.verifier import PartReport, check_version, verify_part
from operators.documents import TAKES_PART, document_table, write_documents
from operators.encoding.encode_config import EncodeConfig, configured_model
from operators.encoding.text_encoder import TextEncoder
from operators.errors import FingerprintError
from operators.index_config import IndexConfig, IndexSizes
from operators.merger import merge_range
from operators.piece_store import READ_AHEAD, read_table, read_tables, write_table
from operators.query_sample import lowest_queries
from operators.renumbering import Renumbering
from operators.row_ids import Duplicates, duplicate_lines
from operators.shard_builder import PieceOfShard, build_shard
from operators.storage.checked import CheckedFile, ObjectEntry, put_checked, write_checked
from operators.storage.commits import CommitRecord, commit, finished_unit, new_attempt, read_record
from operators.storage.store import Store, open_store
from operators.trainer import SampledRows, join_samples, sample_pieces, train_quantizer

Input = PartRef | CommitRecord  # of a merge: a published part, or a run that has not been published


@dataclass(frozen=True)
class Threads:
    """CPU threads of a task. Semantic: the number changes the rounding of matrix products."""

    count: int

    def apply(self) -> None:
        """Set it for torch and faiss in this process."""
        import faiss
        import torch

        torch.set_num_threads(self.count)
        faiss.omp_set_num_threads(self.count)


def write_rejects(store: Store, key: str, pieces: Sequence[CommitRecord], duplicates: Duplicates) -> ObjectEntry | None:
    """All rows that were left out, in source order, duplicates last; None when there are none. Streams piece by piece."""
    with_rejects = [record for record in pieces if "rejects" in record.objects]
    if not with_rejects and not len(duplicates.place_F):
        return None
    with (
        write_checked(store, key) as pending,
        pa.PythonFile(pending.file, mode="w") as sink,
        pq.ParquetWriter(sink, schemas.REJECTS, compression="zstd") as writer,
    ):
        for table in read_tables(store, (record.objects["rejects"] for record in with_rejects)):
            writer.write_table(table)
        for lines in duplicate_lines(store, pieces, duplicates):
            writer.write_table(lines)
    return pending.entry


def write_piece_documents(
    store_url: str, key: str, pieces: Sequence[tuple[CommitRecord, int, list[int]]]
) -> tuple[dict[str, Any], dict[str, int], dict[str, int]]:
    """Write a table of the ledger from pieces (record, first row id, dropped documents).

    Returns what the manifest says of it, and by source the numbers of its documents and of its rows that were left out.
    """
    store = open_store(store_url)
    documents: Counter[str] = Counter()
    left_out: Counter[str] = Counter()

    def tables() -> Iterator[pa.Table]:
        names = ["doc_id", "source", "row", "text_hash", "chunk_no"]
        read = read_tables(store, (record.objects["encoded"] for record, _, _ in pieces), names)
        for (record, first_row_id, dropped), table in zip(pieces, read, strict=True):
            chunk_no = table.column("chunk_no").to_numpy()
            starts = np.flatnonzero(chunk_no == 0)
            num_chunks = np.diff(np.append(starts, len(chunk_no)))
            num_chunks[dropped] = 0
            row_id = first_row_id + np.cumsum(num_chunks) - num_chunks
            row_id[dropped] = -1
            docs = table.take(pa.array(starts)).combine_chunks()
            documents.update(Counter(docs.column("source").to_pylist()))
            if "rejects" in record.objects:
                lost = read_table(store, record.objects["rejects"], ["source"])
                left_out.update(Counter(lost.column("source").to_pylist()))
            states = np.full(len(starts), TAKES_PART, np.int8)
            doc_id, row, text_hash = (docs.column(name) for name in ("doc_id", "row", "text_hash"))
            yield document_table(doc_id, row, text_hash, row_id, num_chunks, states)

    return write_documents(store, key, tables()), dict(documents), dict(left_out)


def sample_group(
    store_url: str, key_prefix: str, pieces: Sequence[PieceOfShard], share: float, num_queries: int, inputs: str
) -> CommitRecord:
    """Commit a group's share of the training and the query sample."""
    store = open_store(store_url)
    done = finished_unit(store, f"{key_prefix}.json", inputs)
    if done is not None:
        return done
    found = sample_pieces(store, [(p.record, p.dropped_docs) for p in pieces], share=share)
    queries = lowest_queries(store, [p.record for p in pieces], num_queries)
    attempt = new_attempt()
    # Raw little-endian arrays: written and read once, by training, and several times faster than Parquet.
    objects = {
        "order": put_checked(store, f"{key_prefix}-{attempt}.u64", found.order.astype("<u8").tobytes()),
        "vectors": put_checked(store, f"{key_prefix}-{attempt}.f16", found.vectors.astype("<f2").tobytes()),
        "queries": write_table(store, f"{key_prefix}-{attempt}.queries.parquet", queries),
    }
    name = key_prefix.rsplit("/", 1)[1]
    return commit(store, f"{key_prefix}.json", CommitRecord(f"sample {name}", inputs, attempt, objects))


def train(
    store_url: str,
    prefix: str,
    samples: Sequence[CommitRecord],
    config: IndexConfig,
    sizes: IndexSizes,
    threads: Threads,
    inputs: str,
) -> CommitRecord:
    """Train and commit the quantizer. Its bits do not depend on the number of threads (kernels.kmeans)."""
    store = open_store(store_url)
    key = f"{prefix}/trained.json"
    done = finished_unit(store, key, inputs)
    if done is not None:
        return done
    threads.apply()
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        sample = join_samples(list(pool.map(lambda record: _read_sample(store, record), samples)))
    quantizer = train_quantizer(store, prefix, sample.vectors, config, sizes, inputs)
    objects = {"quantizer": quantizer.write(store)}
    facts = {"sample_rows": len(sample.order), "assignment": quantizer.assignment.to_json()}
    return commit(store, key, CommitRecord("train quantizer", inputs, new_attempt(), objects, facts))


def query_encoder(encode: EncodeConfig, model_fingerprint: str) -> TextEncoder:
    """The corpus's encoder, for queries. Raises FingerprintError when the model at hand is another one."""
    spec = configured_model(encode)
    if spec.fingerprint != model_fingerprint:
        raise FingerprintError(
            f"the model at {spec.path} has fingerprint {spec.fingerprint[:12]}, the index was built with {model_fingerprint[:12]};"
            " their vectors cannot be compared: give the same model (--model), or build the index again"
        )
    return TextEncoder(encode, spec)


def _read_sample(store: Store, record: CommitRecord) -> SampledRows:
    order = np.frombuffer(CheckedFile(store, record.objects["order"]).readall(), "<u8")
    vectors = np.frombuffer(CheckedFile(store, record.objects["vectors"]).readall(), "<f2")
    return SampledRows(order, vectors.reshape(len(order), -1) if len(order) else vectors.reshape(0, 1))


def shard(
    store_url: str,
    key_prefix: str,
    pieces: Sequence[PieceOfShard],
    trained: CommitRecord,
    threads: Threads,
    inputs: str,
) -> CommitRecord:
    """Build and commit a shard unless it was."""
    store = open_store(store_url)
    done = read_record(store, f"{key_prefix}.json")
    if done is not None:
        return done  # the merge checks its inputs and refuses a foreign one by name
    threads.apply()
    quantizer = _quantizer(store, trained.objects["quantizer"], ListAssignment.from_json(trained.facts["assignment"]))
    return build_shard(store, key_prefix, pieces, quantizer, inputs)


def bare(segments: Sequence[Segment]) -> list[Segment]:
    """The segments without their parts: what a `Renumbering` needs."""
    return [dataclasses.replace(segment, parts=[]) for segment in segments]


_renumberings: dict[str, Renumbering] = {}


def renumbering_of(store: Store, segments: Sequence[Segment]) -> Renumbering:
    """The renumbering, kept in the worker process from task to task."""
    name = repr([(s.first_row_id, s.num_rows, s.deleted and s.deleted["sha256"]) for s in segments])
    if name not in _renumberings:
        _renumberings.clear()
        _renumberings[name] = Renumbering(store, segments)
    return _renumberings[name]


def merge(
    store_url: str,
    key_prefix: str,
    merged: Sequence[Input],
    lists: tuple[int, int],
    quantizer_digest: str,
    buffer_bytes: int,
    inputs: str,
    segments: Sequence[Segment] | None = None,
) -> CommitRecord:
    """Merge a range of lists and commit the part (or intermediate run) unless it was.

    segments: those whose live rows stay, under new row ids (a compaction). None: all rows stay as they are.
    """
    store = open_store(store_url)
    done = finished_unit(store, f"{key_prefix}.json", inputs)
    if done is not None:
        return done
    runs = [read_part_record(store, each) if isinstance(each, PartRef) else each for each in merged]
    return merge_range(
        store,
        key_prefix,
        runs,
        lists,
        quantizer_digest=quantizer_digest,
        buffer_bytes=buffer_bytes,
        inputs=inputs,
        renumbering=renumbering_of(store, segments) if segments is not None else None,
    )


def check_part(
    store_url: str,
    ref: PartRef,
    quantizer: ObjectEntry,
    assignment: ListAssignment,
    segment: Segment,
    threads: Threads,
) -> PartReport:
    """Verify one part of a candidate's segment."""
    threads.apply()
    store = open_store(store_url)
    return verify_part(store, ref, _quantizer(store, quantizer, assignment), segment)


def check_candidate(store_url: str, manifest: Manifest, reports: dict[str, list[PartReport]]) -> list[str]:
    """All that is wrong with a candidate, given the reports of its new segments' parts by the segment's name."""
    return check_version(open_store(store_url), manifest, reports)


_quantizers: dict[tuple[str, ListAssignment], Quantizer] = {}


def _quantizer(store: Store, entry: ObjectEntry, assignment: ListAssignment) -> Quantizer:
    """The quantizer, kept in the worker process from task to task."""
    name = (entry.sha256, assignment)
    if name not in _quantizers:
        _quantizers.clear()
        _quantizers[name] = read_quantizer(store, entry, assignment)
    return _quantizers[name]
