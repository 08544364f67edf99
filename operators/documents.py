"""The ledger of a version: every document of every source object, whether it has rows, and which ones.

From it an update knows what a source object that has not changed holds, without reading it. The first document with an
id in corpus order wins (and, where equal texts are dropped, the first with a text among those); the live rows of a
version are exactly the rows of its winners.

Documents lie in immutable tables (schemas.DOCUMENTS) that versions share; concatenated they have global positions, of
which each source object has a range. N documents in corpus order, W words of a hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from operators import schemas
from operators.artifact.manifest import Manifest
from operators.errors import IntegrityError
from operators.piece_store import read_table, write_table
from operators.row_ids import Duplicates, hash_words, repeats
from operators.sources.listing import SourceObject
from operators.storage.checked import CheckedFile, ObjectEntry, write_checked
from operators.storage.store import Store

TAKES_PART, DELETED, NO_TOKENS = 0, 1, 2  # DELETED: by request; NO_TOKENS: nothing of its text is a token
ROW_GROUP_DOCUMENTS = 65_536
READERS = 16  # tables that are read at once
_LEDGER = pa.schema([field for field in schemas.DOCUMENTS if field.name not in ("doc_id", "row")])

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class SourceEntry:
    """A source object of a version and where its documents lie: the positions [first, first + num_docs) of the tables."""

    obj: SourceObject
    num_rows_read: int
    first: int
    num_docs: int


@dataclass
class Ledger:
    """Columns of all documents in corpus order, amendments applied. An object's documents are consecutive."""

    doc_hash_N2: Hashes
    text_hash_N2: Hashes
    row_id_N: Ints
    num_chunks_N: npt.NDArray[np.int32]
    state_N: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.row_id_N)

    def take(self, places: Ints) -> Ledger:
        """The documents at these places."""
        hashes = self.doc_hash_N2[places], self.text_hash_N2[places]
        return Ledger(*hashes, self.row_id_N[places], self.num_chunks_N[places], self.state_N[places])


def document_hash(doc_id: str) -> bytes:
    """BLAKE2b-128 of the id: equal hashes count as equal ids."""
    return hashlib.blake2b(doc_id.encode(), digest_size=16).digest()


def document_table(
    doc_id: pa.Array,
    row: pa.Array,
    text_hash: pa.Array,
    row_id_N: Ints,
    num_chunks_N: npt.NDArray[Any],
    state_N: npt.NDArray[Any],
) -> pa.Table:
    """schemas.DOCUMENTS; the hashes of the ids are computed here (about a microsecond each)."""
    hashes = pa.array([document_hash(name) for name in doc_id.to_pylist()], pa.binary(16))
    columns = [doc_id, row, hashes, text_hash, pa.array(row_id_N), pa.array(num_chunks_N), pa.array(state_N)]
    return pa.table(
        [column.cast(field.type) for column, field in zip(columns, schemas.DOCUMENTS, strict=True)],
        schema=schemas.DOCUMENTS,
    )


def write_documents(store: Store, key: str, tables: Iterable[pa.Table]) -> dict[str, Any]:
    """Store tables of schemas.DOCUMENTS as one object, streaming; what a manifest says of it ({"num_rows", "object"})."""
    num_rows = 0
    with (
        write_checked(store, key) as pending,
        pa.PythonFile(pending.file, mode="w") as sink,
        pq.ParquetWriter(
            sink, schemas.DOCUMENTS, compression="zstd", use_dictionary=False, write_statistics=False
        ) as writer,
    ):
        for table in tables:
            writer.write_table(table, row_group_size=ROW_GROUP_DOCUMENTS)
            num_rows += table.num_rows
    assert pending.entry is not None
    return {"num_rows": num_rows, "object": pending.entry.to_json()}


def write_sources(store: Store, key: str, entries: Sequence[SourceEntry]) -> ObjectEntry:
    """Store the listing of a version, in corpus order."""
    lines = [
        {**entry.obj.to_json(), "num_rows_read": entry.num_rows_read, "first": entry.first, "num_docs": entry.num_docs}
        for entry in entries
    ]
    return write_table(store, key, pa.Table.from_pylist(lines, schema=schemas.SOURCES))


def read_sources(store: Store, manifest: Manifest) -> list[SourceEntry]:
    """The listing of a version. Raises IntegrityError for a damaged one, and for ranges that lie beyond the tables."""
    table = read_table(store, ObjectEntry.from_json(manifest.sources["listing"]))
    held = sum(documents["num_rows"] for documents in manifest.documents)
    entries = []
    for line in table.to_pylist():
        counts = [line.pop(name) for name in ("num_rows_read", "first", "num_docs")]
        entry = SourceEntry(SourceObject(**line), *counts)
        if entry.first < 0 or entry.num_docs < 0 or entry.first + entry.num_docs > held:
            raise IntegrityError(
                f"the documents of {entry.obj.uri} lie at {entry.first}..{entry.first + entry.num_docs - 1}, the tables of"
                f" version {manifest.version} hold {held}"
            )
        entries.append(entry)
    return entries


def read_ledger(store: Store, manifest: Manifest, entries: Sequence[SourceEntry], *, amend: bool = True) -> Ledger:
    """Documents of the version's objects in their order, about 45 bytes each. Raises IntegrityError.

    amend: False gives what the tables themselves say.
    """
    entries_of = [ObjectEntry.from_json(held["object"]) for held in manifest.documents]
    with ThreadPoolExecutor(READERS) as pool:  # one small table for each update since the last compaction
        tables = list(pool.map(lambda entry: read_table(store, entry, _LEDGER.names), entries_of))
    for table, held in zip(tables, manifest.documents, strict=True):
        if table.num_rows != held["num_rows"]:
            raise IntegrityError(
                f"documents table {store.url}/{held['object']['key']} must hold {held['num_rows']} rows, found {table.num_rows}"
            )
    columns = ledger_columns(tables)
    if amend and manifest.amended is not None:
        amended = read_table(store, ObjectEntry.from_json(manifest.amended))
        position = amended.column("position").to_numpy()
        columns.row_id_N[position] = amended.column("row_id").to_numpy()
        columns.num_chunks_N[position] = amended.column("num_chunks").to_numpy()
        columns.state_N[position] = amended.column("state").to_numpy()
    return columns.take(positions_of(entries))


def ledger_columns(tables: Sequence[pa.Table]) -> Ledger:
    """Columns of tables of schemas.DOCUMENTS, one after the other (writable copies)."""
    together = pa.concat_tables([_LEDGER.empty_table(), *(table.select(_LEDGER.names) for table in tables)])
    return Ledger(
        hash_words(together.column("doc_hash"), 2),
        hash_words(together.column("text_hash"), 2),
        together.column("row_id").to_numpy().copy(),
        together.column("num_chunks").to_numpy().copy(),
        together.column("state").to_numpy().copy(),
    )


def positions_of(entries: Sequence[SourceEntry]) -> Ints:
    """Global positions of the objects' documents, in the objects' order, int64 [N]."""
    return np.concatenate(
        [np.empty(0, np.int64), *(np.arange(e.first, e.first + e.num_docs, dtype=np.int64) for e in entries)]
    )


def read_documents(store: Store, manifest: Manifest, position_F: Ints, columns: Sequence[str]) -> pa.Table:
    """Columns of the documents at these global positions, row for row. Reads only the row groups that hold them."""
    wanted, row_of = np.unique(position_F, return_inverse=True)
    begin = 0
    schema = pa.schema([schemas.DOCUMENTS.field(name) for name in columns])
    found = [schema.empty_table()]
    for held in manifest.documents:
        inside = wanted[(wanted >= begin) & (wanted < begin + held["num_rows"])] - begin
        begin += held["num_rows"]
        if not len(inside):
            continue
        file = pq.ParquetFile(pa.PythonFile(CheckedFile(store, ObjectEntry.from_json(held["object"])), mode="r"))
        first = 0
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            chosen = inside[(inside >= first) & (inside < first + count)] - first
            first += count
            if len(chosen):
                table = file.read_row_group(group, columns=list(columns), use_threads=False)
                found.append(table.select(list(columns)).take(pa.array(chosen)))
    return pa.concat_tables(found).combine_chunks().take(pa.array(row_of))


def winners_of(ledger: Ledger, *, drop_equal_texts: bool) -> tuple[npt.NDArray[np.bool_], Duplicates]:
    """bool [N]: the documents that are to be indexed; and the duplicates, by place in corpus order, with what stands for each."""
    taking = np.flatnonzero(ledger.state_N == TAKES_PART)
    again, first = repeats(ledger.doc_hash_N2[taking])
    place, stands, by_text = taking[again], taking[first], np.zeros(len(again), bool)
    wins = np.zeros(len(ledger), bool)
    wins[taking] = True
    wins[place] = False
    if drop_equal_texts:
        left = np.flatnonzero(wins)
        again, first = repeats(ledger.text_hash_N2[left])
        wins[left[again]] = False
        place, stands = np.concatenate([place, left[again]]), np.concatenate([stands, left[first]])
        by_text = np.concatenate([by_text, np.ones(len(again), bool)])
    order = np.argsort(place)
    return wins, Duplicates(place[order], stands[order], by_text[order])


def rows_of_documents(row_id_F: Ints, num_chunks_F: npt.NDArray[Any], num_rows: int) -> npt.NDArray[np.bool_]:
    """bool [num_rows]: True for the rows of these documents. Raises IntegrityError where rows lie beyond, or overlap."""
    bounds = np.zeros(num_rows + 1, np.int32)
    ends = row_id_F + num_chunks_F
    if len(row_id_F) and (row_id_F.min() < 0 or ends.max() > num_rows):
        raise IntegrityError(f"the ledger names rows {row_id_F.min()}..{ends.max() - 1}, there are {num_rows}")
    np.add.at(bounds, row_id_F, 1)
    np.subtract.at(bounds, ends, 1)
    covered = np.cumsum(bounds[:-1])
    if num_rows and covered.max() > 1:
        raise IntegrityError(f"row {int(np.argmax(covered > 1))} belongs to two documents of the ledger")
    return covered.astype(bool)


def find_rows(known_KW: Hashes, wanted_MW: Hashes) -> Ints:
    """For each wanted key the index of the first known one that equals it, -1 where there is none; int64 [M]."""
    found = np.full(len(wanted_MW), -1, np.int64)
    if not len(known_KW) or not len(wanted_MW):
        return found
    # Usually few are wanted among many: what cannot match is left out before anything is sorted.
    likely = np.flatnonzero(np.isin(known_KW[:, -1], wanted_MW[:, -1]))
    keys = np.concatenate([known_KW[likely], wanted_MW])
    again, first = repeats(keys)
    of_wanted = (again >= len(likely)) & (first < len(likely))
    found[again[of_wanted] - len(likely)] = likely[first[of_wanted]]
    return found


def moved(entries: Sequence[SourceEntry], kept_tables: Sequence[bool], num_rows: Sequence[int]) -> list[SourceEntry]:
    """The entries with the positions that their documents have once only the tables `kept_tables` are left."""
    starts = np.concatenate([[0], np.cumsum(num_rows)])
    new_starts = np.concatenate([[0], np.cumsum(np.where(kept_tables, num_rows, 0))])
    table_of = np.searchsorted(starts, [entry.first for entry in entries], side="right") - 1
    return [
        replace(entry, first=int(entry.first - starts[table] + new_starts[table]) if entry.num_docs else 0)
        for entry, table in zip(entries, table_of.tolist(), strict=True)
    ]
