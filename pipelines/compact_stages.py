"""The parallel tasks of a compaction: merge what is live of all segments, draw and encode stored vectors again, rewrite the ledger.

Each opens the store by its URL, does one unit of work and commits it. All are deterministic in their arguments.
N documents in corpus order, n rows, d dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from operators import schemas
from operators.artifact.ledger_verifier import drops_equal_texts
from operators.artifact.list_assignment import ListAssignment
from operators.artifact.list_run import RunReader, RunSlice, concat_sorted, splitmix64
from operators.artifact.manifest import Manifest, PartRef, Segment, read_part_record
from operators.artifact.quantizer import read_quantizer
from operators.crash_points import crash_point
from operators.documents import (
    Ledger,
    positions_of,
    read_documents,
    read_ledger,
    read_sources,
    rows_of_documents,
    winners_of,
    write_documents,
    write_sources,
)
from operators.errors import IntegrityError
from operators.merger import entry_checksum, renumbered
from operators.piece_store import doc_hashes
from operators.renumbering import Renumbering
from operators.shard_builder import commit_shard
from operators.storage.checked import ObjectEntry, put_checked
from operators.storage.commits import CommitRecord, commit, finished_unit, new_attempt, read_record
from operators.storage.store import Store, open_store
from operators.trainer import SampledRows, below, join_samples
from pipelines.index_stages import Threads, bare, renumbering_of

DOCUMENTS_AT_ONCE = 65_536
TABLE_DOCUMENTS = 1_000_000  # of one table of the ledger
CHECKED_ENTRIES = 16_384  # entries that are read back at once


@dataclass(frozen=True)
class ListsOfPart:
    """The lists [first, end) of a published part."""

    ref: PartRef
    first: int
    end: int


def _live_entries(
    store: Store, groups: Sequence[ListsOfPart], segments: Sequence[Segment], buffer_bytes: int
) -> Iterator[RunSlice]:
    """Live entries of the lists of each part, under their new row ids."""
    renumbering = renumbering_of(store, segments)
    for group in groups:
        record = read_part_record(store, group.ref)
        reader = RunReader(store, record.unit, record.objects, record.facts, cache_bytes=buffer_bytes // 3)
        yield renumbered(reader.read_lists(group.first, group.end), renumbering)


def sample_live(
    store_url: str,
    key_prefix: str,
    groups: Sequence[ListsOfPart],
    segments: Sequence[Segment],
    share: float,
    buffer_bytes: int,
    inputs: str,
) -> CommitRecord:
    """Commit these lists' share of the training sample: the rows that a build on the live texts would draw."""
    store = open_store(store_url)
    done = finished_unit(store, f"{key_prefix}.json", inputs)
    if done is not None:
        return done
    parts = []
    for entries in _live_entries(store, groups, segments, buffer_bytes):
        doc_hash = doc_hashes(entries.rows.column("doc_id").to_pylist())
        chunk_no = entries.rows.column("chunk_no").to_numpy().astype(np.uint64)
        row_hash = splitmix64(doc_hash ^ splitmix64(chunk_no))
        chosen = np.flatnonzero(below(row_hash, share))
        parts.append(SampledRows(row_hash[chosen], entries.vectors[chosen]))
    found = join_samples(parts)
    attempt = new_attempt()
    objects = {
        "order": put_checked(store, f"{key_prefix}-{attempt}.u64", found.order.astype("<u8").tobytes()),
        "vectors": put_checked(store, f"{key_prefix}-{attempt}.f16", found.vectors.astype("<f2").tobytes()),
    }
    name = key_prefix.rsplit("/", 1)[1]
    return commit(store, f"{key_prefix}.json", CommitRecord(f"sample {name}", inputs, attempt, objects))


def shard_live(
    store_url: str,
    key_prefix: str,
    groups: Sequence[ListsOfPart],
    segments: Sequence[Segment],
    trained: CommitRecord,
    threads: Threads,
    buffer_bytes: int,
    inputs: str,
) -> CommitRecord:
    """Assign and encode the stored vectors of these lists' live rows with another quantizer; commit the shard unless it was.

    Holds the whole shard in memory: its size is bounded by `index.shard_rows`.
    """
    store = open_store(store_url)
    done = read_record(store, f"{key_prefix}.json")
    if done is not None:
        return done  # the merge checks its inputs and refuses a foreign one by name
    threads.apply()
    assignment = ListAssignment.from_json(trained.facts["assignment"])
    quantizer = read_quantizer(store, trained.objects["quantizer"], assignment)
    slices, checksum = [], 0
    for entries in _live_entries(store, groups, segments, buffer_bytes):
        checksum += entry_checksum(entries.row_ids, entries.vectors)
        list_no, codes = quantizer.encode(entries.vectors)
        column = schemas.ROW_STORE.field("list_no")
        rows = entries.rows.set_column(1, column, pa.array(list_no, column.type))
        slices.append(RunSlice(list_no, entries.row_ids, codes, entries.vectors, rows))
    facts = {"entry_checksum": checksum % 2**64}
    return commit_shard(store, key_prefix, concat_sorted(slices), quantizer, inputs, facts)


def part_checksum(store_url: str, ref: PartRef, with_codes: bool) -> int:
    """`entry_checksum` of a written part: of vectors, and with their list numbers and codes before them."""
    store = open_store(store_url)
    record = read_part_record(store, ref)
    reader = RunReader(store, record.unit, record.objects, record.facts)
    starts, total = reader.starts_L, 0
    bounds = np.searchsorted(starts, np.arange(0, starts[-1], CHECKED_ENTRIES), side="right") - 1
    for a, b in pairwise([*np.unique(bounds).tolist(), len(starts) - 1]):
        list_no, row_ids, codes = reader.read_codes(reader.first_list + a, reader.first_list + b)
        vectors = reader.read_vectors(int(starts[a]), int(starts[b]))
        total += entry_checksum(row_ids, *((list_no, codes) if with_codes else ()), vectors)
    return total % 2**64


def rewrite_ledger(store_url: str, key: str, folder: str, parent: Manifest, inputs: str) -> CommitRecord:
    """Commit the parent's ledger with the new row ids: its documents in corpus order, nothing amended, no others.

    The record has the objects `listing` and `documents-00000` ..., and their lengths as the fact `num_rows`. A document has
    rows in it when it is to be indexed. Raises IntegrityError unless those are all live rows.
    """
    store = open_store(store_url)
    done = finished_unit(store, f"{key}.json", inputs)
    if done is not None:
        return done
    entries = read_sources(store, parent)
    ledger = read_ledger(store, parent, entries)
    _renumber_ledger(ledger, parent, renumbering_of(store, bare(parent.segments)))
    position_N = positions_of(entries)
    attempt = new_attempt()
    objects: dict[str, ObjectEntry] = {}
    num_rows = []
    for number, begin in enumerate(range(0, max(1, len(ledger)), TABLE_DOCUMENTS)):
        places = (begin, min(begin + TABLE_DOCUMENTS, len(ledger)))
        table_key = f"{folder}/documents-{attempt}-{number:05d}.parquet"
        table = write_documents(store, table_key, _document_tables(store, parent, ledger, position_N, *places))
        objects[f"documents-{number:05d}"] = ObjectEntry.from_json(table["object"])
        num_rows.append(table["num_rows"])
    firsts = np.cumsum([entry.num_docs for entry in entries])
    placed = [
        dataclasses.replace(entry, first=int(end - entry.num_docs) if entry.num_docs else 0)
        for entry, end in zip(entries, firsts, strict=True)
    ]
    objects["listing"] = write_sources(store, f"{folder}/sources-{attempt}.parquet", placed)
    crash_point("ledger.before_record")
    record = CommitRecord("ledger rewritten", inputs, attempt, objects, {"num_rows": num_rows})
    return commit(store, f"{key}.json", record)


def _renumber_ledger(ledger: Ledger, parent: Manifest, renumbering: Renumbering) -> None:
    """Give the documents that are to be indexed the new ids of their rows; the others lose theirs."""
    wins_N, _ = winners_of(ledger, drop_equal_texts=drops_equal_texts(parent))
    winners = np.flatnonzero(wins_N)
    live, row_id = renumbering.find(ledger.row_id_N[winners])
    num_chunks = ledger.num_chunks_N[winners]
    without = int((~live).sum())
    orphans = 0 if without else int((~rows_of_documents(row_id, num_chunks, renumbering.num_live)).sum())
    if without or orphans:
        raise IntegrityError(
            f"the ledger of version {parent.version} and its deletion bitmaps disagree: {without} documents that are to be"
            f" indexed have deleted rows, {orphans} live rows belong to no document; nothing was published: roll back, or"
            " build the index again"
        )
    ledger.row_id_N[:], ledger.num_chunks_N[:] = -1, 0
    ledger.row_id_N[winners], ledger.num_chunks_N[winners] = row_id, num_chunks


def _document_tables(
    store: Store, parent: Manifest, ledger: Ledger, position_N: np.ndarray, begin: int, end: int
) -> Iterator[pa.Table]:
    """schemas.DOCUMENTS of the documents [begin, end) of the corpus."""
    kept = ["doc_id", "row", "doc_hash", "text_hash"]
    for a in range(begin, end, DOCUMENTS_AT_ONCE):
        b = min(a + DOCUMENTS_AT_ONCE, end)
        found = read_documents(store, parent, position_N[a:b], kept)
        columns = [*found.columns, *(pa.array(c[a:b]) for c in (ledger.row_id_N, ledger.num_chunks_N, ledger.state_N))]
        yield pa.table(columns, schema=schemas.DOCUMENTS)
