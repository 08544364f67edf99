"""Whether a version's ledger is right: its winners, computed again, have exactly the rows that are live, and those rows are theirs.

N documents in corpus order, F documents with rows, n rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from operators.artifact.deletions import live_rows
from operators.artifact.list_run import splitmix64
from operators.artifact.manifest import Manifest
from operators.documents import (
    DELETED,
    NO_TOKENS,
    TAKES_PART,
    Hashes,
    Ints,
    Ledger,
    SourceEntry,
    document_hash,
    read_ledger,
    read_sources,
    rows_of_documents,
    winners_of,
)
from operators.errors import IntegrityError, VectormillError
from operators.piece_store import read_table
from operators.row_ids import hash_words
from operators.storage.checked import ObjectEntry
from operators.storage.store import Store

DOCUMENTS_AT_ONCE = 1 << 18
DUPLICATE_REASONS = ("duplicate_id", "duplicate_text")


def check_ledger(store: Store, manifest: Manifest, checksums: Mapping[str, int]) -> list[str]:
    """What is wrong with the ledger, in itself and against the deletion bitmaps and the counts of the manifest.

    checksums: of segments whose parts were read, by name, that of their live rows (`document_checksum`): these rows must
    be those of the documents that the ledger names. All objects of the ledger are read, once; nothing else is.
    """
    try:
        entries = read_sources(store, manifest)
        problems = _check_sources(manifest, entries) + _check_amended(store, manifest)
        if problems:
            return problems
        ledger = read_ledger(store, manifest, entries)
        return _check_documents(store, manifest, ledger, checksums)
    except VectormillError as error:
        return [str(error)]


def _check_sources(manifest: Manifest, entries: list[SourceEntry]) -> list[str]:
    problems = []
    if len(entries) != manifest.sources["num_objects"]:
        problems.append(
            f"the listing has {len(entries)} source objects, the manifest says {manifest.sources['num_objects']}"
        )
    read = sum(entry.num_rows_read for entry in entries)
    if read != manifest.rows["read"]:
        problems.append(f"the listing says {read} rows were read, the manifest {manifest.rows['read']}")
    uris: set[str] = set()
    for entry in entries:
        if entry.obj.uri in uris:
            problems.append(f"the listing names {entry.obj.uri} twice")
        uris.add(entry.obj.uri)
    held = sorted((entry for entry in entries if entry.num_docs), key=lambda entry: entry.first)
    for before, after in pairwise(held):
        if before.first + before.num_docs > after.first:
            problems.append(
                f"the documents of {before.obj.uri} and {after.obj.uri} overlap at position {after.first} of the tables"
            )
    return problems


def _check_amended(store: Store, manifest: Manifest) -> list[str]:
    if manifest.amended is None:
        return []
    position = read_table(store, ObjectEntry.from_json(manifest.amended), ["position"]).column("position").to_numpy()
    held = sum(table["num_rows"] for table in manifest.documents)
    if len(position) and (position.min() < 0 or position.max() >= held):
        return [f"amended positions are {position.min()}..{position.max()}, the documents tables hold {held} documents"]
    if len(np.unique(position)) != len(position):
        return ["a document is amended twice"]
    return []


def _check_documents(store: Store, manifest: Manifest, ledger: Ledger, checksums: Mapping[str, int]) -> list[str]:
    if not np.isin(ledger.state_N, (TAKES_PART, DELETED, NO_TOKENS)).all():
        return [f"the ledger has documents in states {np.unique(ledger.state_N).tolist()}, known are 0, 1 and 2"]
    problems = []
    wins_N, duplicates = winners_of(ledger, drop_equal_texts=drops_equal_texts(manifest))
    if int(wins_N.sum()) != manifest.num_docs:
        problems.append(
            f"the ledger has {int(wins_N.sum())} documents that are to be indexed, the manifest says num_docs {manifest.num_docs}"
        )
    for outcome in ("rejected", "dropped"):
        stated = {reason: count for reason, count in manifest.rows[outcome].items() if reason in DUPLICATE_REASONS}
        if stated != duplicates.counts(outcome):
            problems.append(
                f"the ledger has duplicates that are {outcome}: {duplicates.counts(outcome)}, the manifest says {stated}"
            )
    without = np.flatnonzero(wins_N & ((ledger.row_id_N < 0) | (ledger.num_chunks_N < 1)))
    if len(without):
        return [
            *problems,
            f"{len(without)} documents that are to be indexed have no rows, the first is number {without[0]} of the corpus",
        ]
    of_winners = rows_of_documents(ledger.row_id_N[wins_N], ledger.num_chunks_N[wins_N], manifest.next_row_id)
    differing = np.flatnonzero(of_winners != live_rows(store, manifest))
    if len(differing):
        row = int(differing[0])
        said = "deleted but belongs to a document" if of_winners[row] else "not deleted but belongs to no document"
        return [
            *problems,
            f"the bitmaps and the ledger disagree about {len(differing)} rows: row {row} is {said} that is to be indexed",
        ]
    expected = _checksums(manifest, ledger, np.flatnonzero(wins_N))
    for name, found in checksums.items():
        if expected[name] != found:
            problems.append(
                f"live rows of segment {name} are not those of the documents that the ledger names for them"
            )
    return problems


def drops_equal_texts(manifest: Manifest) -> bool:
    """Whether documents with the text of an earlier one were left out (clean.duplicates)."""
    return bool(manifest.config.get("clean", {}).get("duplicates") == "drop")


def _checksums(manifest: Manifest, ledger: Ledger, winners_F: Ints) -> dict[str, int]:
    """`document_checksum` of the rows that the documents have in each segment, by its name."""
    totals = dict.fromkeys((segment.name for segment in manifest.segments), 0)
    firsts = np.array([segment.first_row_id for segment in manifest.segments])
    for start in range(0, len(winners_F), DOCUMENTS_AT_ONCE):
        some = ledger.take(winners_F[start : start + DOCUMENTS_AT_ONCE])
        segment_no = np.searchsorted(firsts, some.row_id_N, side="right") - 1
        for number in np.unique(segment_no).tolist():
            inside = some.take(np.flatnonzero(segment_no == number))
            document_n = np.repeat(np.arange(len(inside)), inside.num_chunks_N)
            chunk_no = np.arange(len(document_n)) - (np.cumsum(inside.num_chunks_N) - inside.num_chunks_N)[document_n]
            found = document_checksum(
                inside.row_id_N[document_n] + chunk_no,
                chunk_no,
                inside.doc_hash_N2[document_n],
                inside.text_hash_N2[document_n],
            )
            name = manifest.segments[number].name
            totals[name] = (totals[name] + found) % 2**64
    return totals


def document_checksum(row_id_n: Ints, chunk_no_n: npt.NDArray[Any], doc_hash_n2: Hashes, text_hash_n2: Hashes) -> int:
    """Order-free checksum of which chunk of which document each row is; adds over disjoint sets of rows modulo 2^64."""
    mixed = splitmix64(row_id_n.astype(np.uint64))
    for words in (chunk_no_n.astype(np.uint64), *doc_hash_n2.T, *text_hash_n2.T):
        mixed = splitmix64(mixed ^ words)
    return int(mixed.sum(dtype=np.uint64))


def rows_checksum(rows: pa.Table) -> int:
    """`document_checksum` of rows of a row store."""
    encoded = rows.column("doc_id").combine_chunks().dictionary_encode()
    digests = b"".join(document_hash(name) for name in encoded.dictionary.to_pylist())
    doc_hash = np.frombuffer(digests, "<u8").reshape(-1, 2)[encoded.indices.to_numpy()]
    text_hash = hash_words(rows.column("text_hash"), 2)
    return document_checksum(rows.column("row_id").to_numpy(), rows.column("chunk_no").to_numpy(), doc_hash, text_hash)


def check_rejects(store: Store, manifest: Manifest) -> list[str]:
    """Whether the rejects object lists as many rows by outcome and reason as the manifest says."""
    listed: dict[str, dict[str, int]] = {"rejected": {}, "dropped": {}}
    if manifest.rejects is not None:
        table = read_table(store, ObjectEntry.from_json(manifest.rejects), ["outcome", "reason"])
        counts = table.group_by(["outcome", "reason"]).aggregate([([], "count_all")])
        for line in counts.to_pylist():
            if line["outcome"] not in listed:
                raise IntegrityError(f"the rejects object has an outcome {line['outcome']!r}")
            listed[line["outcome"]][line["reason"]] = line["count_all"]
    said = {outcome: manifest.rows[outcome] for outcome in listed}
    return [] if listed == said else [f"the manifest says that rows were left out as {said}, the rejects list {listed}"]
