"""Duplicate ids and texts across the corpus, and the row ids of what is left: prefix sums over committed pieces in source order.

A document's *place* is one number, int64: that of its piece times 2^32, plus its ordinal in the piece. Places ascend in
source order. Shapes: N documents of a pass, F documents found to be duplicates, W words of a hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from operators import schemas
from operators.piece_store import kept_mask, read_tables
from operators.storage.commits import CommitRecord
from operators.storage.store import Store

HASHES_PER_PASS = 50_000_000  # of 8 bytes, each with its place: about 2 GB while a pass sorts
LINES_AT_ONCE = 500_000

_BY_ID, _BY_TEXT = ("rejected", "duplicate_id"), ("dropped", "duplicate_text")  # outcome and reason

Ints = npt.NDArray[np.int64]


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


def assign_row_ids(
    store: Store,
    pieces: Sequence[CommitRecord],
    hashes_per_pass: int = HASHES_PER_PASS,
    *,
    drop_equal_texts: bool = False,
) -> RowIds:
    """Find documents whose id came earlier in source order, and number the chunks of the others.

    The first document with an id wins. With `drop_equal_texts`, of the documents that are left the first one with a
    text wins too (equal 128-bit hashes count as equal texts), so what stands for a text is never itself left out.
    Memory is bounded by `hashes_per_pass` hashes, and some 60 bytes for each duplicate: a larger corpus is worked
    through in several passes, each over the hashes of one remainder. Deterministic.
    """
    total_docs = sum(record.facts["num_docs"] for record in pieces)
    passes = -(-total_docs // hashes_per_pass)
    found = [_equal_ids(store, pieces, passes, remainder) for remainder in range(passes)]
    place_F, first_F = _joined(found)
    num_by_id = len(place_F)
    if drop_equal_texts:
        left_out = _docs_by_piece(place_F)
        passes = -(-2 * total_docs // hashes_per_pass)  # a text's hash has two words
        found += [_equal_texts(store, pieces, passes, remainder, left_out) for remainder in range(passes)]
        place_F, first_F = _joined(found)
    order = np.argsort(place_F)
    duplicates = Duplicates(place_F[order], first_F[order], order >= num_by_id)
    dropped = _docs_by_piece(duplicates.place_F)
    counts = [record.facts["num_chunks"] for record in pieces]
    tables = read_tables(store, (pieces[piece].objects["encoded"] for piece in dropped), ["chunk_no"])
    for (piece, docs), table in zip(dropped.items(), tables, strict=True):
        counts[piece] = int(kept_mask(table.column("chunk_no").to_numpy(), docs).sum())
    bases = np.concatenate([[0], np.cumsum(counts)]).tolist()
    return RowIds(bases[:-1], counts, total_docs - len(order), dropped, duplicates)


def duplicate_lines(store: Store, pieces: Sequence[CommitRecord], duplicates: Duplicates) -> Iterator[pa.Table]:
    """The duplicates, each with what stands for it, as tables of schemas.REJECTS of at most LINES_AT_ONCE rows.

    In source order. A table is made from one reading of the ids of the pieces that it concerns.
    """
    for begin in range(0, len(duplicates.place_F), LINES_AT_ONCE):
        some = slice(begin, begin + LINES_AT_ONCE)
        by_text = pa.array(duplicates.by_text_F[some])
        lost = _documents(store, pieces, duplicates.place_F[some], ["source", "row", "doc_id"])
        first = _documents(store, pieces, duplicates.first_F[some], ["source", "row", "doc_id"])
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


def _equal_ids(store: Store, pieces: Sequence[CommitRecord], passes: int, remainder: int) -> tuple[Ints, Ints]:
    """Places of the documents whose id came earlier, and where, among those with this remainder of the hash."""
    hash_NW, place_N = _hashes(store, pieces, "doc_hash", passes, remainder, {})
    # Two ids may share a 64-bit hash, so the ids themselves are compared.
    candidates = place_N[np.unique(np.concatenate(repeats(hash_NW)))]
    doc_ids = _documents(store, pieces, candidates, ["doc_id"]).column("doc_id").combine_chunks()
    numbers = pc.dictionary_encode(doc_ids).indices.to_numpy()
    again, first = repeats(numbers[:, None])
    return candidates[again], candidates[first]


def _equal_texts(
    store: Store, pieces: Sequence[CommitRecord], passes: int, remainder: int, left_out: Mapping[int, list[int]]
) -> tuple[Ints, Ints]:
    """Like `_equal_ids` for the hashes of texts, without the documents `left_out` of each piece."""
    hash_NW, place_N = _hashes(store, pieces, "text_hash", passes, remainder, left_out)
    again, first = repeats(hash_NW)
    return place_N[again], place_N[first]


def _hashes(
    store: Store,
    pieces: Sequence[CommitRecord],
    column: str,
    passes: int,
    remainder: int,
    left_out: Mapping[int, list[int]],
) -> tuple[npt.NDArray[np.uint64], Ints]:
    """Hashes [N, W] of the documents whose first word leaves this remainder, and their places, in source order."""
    width = 2 if column == "text_hash" else 1
    hashes, places = [np.empty((0, width), np.uint64)], [np.empty(0, np.int64)]
    tables = read_tables(store, (record.objects["encoded"] for record in pieces), [column, "chunk_no"])
    for number, table in enumerate(tables):
        chosen = table.column("chunk_no").to_numpy() == 0
        words_NW = hash_words(table.column(column), width)[chosen]
        inside = words_NW[:, 0] % np.uint64(passes) == remainder
        inside[left_out.get(number, [])] = False
        hashes.append(words_NW[inside])
        places.append(np.flatnonzero(inside) + (number << 32))
    return np.concatenate(hashes), np.concatenate(places)


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


def _documents(store: Store, pieces: Sequence[CommitRecord], place_F: Ints, columns: list[str]) -> pa.Table:
    """Columns of the documents at the places, row for row; texts as large_string."""
    wanted, row_of = np.unique(place_F, return_inverse=True)
    tables = []
    docs_of = _docs_by_piece(wanted)
    read = read_tables(store, (pieces[number].objects["encoded"] for number in docs_of), [*columns, "chunk_no"])
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


def _joined(found: list[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    empty = np.empty(0, np.int64)
    return np.concatenate([empty, *(places for places, _ in found)]), np.concatenate([empty, *(f for _, f in found)])


def _text(value: str) -> pa.Scalar:
    return pa.scalar(value, pa.large_string())
