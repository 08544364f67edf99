"""What an update has to do, and the encoding of it: from the listing to committed pieces of the new and changed documents.

N documents of the new corpus in its order, E of them to encode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.artifact.deletions import live_rows
from operators.artifact.manifest import Manifest
from operators.corpus_changes import (
    Changes,
    Corpus,
    concatenated,
    delete_ids,
    find_changes,
    inherit,
    spread_no_tokens,
)
from operators.documents import (
    DELETED,
    NO_TOKENS,
    Hashes,
    Ints,
    Ledger,
    SourceEntry,
    document_hash,
    find_rows,
    ledger_columns,
    positions_of,
    read_documents,
    read_ledger,
)
from operators.errors import IntegrityError, SourceError
from operators.piece_store import read_table
from operators.settings import digest_of
from operators.sources.listing import SourceObject
from operators.sources.pieces import Piece
from operators.storage.checked import ObjectEntry
from operators.storage.commits import CommitRecord
from operators.storage.store import Store
from pipelines import update_stages
from pipelines.encode_pieces import MAX_LISTED_FAILURES, check_rejected_share, plan_corpus, stream, stream_job
from pipelines.run_context import RunContext
from pipelines.update_stages import SCANNED, Wanted

READ_THREADS = 16
TAKE_PIECES = 16  # are read again by one task, however few documents are wanted of each
SCAN_PIECES = 16  # of one task: reading and hashing a piece takes a fraction of a second
# A piece of so many documents that are all to be encoded goes to the encoders as it is; else they are put together.
WHOLE_PIECE_DOCUMENTS = 256


@dataclass
class Scan:
    """The changed objects, read: their pieces, and by group of pieces what was committed."""

    pieces: list[Piece]
    groups: list[list[int]]  # numbers of pieces
    records: list[CommitRecord]

    def table(self, store: Store, columns: Sequence[str]) -> pa.Table:
        """Columns of update_stages.SCANNED of all documents, `piece` numbered over all groups."""
        schema = pa.schema([SCANNED.field(name) for name in columns])

        def read(group: list[int], record: CommitRecord) -> pa.Table:
            table = read_table(store, record.objects["documents"], list(columns)).select(list(columns))
            if "piece" in columns:
                place = table.schema.get_field_index("piece")
                number = pa.array(table.column("piece").to_numpy() + group[0], pa.int32())
                table = table.set_column(place, schema.field("piece"), number)
            return table.cast(schema)

        with ThreadPoolExecutor(READ_THREADS) as pool:
            tables = list(pool.map(read, self.groups, self.records))
        return pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()

    def rejects(self, store: Store) -> list[pa.Table]:
        """Rows that were left out, schemas.REJECTS."""
        with ThreadPoolExecutor(READ_THREADS) as pool:
            return list(pool.map(lambda record: read_table(store, record.objects["rejects"]), self.records))


@dataclass
class UpdatePlan:
    """The new corpus, what changed in it, and where each document is found."""

    objects: list[SourceObject]
    num_rows_read: list[int]  # of each object
    num_docs: list[int]
    scanned: list[bool]  # whether the object was scanned
    corpus: Corpus
    scan_row_N: Ints  # of a scanned document: its row in the scan's tables; else -1
    parent_place_N: Ints  # of a document of an unchanged object: its place in the parent's corpus; else -1
    parent_ledger: Ledger
    parent_live_R: np.ndarray
    drop_equal_texts: bool
    scan: Scan
    changes: Changes
    num_newly_deleted: int  # documents that this run was asked to delete and the parent had not

    def decide(self) -> None:
        """Find the changes again, after states of documents changed."""
        self.changes = find_changes(self.corpus, self.parent_ledger, self.parent_live_R, self.drop_equal_texts)


def plan_update(
    context: RunContext,
    store: Store,
    parent: Manifest,
    entries: Sequence[SourceEntry],
    objects: Sequence[SourceObject],
    deletes_M2: Hashes,
) -> UpdatePlan:
    """Scan the objects that are not as they were, and set them against the parent's ledger.

    store: of the index; `context.store` takes the scan's commits (another one in a dry run).
    Raises SourceError for objects that cannot be read, RejectLimitError.
    """
    known = {entry.obj for entry in entries}
    to_scan = [obj for obj in objects if obj not in known]
    scan = _scan(context, to_scan)
    context.progress.stage("compare", total=1)
    parent_ledger = read_ledger(store, parent, entries)
    parent_positions = positions_of(entries)
    scanned = scan.table(context.store, [name for name in SCANNED.names if name not in ("doc_id", "row")])
    first_scanned = len(parent_ledger)
    everything = concatenated([parent_ledger, ledger_columns([scanned])])
    in_parent = _ranges_of_entries(entries)
    in_scan = _ranges_of_sources(scanned.column("source"), first_scanned)
    ranges = [in_parent[obj] if obj in known else in_scan.get(obj.source, (0, 0)) for obj in objects]
    counts = [end - begin for begin, end in ranges]
    places = np.concatenate([np.empty(0, np.int64), *(np.arange(begin, end) for begin, end in ranges)])
    positions = np.concatenate([parent_positions, np.full(scanned.num_rows, -1, np.int64)])
    corpus = Corpus(everything.take(places), np.repeat(np.arange(len(objects)), counts), positions[places])
    scan_row = np.where(places >= first_scanned, places - first_scanned, -1)
    parent_place = np.where(places < first_scanned, places, -1)
    number_of = {obj.uri: number for number, obj in enumerate(objects)}
    object_of_parent = np.repeat(
        np.array([number_of.get(entry.obj.uri, -1) for entry in entries], np.int64),
        [entry.num_docs for entry in entries],
    )
    inherit(corpus, object_of_parent, parent_ledger)
    num_deleted = int((corpus.ledger.state_N == DELETED).sum())
    if len(deletes_M2):
        found = delete_ids(corpus.ledger, deletes_M2)
        if found < len(deletes_M2):
            context.progress.say(f"{len(deletes_M2) - found} of {len(deletes_M2)} ids to delete are not in the corpus")
    rows_read: dict[str, int] = {}
    for record in scan.records:
        for source, count in record.facts["num_rows_read"].items():
            rows_read[source] = rows_read.get(source, 0) + count
    read_before = {entry.obj: entry.num_rows_read for entry in entries}
    num_rows_read = [read_before[obj] if obj in known else rows_read.get(obj.source, 0) for obj in objects]
    live = live_rows(store, parent)
    drop = context.config.clean.duplicates == "drop"
    changes = find_changes(corpus, parent_ledger, live, drop)
    is_scanned = [obj not in known for obj in objects]
    plan = UpdatePlan(
        list(objects),
        num_rows_read,
        counts,
        is_scanned,
        corpus,
        scan_row,
        parent_place,
        parent_ledger,
        live,
        drop,
        scan,
        changes,
        int((corpus.ledger.state_N == DELETED).sum()) - num_deleted,
    )
    _check_rejects(context, scan, sum(rows_read.values()))
    return plan


def _check_rejects(context: RunContext, scan: Scan, num_rows_read: int) -> None:
    reasons: Counter[str] = Counter()
    for table in scan.rejects(context.store):
        bad = table.filter(pc.equal(table.column("outcome"), "rejected"))
        reasons.update(bad.column("reason").to_pylist())
    where = f"{context.store.url}/{context.run.prefix}/scan/*.rejects.parquet"
    check_rejected_share(context, dict(reasons), num_rows_read, where)


def _scan(context: RunContext, objects: Sequence[SourceObject]) -> Scan:
    pieces, unreadable = plan_corpus(context, objects) if objects else ([], [])
    if unreadable:
        shown = "; ".join(sorted(unreadable)[:MAX_LISTED_FAILURES])
        raise SourceError(
            f"{len(unreadable)} of {len(objects)} changed objects could not be read, nothing was published; mend them and run"
            f" again: {shown}"
        )
    groups = [list(range(i, min(i + SCAN_PIECES, len(pieces)))) for i in range(0, len(pieces), SCAN_PIECES)]
    job = stream_job(context)
    context.progress.stage("scan changed objects", total=len(groups))
    calls = []
    for group in groups:
        members = [pieces[number] for number in group]
        inputs = digest_of([job.inputs, [piece.piece_id for piece in members]])
        calls.append((job, f"{context.run.prefix}/scan/{inputs[:24]}", members, inputs))
    return Scan(pieces, groups, context.tasks(update_stages.scan_group, calls))


def _ranges_of_entries(entries: Sequence[SourceEntry]) -> dict[SourceObject, tuple[int, int]]:
    ends = np.cumsum([entry.num_docs for entry in entries]).tolist()
    return {entry.obj: (end - entry.num_docs, end) for entry, end in zip(entries, ends, strict=True)}


def _ranges_of_sources(source: pa.ChunkedArray, offset: int) -> dict[str, tuple[int, int]]:
    """Where the documents of each source lie; they are consecutive."""
    encoded = source.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    numbers, first, counts = np.unique(encoded.indices.to_numpy(), return_index=True, return_counts=True)
    names = encoded.dictionary.to_pylist()
    return {
        names[number]: (offset + begin, offset + begin + count)
        for number, begin, count in zip(numbers.tolist(), first.tolist(), counts.tolist(), strict=True)
    }


@dataclass
class Encoded:
    """Committed pieces of what was encoded; the rows of its documents are in the corpus's ledger."""

    pieces: list[CommitRecord]
    bases: list[int]  # first row id of each piece
    counts: list[int]
    num_texts: int  # encoded by this attempt
    next_row_id: int


def encode_changes(context: RunContext, parent: Manifest, plan: UpdatePlan) -> Encoded:
    """Encode the documents that have no rows, and give them some, from where the parent's end.

    A document without a token may have kept out another of its id: then that is encoded too, in a further round.
    """
    done = Encoded([], [], [], 0, parent.next_row_id)
    context.reference = ObjectEntry.from_json(parent.queries)
    ledger = plan.corpus.ledger
    while len(plan.changes.to_encode_E):
        places = plan.changes.to_encode_E
        pieces = _take(context, _wanted(context, parent, plan), len(places))
        records, encoded_now = stream(context, pieces, [])
        tables = update_stages.documents_of_pieces(context.store, records)
        for piece, record, table in zip(pieces, records, tables, strict=True):
            hashes = _hashes(table.column("doc_id").to_pylist())
            at = find_rows(ledger.doc_hash_N2[places], hashes)
            if (at < 0).any():
                raise IntegrityError(f"{record.unit} holds documents that were not to be encoded; run update --fresh")
            num_chunks = table.column("num_chunks").to_numpy()
            first = done.next_row_id + np.cumsum(num_chunks) - num_chunks
            ledger.row_id_N[places[at]] = first
            ledger.num_chunks_N[places[at]] = num_chunks
            done.pieces.append(record)
            done.bases.append(done.next_row_id)
            done.counts.append(int(num_chunks.sum()))
            done.num_texts += len(at) if piece.piece_id in encoded_now else 0
            done.next_row_id += int(num_chunks.sum())
        without = places[ledger.row_id_N[places] < 0]
        lost = sum(record.facts["dropped"].get("no_tokens", 0) for record in records)
        if len(without) != lost:
            raise IntegrityError(
                f"{len(places)} documents were to be encoded, {len(places) - len(without)} were, and {lost} have no tokens;"
                " run update --fresh"
            )
        if not len(without):
            break
        spread_no_tokens(ledger, ledger.text_hash_N2[without])
        assert (ledger.state_N[without] == NO_TOKENS).all()
        _decide_again(plan, done)
    return done


def _decide_again(plan: UpdatePlan, done: Encoded) -> None:
    """Winners again, where rows beyond the parent's are those of what was just encoded."""
    live = plan.parent_live_R
    plan.parent_live_R = np.concatenate([live, np.zeros(done.next_row_id - len(live), bool)])
    counts = plan.changes.counts
    plan.decide()
    plan.parent_live_R, plan.changes.counts = live, counts


def _hashes(doc_ids: Sequence[str]) -> Hashes:
    return np.frombuffer(b"".join(map(document_hash, doc_ids)), "<u8").reshape(-1, 2)


def _wanted(context: RunContext, parent: Manifest, plan: UpdatePlan) -> list[Wanted]:
    """For each piece that holds documents to encode, the rows of them; in corpus order."""
    places = plan.changes.to_encode_E
    found: list[tuple[int, int, Wanted]] = []  # object, piece within it, wanted
    piece_docs = np.bincount(plan.scan.table(context.store, ["piece"]).column("piece").to_numpy())
    scan_rows = plan.scan_row_N[places]
    from_scan = scan_rows >= 0
    taken = plan.scan.table(context.store, ["piece", "source", "row"]).take(pa.array(scan_rows[from_scan]))
    piece_of = taken.column("piece").to_numpy()
    rows, sources = taken.column("row").to_numpy(), taken.column("source").to_pylist()
    objects = plan.corpus.object_N[places[from_scan]]
    for piece, members in groupby(range(len(piece_of)), key=lambda i: int(piece_of[i])):
        chosen = list(members)
        is_whole = len(chosen) == piece_docs[piece]
        wanted = Wanted(plan.scan.pieces[piece], [sources[i] for i in chosen], rows[chosen], is_whole)
        found.append((int(objects[chosen[0]]), piece, wanted))
    # Documents of objects that did not change: what stood for them is gone. Which piece holds them is not known.
    back = places[~from_scan]
    if len(back):
        held = read_documents(context.store, parent, plan.corpus.position_N[back], ["row"])
        row_of_back, object_of_back = held.column("row").to_numpy(), plan.corpus.object_N[back]
        for number in np.unique(object_of_back).tolist():
            obj = plan.objects[number]
            pieces, unreadable = plan_corpus(context, [obj])
            if unreadable:
                raise SourceError(f"{obj.uri} could not be read again, nothing was published: {unreadable[0]}")
            of_object = row_of_back[object_of_back == number]
            for order, of_piece in enumerate(pieces):
                found.append((number, order, Wanted(of_piece, [obj.source] * len(of_object), of_object, False)))
    found.sort(key=lambda item: item[:2])
    return [wanted for _, _, wanted in found]


def _take(context: RunContext, wanted: Sequence[Wanted], expected: int) -> list[Piece]:
    """Pieces for the streaming job that hold the wanted documents and no others."""
    job = stream_job(context)
    groups: list[list[Wanted] | Piece] = []
    held = 0
    for one in wanted:
        if one.is_whole and len(one.rows) >= WHOLE_PIECE_DOCUMENTS:
            groups.append(one.piece)
            expected -= len(one.rows)
            continue
        full = held + len(one.rows) > context.config.read.piece_rows
        if not groups or isinstance(groups[-1], Piece) or full or len(groups[-1]) == TAKE_PIECES:
            groups.append([])
            held = 0
        last = groups[-1]
        assert isinstance(last, list)
        last.append(one)
        held += len(one.rows)
    calls = []
    for group in groups:
        if isinstance(group, list):
            chosen = [[one.piece.piece_id, one.sources, one.rows.tolist()] for one in group]
            inputs = digest_of([job.inputs, chosen])
            calls.append((job, f"{context.run.prefix}/taken/{inputs[:24]}", group, inputs))
    context.progress.stage("take out what is new", total=len(calls))
    records = context.tasks(update_stages.take_group, calls)
    update_stages.check_taken(records, expected)
    staged = iter(records)
    pieces = [g if isinstance(g, Piece) else update_stages.staged_piece(g, next(staged)) for g in groups]
    return [piece for piece in pieces if piece.end > piece.start]
