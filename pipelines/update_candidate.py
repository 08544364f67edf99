"""From encoded changes to a candidate version: delta segment, deletion bitmaps, ledger, rejects, manifest."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from operators import schemas
from operators.artifact.deletions import write_deleted
from operators.artifact.manifest import Manifest, Segment, compute_content_digest
from operators.documents import (
    DELETED,
    NO_TOKENS,
    Ints,
    SourceEntry,
    document_table,
    moved,
    read_documents,
    read_ledger,
    read_sources,
    write_documents,
    write_sources,
)
from operators.piece_store import read_table, write_table
from operators.row_ids import Duplicates, RowIds
from operators.settings import digest_of
from operators.storage.checked import ObjectEntry
from operators.storage.commits import CommitRecord, new_attempt
from operators.storage.store import Store
from pipelines.index_build import build_shards, group_pieces, merge_parts
from pipelines.run_context import RunContext
from pipelines.update_plan import Encoded, UpdatePlan

_DESCRIBED = pa.schema([("source", pa.string()), ("row", pa.int64()), ("doc_id", pa.string())])
# Reasons that are found anew in every version; all others stay as long as their object does.
RECOUNTED = ("duplicate_id", "duplicate_text", "deleted_by_request")


def build_update(
    context: RunContext,
    parent: Manifest,
    plan: UpdatePlan,
    encoded: Encoded,
    sources: dict[str, Any],
    changes: dict[str, Any],
) -> tuple[Manifest, list[Segment]]:
    """The candidate, not measured yet, and its new segments (one, or none when nothing had to be encoded)."""
    store = context.store
    content = [parent.content_digest, [record.content() for record in encoded.pieces], encoded.bases]
    digest = digest_of([context.fingerprint, content])
    name = f"{context.run.run_id}-{digest[:12]}"
    new = _delta(context, parent, encoded, name, digest)
    prefix, attempt = f"segments/{name}", new_attempt()
    context.progress.stage("write ledger", total=1)
    segments = [
        _with_deletions(store, segment, plan, f"{prefix}/deleted-{attempt}") for segment in [*parent.segments, *new]
    ]
    new = segments[len(parent.segments) :]
    ledger = _ledger(
        store, parent, plan, f"{prefix}/documents-{attempt}.parquet", f"{prefix}/amended-{attempt}.parquet"
    )
    listing = write_sources(store, f"{prefix}/sources-{attempt}.parquet", ledger.pop("entries"))
    rejects = _rejects(context, parent, plan)
    rejected = write_table(store, f"{prefix}/rejects-{attempt}.parquet", rejects) if rejects.num_rows else None
    num_docs = int(plan.changes.wins_N.sum())
    rows = {
        "read": sum(plan.num_rows_read),
        "indexed": num_docs,
        **{outcome: _reasons(rejects, outcome) for outcome in ("rejected", "dropped")},
    }
    candidate = dataclasses.replace(
        parent,
        **context.identity,
        parent=parent.version,
        config=json.loads(json.dumps(context.config.to_json())),
        fingerprint=json.loads(json.dumps(context.fingerprint)),
        model=_model(context, parent, encoded),
        ntotal=sum(segment.num_live for segment in segments),
        num_docs=num_docs,
        rows=rows,
        sources={**sources, "listing": listing.to_json()},
        segments=segments,
        rejects=rejected.to_json() if rejected else None,
        **ledger,
        exact=None,
        kind="update",
        changes=changes,
        reports={**parent.reports, "seconds": dict(context.progress.stages)},
    )
    return dataclasses.replace(candidate, content_digest=compute_content_digest(candidate)), new


def _delta(context: RunContext, parent: Manifest, encoded: Encoded, name: str, digest: str) -> list[Segment]:
    """The segment of what was encoded, with the parent's quantizer."""
    num_rows = sum(encoded.counts)
    if not num_rows:
        return []
    row_ids = RowIds(encoded.bases, encoded.counts, 0, {}, _no_duplicates())
    groups = group_pieces(encoded.pieces, row_ids, context.config.index.shard_rows)
    facts = {"assignment": parent.assignment}
    trained = CommitRecord("train quantizer", parent.content_digest, "", {"quantizer": parent.quantizer_entry}, facts)
    shards = build_shards(context, groups, trained, digest)
    parts = merge_parts(context, shards, trained, encoded.pieces, name, digest)
    return [Segment(name, parent.next_row_id, num_rows, parts)]


def _no_duplicates() -> Duplicates:
    nothing = np.empty(0, np.int64)
    return Duplicates(nothing, nothing, np.empty(0, bool))


def _with_deletions(store: Store, segment: Segment, plan: UpdatePlan, key: str) -> Segment:
    """The segment with the rows of no winner marked; the parent's bitmap where it says the same.

    A new segment may have such rows too: what was encoded before another text was found to have no tokens.
    """
    end = segment.first_row_id + segment.num_rows
    deleted, before = (
        ~_extended(live_R, end)[segment.first_row_id :] for live_R in (plan.changes.live_R, plan.parent_live_R)
    )
    if np.array_equal(deleted, before):
        return segment
    num_deleted = int(deleted.sum())
    if not num_deleted:
        return dataclasses.replace(segment, deleted=None, num_deleted=0)
    entry = write_deleted(store, f"{key}-{segment.first_row_id}.bitmap", deleted)
    return dataclasses.replace(segment, deleted=entry.to_json(), num_deleted=num_deleted)


def _extended(live_R: npt.NDArray[np.bool_], num_rows: int) -> npt.NDArray[np.bool_]:
    """The first `num_rows` rows; those that came after it was decided which are live are."""
    return np.concatenate([live_R[:num_rows], np.ones(max(0, num_rows - len(live_R)), bool)])


def _ledger(store: Store, parent: Manifest, plan: UpdatePlan, documents_key: str, amended_key: str) -> dict[str, Any]:
    """`documents`, `amended` of the manifest, and the listing's `entries`."""
    parent_entries = {entry.obj: entry for entry in read_sources(store, parent)}
    ledger, position_N = plan.corpus.ledger, plan.corpus.position_N
    tables = list(parent.documents)
    held = sum(table["num_rows"] for table in tables)
    scanned = np.flatnonzero(position_N < 0)
    if len(scanned):
        found = plan.scan.table(store, ["doc_id", "row", "text_hash"]).take(pa.array(plan.scan_row_N[scanned]))
        now = ledger.take(scanned)
        doc_id, row, text_hash = (found.column(name).combine_chunks() for name in ("doc_id", "row", "text_hash"))
        table = document_table(doc_id, row, text_hash, now.row_id_N, now.num_chunks_N, now.state_N)
        tables.append(write_documents(store, documents_key, [table]))
    entries, first = [], held
    for obj, num_read, num_docs, is_scanned in zip(
        plan.objects, plan.num_rows_read, plan.num_docs, plan.scanned, strict=True
    ):
        entries.append(SourceEntry(obj, num_read, first if is_scanned else parent_entries[obj].first, num_docs))
        first += num_docs if is_scanned else 0
    # What holds for documents of unchanged objects, where their tables say something else.
    at_home = np.flatnonzero(position_N >= 0)
    stored = read_ledger(store, parent, [entry for entry in entries if entry.obj in parent_entries], amend=False)
    now = ledger.take(at_home)
    differs = np.flatnonzero(
        (now.row_id_N != stored.row_id_N) | (now.num_chunks_N != stored.num_chunks_N) | (now.state_N != stored.state_N)
    )
    position_F = position_N[at_home][differs]
    num_rows = [table["num_rows"] for table in tables]
    used = _used_tables(num_rows, entries)
    starts = np.cumsum(num_rows) - num_rows
    new_starts = np.cumsum(np.where(used, num_rows, 0)) - np.where(used, num_rows, 0)
    table_F = np.searchsorted(starts, position_F, side="right") - 1
    amended = None
    if len(differs):
        columns = [position_F - starts[table_F] + new_starts[table_F], now.row_id_N[differs]]
        columns += [now.num_chunks_N[differs], now.state_N[differs]]
        table = pa.table([pa.array(column) for column in columns], schema=schemas.AMENDED)
        amended = write_table(store, amended_key, table).to_json()
    return {
        "documents": [table for table, is_used in zip(tables, used, strict=True) if is_used],
        "amended": amended,
        "entries": moved(entries, used, num_rows),
    }


def _used_tables(num_rows: Sequence[int], entries: Sequence[SourceEntry]) -> list[bool]:
    """Which tables hold documents of the entries."""
    ends = np.cumsum(num_rows)
    first = np.array([entry.first for entry in entries if entry.num_docs], np.int64)
    last = first + np.array([entry.num_docs for entry in entries if entry.num_docs], np.int64) - 1
    touched = np.zeros(len(num_rows) + 1, np.int64)
    np.add.at(touched, np.searchsorted(ends, first, side="right"), 1)
    np.subtract.at(touched, np.searchsorted(ends, last, side="right") + 1, 1)
    return (np.cumsum(touched[:-1]) > 0).tolist()


def _rejects(context: RunContext, parent: Manifest, plan: UpdatePlan) -> pa.Table:
    """Every row of the corpus that was left out, and why: schemas.REJECTS."""
    store = context.store
    unchanged = [obj.source for obj, is_scanned in zip(plan.objects, plan.scanned, strict=True) if not is_scanned]
    kept = schemas.REJECTS.empty_table()
    if parent.rejects is not None:
        before = read_table(store, ObjectEntry.from_json(parent.rejects))
        recounted = pc.is_in(before.column("reason"), pa.array(RECOUNTED))
        stays = pc.and_(pc.is_in(before.column("source"), pa.array(unchanged, pa.string())), pc.invert(recounted))
        kept = before.filter(stays)
    state, corpus = plan.corpus.ledger.state_N, plan.corpus
    is_new = np.array(plan.scanned, bool)[corpus.object_N] if len(state) else np.empty(0, bool)
    known_before = np.zeros(len(state), bool)
    known_before[~is_new] = _parent_states(plan)[~is_new] == NO_TOKENS
    tokenless = np.flatnonzero((state == NO_TOKENS) & ~known_before)
    duplicates = plan.changes.duplicates
    lost = _described(context, parent, plan, duplicates.place_F)
    first = _described(context, parent, plan, duplicates.first_F)
    details = [
        f"same text as {doc_id} in {source} row {row}" if by_text else f"first seen in {source} row {row}"
        for by_text, doc_id, source, row in zip(
            duplicates.by_text_F.tolist(),
            *(first.column(n).to_pylist() for n in ("doc_id", "source", "row")),
            strict=True,
        )
    ]
    outcomes = np.where(duplicates.by_text_F, "dropped", "rejected").tolist()
    reasons = np.where(duplicates.by_text_F, "duplicate_text", "duplicate_id").tolist()
    deleted = _described(context, parent, plan, np.flatnonzero(state == DELETED))
    without = _described(context, parent, plan, tokenless)
    request, nothing = "deleted by request (update --deletes)", "none of its characters is a token"
    return pa.concat_tables(
        [
            kept,
            *plan.scan.rejects(store),
            _lines(without, ["dropped"] * len(without), ["no_tokens"] * len(without), [nothing] * len(without)),
            _lines(deleted, ["dropped"] * len(deleted), [RECOUNTED[2]] * len(deleted), [request] * len(deleted)),
            _lines(lost, outcomes, reasons, details),
        ]
    ).combine_chunks()


def _parent_states(plan: UpdatePlan) -> np.ndarray:
    """State in the parent's ledger of each document of the new corpus that it knows; of others anything."""
    states = np.zeros(len(plan.corpus.ledger), np.int8)
    known = plan.parent_place_N >= 0
    states[known] = plan.parent_ledger.state_N[plan.parent_place_N[known]]
    return states


def _described(context: RunContext, parent: Manifest, plan: UpdatePlan, place_F: Ints) -> pa.Table:
    """source, row and doc_id of the documents at these places."""
    if not len(place_F):
        return _DESCRIBED.empty_table()
    position, scan_row = plan.corpus.position_N[place_F], plan.scan_row_N[place_F]
    at_home = position >= 0
    known = read_documents(context.store, parent, position[at_home], ["doc_id", "row"])
    scanned = plan.scan.table(context.store, ["doc_id", "row"]).take(pa.array(scan_row[~at_home]))
    order = np.argsort(np.concatenate([np.flatnonzero(at_home), np.flatnonzero(~at_home)]))
    both = pa.concat_tables([known, scanned]).combine_chunks().take(pa.array(order))
    names = [obj.source for obj in plan.objects]
    sources = pa.array([names[number] for number in plan.corpus.object_N[place_F].tolist()], pa.string())
    return pa.table({"source": sources, "row": both.column("row"), "doc_id": both.column("doc_id")})


def _lines(described: pa.Table, outcomes: list[str], reasons: list[str], details: list[str]) -> pa.Table:
    texts = [pa.array(values, pa.string()) for values in (outcomes, reasons, details)]
    return pa.table([*described.columns, *texts], schema=schemas.REJECTS)


def _reasons(rejects: pa.Table, outcome: str) -> dict[str, int]:
    """Number of rows by reason."""
    chosen = rejects.filter(pc.equal(rejects.column("outcome"), outcome))
    return dict(sorted(Counter(chosen.column("reason").to_pylist()).items()))


def _model(context: RunContext, parent: Manifest, encoded: Encoded) -> dict[str, Any]:
    """As the parent says, with what was encoded now."""
    facts = [record.facts for record in encoded.pieces]
    model = {**parent.model, "given_as": context.config.encode.model}
    if facts:
        for name in ("over_length", "truncated_tokens"):
            model[name] = parent.model.get(name, 0) + sum(fact[f"num_{name}"] for fact in facts)
        model["batch_tokens"] = min(fact["batch_tokens"] for fact in facts)
        model["reference"] = {
            "cosine_min": min(fact["reference_cosine_min"] for fact in facts),
            "cosine_mean": min(fact["reference_cosine_mean"] for fact in facts),
        }
    return model
