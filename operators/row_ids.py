"""Duplicate ids and texts across the corpus, and the row ids of what is left: prefix sums over committed pieces in source order.

A document's *place* is one number, int64: that of its piece times 2^32, plus its ordinal in the piece. Places ascend in
source order. What is repeated is found among the hashes of all documents at once (`assign_row_ids`), or by remainder of the
hash in several *passes* that know nothing of each other (operators/hash_runs.py): equal hashes are in one pass, so the answer
is the same. Shapes: N documents of a pass, F documents found to be duplicates, W words of a hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from operators import schemas
from operators.piece_store import read_tables
from operators.storage.checked import ObjectEntry
from operators.storage.commits import CommitRecord
from operators.storage.packed_entries import PackedEntries
from operators.storage.store import Store

WORDS = {"doc_hash": 1, "text_hash": 2}  # of 8 bytes
LINES_AT_ONCE = 500_000

_BY_ID, _BY_TEXT = ("rejected", "duplicate_id"), ("dropped", "duplicate_text")  # outcome and reason

Ints = npt.NDArray[np.int64]
Entries = Sequence[ObjectEntry] | PackedEntries  # of the pieces' tables, in source order


@dataclass
class Duplicates:
    """Documents that are left out, in source order: their places, those of what stands for them, and why."""

    place_F: Ints
    first_F: Ints
    by_text_F: npt.NDArray[np.bool_]  # False: its id came earlier; True: its text did

    def counts(self, outcome: str) -> dict[str, int]:
        """Number of those with the outcome by reason; none that did not occur."""
        by_text = int(self.by_text_F.sum())
        numbers = ((_BY_ID, len(self.by_text_F) - by_text), (_BY_TEXT, by_text))
        return {reason: number for (given, reason), number in numbers if given == outcome and number}


@dataclass
class RowIds:
    """For piece i in source order: its chunks get row ids bases[i] ..., without the documents dropped[i]."""

    bases: list[int]
    counts: list[int]
    num_docs: int
    dropped: dict[int, list[int]]  # piece number -> document ordinals
    duplicates: Duplicates


@dataclass
class DocumentHashes:
    """Hashes of documents in source order: words uint64 [N, W], their places, and their numbers of chunks."""

    words_NW: npt.NDArray[np.uint64]
    place_N: Ints
    num_chunks_N: npt.NDArray[np.int32]


@dataclass
class Repeated:
    """Documents of one pass that are left out: their places, those of what stands for them, and their numbers of chunks."""

    place_F: Ints
    first_F: Ints
    num_chunks_F: npt.NDArray[np.int32]


def assign_row_ids(store: Store, pieces: Sequence[CommitRecord], *, drop_equal_texts: bool = False) -> RowIds:
    """Find documents whose id came earlier in source order, and number the chunks of the others.

    The first document with an id wins. With `drop_equal_texts`, of the documents that are left the first one with a
    text wins too (equal 128-bit hashes count as equal texts), so what stands for a text is never itself left out.
    In one pass: some 50 bytes of memory for each hash, 60 more for each duplicate. Deterministic.
    """
    encoded = [record.objects["encoded"] for record in pieces]
    hashes = read_hashes(store, encoded, ["doc_hash", "text_hash"] if drop_equal_texts else ["doc_hash"])
    by_id = repeated_ids(store, encoded, hashes[0])
    by_text = [repeated_texts(hashes[1], np.sort(by_id.place_F))] if drop_equal_texts else []
    return numbered(pieces, [by_id], by_text)


def numbered(pieces: Sequence[CommitRecord], by_id: Sequence[Repeated], by_text: Sequence[Repeated]) -> RowIds:
    """Row ids without the documents that all passes found."""
    found = [*by_id, *by_text]
    empty = np.empty(0, np.int64)
    place_F = np.concatenate([empty, *(one.place_F for one in found)])
    first_F = np.concatenate([empty, *(one.first_F for one in found)])
    lost = np.zeros(len(pieces), np.int64)
    for one in found:
        np.add.at(lost, one.place_F >> 32, one.num_chunks_F)
    order = np.argsort(place_F)
    duplicates = Duplicates(place_F[order], first_F[order], order >= sum(len(one.place_F) for one in by_id))
    counts = [record.facts["num_chunks"] - less for record, less in zip(pieces, lost.tolist(), strict=True)]
    bases = np.concatenate([[0], np.cumsum(counts)]).tolist()
    num_docs = sum(record.facts["num_docs"] for record in pieces) - len(order)
    return RowIds(bases[:-1], counts, num_docs, _docs_by_piece(duplicates.place_F), duplicates)


def duplicate_lines(store: Store, pieces: Sequence[CommitRecord], duplicates: Duplicates) -> Iterator[pa.Table]:
    """The duplicates, each with what stands for it, as tables of schemas.REJECTS of at most LINES_AT_ONCE rows.

    In source order. A table is made from one reading of the ids of the pieces that it concerns.
    """
    encoded = [record.objects["encoded"] for record in pieces]
    for begin in range(0, len(duplicates.place_F), LINES_AT_ONCE):
        some = slice(begin, begin + LINES_AT_ONCE)
        by_text = pa.array(duplicates.by_text_F[some])
        lost = _documents(store, encoded, duplicates.place_F[some], ["source", "row", "doc_id"])
        first = _documents(store, encoded, duplicates.first_F[some], ["source", "row", "doc_id"])
        row = pc.cast(first.column("row"), pa.large_string())
        place = pc.binary_join_element_wise(first.column("source"), row, _text(" row "))
        first_seen = pc.binary_join_element_wise(_text("first seen in"), place, _text(" "))
        same_text = pc.binary_join_element_wise(
            _text("same text as"), first.column("doc_id"), _text("in"), place, _text(" ")
        )
        columns = {
            "source": lost.column("source"),
            "row": lost.column("row"),
            "doc_id": lost.column("doc_id"),
            "outcome": pc.if_else(by_text, _BY_TEXT[0], _BY_ID[0]),
            "reason": pc.if_else(by_text, _BY_TEXT[1], _BY_ID[1]),
            "detail": pc.if_else(by_text, same_text, first_seen),
        }
        yield pa.table([columns[field.name].cast(field.type) for field in schemas.REJECTS], schema=schemas.REJECTS)


def read_hashes(
    store: Store, encoded: Sequence[ObjectEntry], columns: Sequence[str], first_piece: int = 0
) -> list[DocumentHashes]:
    """Of each column (WORDS) the hashes of all documents of pieces first_piece, first_piece + 1 ..."""
    words: list[list[npt.NDArray[np.uint64]]] = [[np.empty((0, WORDS[name]), np.uint64)] for name in columns]
    places, num_chunks = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for number, table in enumerate(read_tables(store, encoded, [*columns, "chunk_no"]), first_piece):
        starts = np.flatnonzero(table.column("chunk_no").to_numpy() == 0)
        for found, name in zip(words, columns, strict=True):
            found.append(hash_words(table.column(name), WORDS[name])[starts])
        places.append(np.arange(len(starts)) + (number << 32))
        num_chunks.append(_chunks_from(starts, table.num_rows))
    place_N, num_chunks_N = np.concatenate(places), np.concatenate(num_chunks)
    return [DocumentHashes(np.concatenate(found), place_N, num_chunks_N) for found in words]


def repeated_ids(store: Store, encoded: Entries, hashes: DocumentHashes) -> Repeated:
    """The documents among these whose id came earlier among these."""
    # Two ids may share a 64-bit hash, so the ids themselves are compared.
    candidates = np.unique(np.concatenate(repeats(hashes.words_NW)))
    place_C = hashes.place_N[candidates]
    doc_ids = _documents(store, encoded, place_C, ["doc_id"]).column("doc_id").combine_chunks()
    numbers = pc.dictionary_encode(doc_ids).indices.to_numpy()
    again, first = repeats(numbers[:, None])
    return Repeated(place_C[again], place_C[first], hashes.num_chunks_N[candidates[again]])


def repeated_texts(hashes: DocumentHashes, left_out_F: Ints) -> Repeated:
    """The documents among these whose text came earlier among these, without those at the places left out, ascending."""
    at = np.searchsorted(left_out_F, hashes.place_N)
    kept = np.ones(len(at), bool)
    within = at < len(left_out_F)
    kept[within] = left_out_F[at[within]] != hashes.place_N[within]
    place_N, num_chunks_N = hashes.place_N[kept], hashes.num_chunks_N[kept]
    again, first = repeats(hashes.words_NW[kept])
    return Repeated(place_N[again], place_N[first], num_chunks_N[again])


def _chunks_from(starts: npt.NDArray[np.intp], num_rows: int) -> npt.NDArray[np.int32]:
    """Numbers of chunks of the documents that begin at these rows."""
    return np.diff(np.append(starts, num_rows)).astype(np.int32)


def hash_words(column: pa.ChunkedArray, width: int) -> npt.NDArray[np.uint64]:
    """Fixed-width values of `width` words as uint64 [rows, width]."""
    parts = [np.empty((0, width), np.uint64)]
    for chunk in column.chunks:
        if len(chunk):
            words = np.frombuffer(chunk.buffers()[1], "<u8").reshape(-1, width)
            parts.append(words[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(parts)


def repeats(key_NW: npt.NDArray[np.integer]) -> tuple[Ints, Ints]:
    """Indices of the rows that occurred before, and for each the index of its first occurrence."""
    order = np.lexsort(key_NW.T)  # stable: equal rows stay in order
    ordered = key_NW[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    again, begins = np.flatnonzero(~is_first), np.flatnonzero(is_first)
    return order[again], order[begins[np.searchsorted(begins, again, side="right") - 1]]


def _documents(store: Store, encoded: Entries, place_F: Ints, columns: list[str]) -> pa.Table:
    """Columns of the documents at the places, row for row; texts as large_string."""
    wanted, row_of = np.unique(place_F, return_inverse=True)
    tables = []
    docs_of = _docs_by_piece(wanted)
    read = read_tables(store, (encoded[number] for number in docs_of), [*columns, "chunk_no"])
    for docs, table in zip(docs_of.values(), read, strict=True):
        firsts = np.flatnonzero(table.column("chunk_no").to_numpy() == 0)
        found = table.select(columns).take(pa.array(firsts[docs]))
        # Many ids together may pass the 2 GiB that a string column can hold.
        wide = [column.cast(pa.large_string()) if column.type == pa.string() else column for column in found.columns]
        tables.append(pa.table(wide, names=columns))
    if not tables:
        return pa.table(
            [pa.array([], pa.int64() if name == "row" else pa.large_string()) for name in columns], names=columns
        )
    return pa.concat_tables(tables).take(pa.array(row_of))


def _docs_by_piece(place_F: Ints) -> dict[int, list[int]]:
    """Ordinals of the documents by the number of their piece, both ascending."""
    ordered = np.sort(place_F)
    numbers, begins = np.unique(ordered >> 32, return_index=True)
    ends = [*begins[1:].tolist(), len(ordered)]
    docs = ordered & 0xFFFFFFFF
    return {
        number: docs[begin:end].tolist()
        for number, begin, end in zip(numbers.tolist(), begins.tolist(), ends[: len(begins)], strict=True)
    }


def _text(value: str) -> pa.Scalar:
    return pa.scalar(value, pa.large_string())
