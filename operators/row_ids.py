"""Duplicate ids across the corpus, and the row ids of what is left: prefix sums over committed pieces in source order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from operators import schemas
from operators.piece_store import kept_mask, read_table
from operators.storage.commits import CommitRecord
from operators.storage.store import Store

HASHES_PER_PASS = 50_000_000  # 16 bytes each with their position: about 1 GB while a pass sorts


@dataclass
class RowIds:
    """For piece i in source order: its chunks get row ids bases[i] ..., without the documents dropped[i]."""

    bases: list[int]
    counts: list[int]
    num_docs: int
    dropped: dict[int, list[int]]  # piece number -> document ordinals
    duplicates: pa.Table  # schemas.REJECTS


def assign_row_ids(store: Store, pieces: Sequence[CommitRecord], hashes_per_pass: int = HASHES_PER_PASS) -> RowIds:
    """Find documents whose id came earlier in source order, and number the chunks of the others.

    The first document with an id wins. Memory is bounded by `hashes_per_pass` document hashes: a larger corpus is
    worked through in several passes, each over the hashes of one remainder. Deterministic.
    """
    total_docs = sum(record.facts["num_docs"] for record in pieces)
    passes = max(1, -(-total_docs // hashes_per_pass))
    found: list[tuple[int, int, int, int]] = []  # piece, doc ordinal, first piece, first doc ordinal
    for remainder in range(passes):
        found += _duplicates_among(store, pieces, passes, remainder)
    found.sort()
    dropped: dict[int, list[int]] = {}
    for piece, doc, _, _ in found:
        dropped.setdefault(piece, []).append(doc)
    counts = [record.facts["num_chunks"] for record in pieces]
    for piece, docs in dropped.items():
        chunk_no = read_table(store, pieces[piece].objects["encoded"], ["chunk_no"]).column("chunk_no").to_numpy()
        counts[piece] = int(kept_mask(chunk_no, docs).sum())
    bases = np.concatenate([[0], np.cumsum(counts)]).tolist()
    duplicates = _rejects(store, pieces, found)
    return RowIds(bases[:-1], counts, total_docs - len(found), dropped, duplicates)


def _duplicates_among(
    store: Store, pieces: Sequence[CommitRecord], passes: int, remainder: int
) -> list[tuple[int, int, int, int]]:
    hashes, piece_no, doc_no = [], [], []
    for number, record in enumerate(pieces):
        table = read_table(store, record.objects["encoded"], ["doc_hash", "chunk_no"])
        firsts = table.column("doc_hash").to_numpy()[table.column("chunk_no").to_numpy() == 0]
        inside = np.flatnonzero(firsts % np.uint64(passes) == remainder)
        hashes.append(firsts[inside])
        piece_no.append(np.full(len(inside), number, np.int32))
        doc_no.append(inside.astype(np.int32))
    if not hashes:
        return []
    hash_N, piece_N, doc_N = np.concatenate(hashes), np.concatenate(piece_no), np.concatenate(doc_no)
    order = np.argsort(hash_N, kind="stable")  # stable: equal hashes stay in source order
    sorted_hash = hash_N[order]
    equal_to_previous = np.flatnonzero(sorted_hash[1:] == sorted_hash[:-1]) + 1
    if not len(equal_to_previous):
        return []
    # Groups of equal hashes; ids are compared, since two ids may share a 64-bit hash.
    groups: dict[int, list[int]] = {}
    for position in equal_to_previous.tolist():
        members = groups.setdefault(int(sorted_hash[position]), [int(order[position - 1])])
        members.append(int(order[position]))
    ids = _doc_ids(store, pieces, {(int(piece_N[i]), int(doc_N[i])) for members in groups.values() for i in members})
    found = []
    for members in groups.values():
        first_of: dict[str, tuple[int, int]] = {}
        for i in members:
            place = (int(piece_N[i]), int(doc_N[i]))
            doc_id = ids[place][0]
            if doc_id in first_of:
                found.append((*place, *first_of[doc_id]))
            else:
                first_of[doc_id] = place
    return found


def _doc_ids(
    store: Store, pieces: Sequence[CommitRecord], places: set[tuple[int, int]]
) -> dict[tuple[int, int], tuple[str, str, int]]:
    """(doc_id, source, row) of documents given by (piece, doc ordinal)."""
    by_piece: dict[int, list[int]] = {}
    for piece, doc in sorted(places):
        by_piece.setdefault(piece, []).append(doc)
    found = {}
    for piece, docs in by_piece.items():
        table = read_table(store, pieces[piece].objects["encoded"], ["doc_id", "source", "row", "chunk_no"])
        firsts = np.flatnonzero(table.column("chunk_no").to_numpy() == 0)
        for doc, line in zip(docs, table.take(pa.array(firsts[docs])).to_pylist(), strict=True):
            found[piece, doc] = (line["doc_id"], line["source"], line["row"])
    return found


def _rejects(store: Store, pieces: Sequence[CommitRecord], found: list[tuple[int, int, int, int]]) -> pa.Table:
    places = _doc_ids(store, pieces, {f[:2] for f in found} | {f[2:] for f in found})
    lines = []
    for piece, doc, first_piece, first_doc in found:
        doc_id, source, row = places[piece, doc]
        _, first_source, first_row = places[first_piece, first_doc]
        lines.append(
            {
                "source": source,
                "row": row,
                "doc_id": doc_id,
                "outcome": "rejected",
                "reason": "duplicate_id",
                "detail": f"first seen in {first_source} row {first_row}",
            }
        )
    return pa.Table.from_pylist(lines, schema=schemas.REJECTS)
