"""`update`: the index follows its corpus for the cost of what changed.

    list -> scan changed objects (no encoding) -> set against the ledger -> take out and encode what is new -> delta segment,
    deletion bitmaps, ledger -> verify what is new, measure -> publish

Every step commits its units; running update again does only what is missing.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.preflight import check_environment
from cluster.session import Session
from operators.artifact.manifest import Manifest, fence_current, open_published
from operators.chunker import Chunker
from operators.documents import SourceEntry, document_hash, read_sources
from operators.encoding.encode_config import configured_model
from operators.errors import ConfigError, FingerprintError, QualityError, SourceError
from operators.settings import differing_fields
from operators.sources.listing import Listing, SourceObject, list_sources
from operators.storage.fencing import Epoch, take_epoch
from operators.storage.store import Store, open_store
from pipelines.build import refuse_root_among_sources
from pipelines.candidate_quality import measured
from pipelines.compact import compact
from pipelines.config import RunConfig, config_of_version
from pipelines.drift import drift
from pipelines.gate import gate
from pipelines.publication import finish_published, publish_version
from pipelines.run_context import RunContext, epoch_watch, fingerprints, open_session
from pipelines.runs import (
    Run,
    begin_or_resume,
    check_run_kept,
    discard_unfinished,
    discard_unpublished,
    forgotten_if_refused,
    told_as_lost,
)
from pipelines.telemetry.progress import RunProgress
from pipelines.update_candidate import build_update
from pipelines.update_plan import UpdatePlan, encode_changes, plan_update

# So many documents are encoded sooner in this process than Ray and its workers start.
IN_PROCESS_DOCUMENTS = 2_000
IN_PROCESS_BYTES = 256 << 20  # of changed objects that are scanned here
# A listing that lost most of the corpus is more often a fault than a wish; small corpora may do as they like.
GUARDED_DOCUMENTS = 1_000


@dataclass(frozen=True)
class UpdateResult:
    """What an update did, or (`dry_run`) would do."""

    manifest: Manifest  # of the version that is published now
    published: bool  # False: nothing changed, or a dry run
    objects: dict[str, int]  # unchanged, changed, added, vanished
    changes: dict[str, int]  # documents: added, edited, deleted, revived, unchanged; texts_to_encode
    texts_encoded: int  # by this attempt; the rest was committed before
    seconds: dict[str, float]
    dry_run: bool = False
    cost: dict[str, float | None] | None = None  # of a dry run: tokens, seconds of encoding, size_bytes; estimates
    retrained: str = ""  # why the quantizer was trained anew, in a version that followed this one at once


@dataclass(frozen=True)
class UpdateOptions:
    """How an update is to be done."""

    append: bool = False  # SOURCE lists only what is new
    deletes: Sequence[str] | None = None  # ids of documents to delete, whatever the corpus holds
    min_recall: float = 0.95
    max_deleted: float = 0.5  # fraction of the documents that may vanish in one update
    queries: Sequence[str] = ()  # to measure recall with, in place of the stored sample
    retrain: str = "never"  # or auto: publish a version with a new quantizer after this one when drift recommends it
    dry_run: bool = False
    fresh: bool = False  # discard the work of unfinished updates


def update(
    sources: Sequence[str],
    root: str,
    configure: Callable[[RunConfig], RunConfig] = lambda config: config,
    options: UpdateOptions | None = None,
    progress: RunProgress | None = None,
) -> UpdateResult:
    """Bring the index to the present state of its corpus and publish it, or go on with an update that was interrupted.

    configure: from the settings of the published version to those of the run; semantic ones must stay as they are.
    Raises a VectormillError (see operators/errors.py); what was committed until then is kept, and CURRENT is as it was.
    """
    chosen = options or UpdateOptions()
    _check_options(sources, chosen)
    with progress or RunProgress(quiet=True) as shown:
        result = _update(sources, root, configure, chosen, shown)
        if chosen.retrain == "auto" and not chosen.dry_run:
            return _retrained(result, root, configure, chosen.min_recall, shown)
        return result


def _check_options(sources: Sequence[str], chosen: UpdateOptions) -> None:
    """Raise ConfigError for what cannot be meant."""
    if chosen.retrain not in ("never", "auto"):
        raise ConfigError(f"retrain must be never or auto, got {chosen.retrain!r} (--retrain)")
    for name, value in (("--min-recall", chosen.min_recall), ("--max-deleted", chosen.max_deleted)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} must be in 0..1, got {value:g}")
    if not sources and not (chosen.append and chosen.deletes is not None):
        raise ConfigError(
            "update needs the corpus as it is now, got no SOURCE; to delete documents only, give --append --deletes FILE"
        )


def _update(
    sources: Sequence[str],
    root: str,
    configure: Callable[[RunConfig], RunConfig],
    chosen: UpdateOptions,
    shown: RunProgress,
) -> UpdateResult:
    check_environment()
    store = open_store(root)
    parent, parent_digest = open_published(store)
    if not chosen.dry_run:
        finish_published(store, parent)
    config = configure(config_of_version(parent.config))
    refuse_root_among_sources(sources, root)
    shown.stage("list sources")
    entries = read_sources(store, parent)
    listing = _listing(sources, entries, chosen.append)
    objects = count_objects(entries, listing.objects)
    if not chosen.deletes and not chosen.fresh and listing.objects == [entry.obj for entry in entries]:
        cost = _cost(parent, 0) if chosen.dry_run else None
        return UpdateResult(parent, False, objects, _no_changes(parent), 0, shown.stages, chosen.dry_run, cost)
    spec = configured_model(config.encode)
    Chunker(config.chunk, spec).setup()
    pieces_of, fingerprint = fingerprints(config, spec)
    _check_fingerprint(parent, fingerprint)
    with ExitStack() as stack:
        if chosen.dry_run:
            scratch = open_store(stack.enter_context(tempfile.TemporaryDirectory(prefix="vectormill-")))
            run, epoch, tag = Run("dry-run", pieces_of, False, "update"), Epoch(0, "dry-run", "", ""), None
            watch = _no_watch
        else:
            scratch = store
            run, epoch, tag = _begin(store, pieces_of, sources, parent, parent_digest, chosen.fresh)
            watch = epoch_watch(store, epoch)
            stack.enter_context(told_as_lost(store, epoch, tag))
            stack.enter_context(forgotten_if_refused(store, run))
        context = RunContext(scratch, config, run, epoch, Session(0, 0, 0), shown, watch, spec, fingerprint)
        scanned_bytes = _bytes_to_scan(entries, listing.objects)
        with _session(context, scanned_bytes <= IN_PROCESS_BYTES, chosen.dry_run):
            plan = plan_update(context, store, parent, entries, listing.objects, _deletes(chosen.deletes or ()))
        _check_deleted(parent, plan, chosen.max_deleted)
        changes = {**plan.changes.counts, "texts_to_encode": len(plan.changes.to_encode_E)}
        if chosen.dry_run:
            cost = _cost(parent, changes["texts_to_encode"])
            return UpdateResult(parent, False, objects, changes, 0, shown.stages, dry_run=True, cost=cost)
        with _session(context, len(plan.changes.to_encode_E) <= IN_PROCESS_DOCUMENTS):
            encoded = encode_changes(context, parent, plan)
            facts = {"objects": objects, "documents": changes}
            sources_facts = _sources_facts(sources, listing, chosen.append, parent)
            candidate, new_segments = build_update(context, parent, plan, encoded, sources_facts, facts)
            if not plan.num_newly_deleted and _same_content(parent, candidate):
                discard_unpublished(store, run, epoch)
                return UpdateResult(parent, False, objects, changes, encoded.num_texts, shown.stages)
            found = measured(context, parent, candidate, new_segments, chosen.queries)
            candidate = found.candidate
        given = found.recall if chosen.queries else None
        gate(store, candidate, found.parent_recall, chosen.min_recall, given)
        publish_version(context, candidate, tag)
    return UpdateResult(candidate, True, objects, changes, encoded.num_texts, shown.stages)


def _retrained(
    result: UpdateResult,
    root: str,
    configure: Callable[[RunConfig], RunConfig],
    min_recall: float,
    shown: RunProgress,
) -> UpdateResult:
    """The update, followed by a version with a new quantizer where drift recommends one.

    Also when nothing changed: the update before may have been killed in between. A new quantizer that does not pass the
    gate leaves the update as it is.
    """
    shown.stage("measure drift", total=1)
    found = drift(root)
    if found["recommendation"] != "retrain":
        return result
    shown.say(f"training the quantizer anew: {found['reason']}")
    try:
        anew = compact(root, configure, retrain=True, min_recall=min_recall)
    except QualityError as error:
        shown.say(f"{result.manifest.version} stays published, the new quantizer was refused: {error}")
        return result
    return dataclasses.replace(result, manifest=anew.manifest, published=True, retrained=found["reason"])


def _begin(
    store: Store, pieces_of: dict[str, Any], sources: Sequence[str], parent: Manifest, parent_digest: str, fresh: bool
) -> tuple[Run, Epoch, str | None]:
    if fresh:
        take_epoch(store, "fresh")
        discard_unfinished(store, "update")
    run = begin_or_resume(store, pieces_of, list(sources), {parent.run_id}, "update")
    epoch = take_epoch(store, run.run_id)
    tag = fence_current(store, epoch, parent_digest)
    check_run_kept(store, run)
    return run, epoch, tag


def _no_watch() -> None:
    """A dry run has taken nothing that another run could take from it."""


@contextmanager
def _session(context: RunContext, is_small: bool, dry_run: bool = False) -> Iterator[None]:
    """Give the context its session for the block. A dry run stays here: other machines cannot write to its scratch folder."""
    if dry_run:
        context.session = Session(0, 0, 0, in_process=True)
        yield
        return
    with open_session(context.config.cluster, context.progress, is_small=is_small) as context.session:
        yield


def _listing(sources: Sequence[str], entries: Sequence[SourceEntry], append: bool) -> Listing:
    """The corpus as it is now. What is appended stands before all that was there: its documents replace those of equal id."""
    listing = list_sources(sources) if sources else Listing([], [])
    if not append:
        return listing
    new = {obj.uri: obj for obj in listing.objects}
    known = {entry.obj.uri: entry.obj.source for entry in entries}
    taken = {entry.obj.source for entry in entries if entry.obj.uri not in new}
    named = []
    for obj in listing.objects:
        source = known.get(obj.uri, obj.source)
        named.append(dataclasses.replace(obj, source=obj.uri if source in taken else source))
        taken.add(named[-1].source)
    same = {entry.obj.uri: entry.obj for entry in entries}
    # An object that is appended again without having changed keeps its place.
    ahead = [obj for obj in named if same.get(obj.uri) != obj]
    moved = {obj.uri for obj in ahead}
    return Listing([*ahead, *(entry.obj for entry in entries if entry.obj.uri not in moved)], listing.ignored)


def count_objects(entries: Sequence[SourceEntry], objects: Sequence[SourceObject]) -> dict[str, int]:
    """How many source objects are unchanged, changed, added and vanished."""
    before = {entry.obj.uri: entry.obj for entry in entries}
    unchanged = sum(before.get(obj.uri) == obj for obj in objects)
    known = sum(obj.uri in before for obj in objects)
    return {
        "unchanged": unchanged,
        "changed": known - unchanged,
        "added": len(objects) - known,
        "vanished": len(before) - known,
    }


def _bytes_to_scan(entries: Sequence[SourceEntry], objects: Sequence[SourceObject]) -> int:
    before = {entry.obj for entry in entries}
    return sum(obj.size_bytes for obj in objects if obj not in before)


def _cost(parent: Manifest, num_texts: int) -> dict[str, float | None]:
    """What encoding so many texts would take, going by what the parent's run measured and by the size of its objects."""
    encoded = parent.reports["encoded"]
    each = num_texts / max(1, encoded["texts"])
    per_document = parent.ntotal / max(1, parent.num_docs)
    return {
        "tokens": round(each * encoded["tokens"]),
        "seconds": None if encoded["seconds"] is None else each * encoded["seconds"],
        "size_bytes": round(num_texts * per_document * parent.bytes_per_vector),
    }


def _check_fingerprint(parent: Manifest, fingerprint: dict[str, Any]) -> None:
    differing = differing_fields(parent.fingerprint, fingerprint)
    if differing:
        raise FingerprintError(
            f"version {parent.version} was made with other settings, code or model, so what is encoded now could not be compared"
            f" with it: {'; '.join(differing)}. Use those it was made with, or build the index again (`vectormill build`)"
        )


def _deletes(ids: Sequence[str]) -> np.ndarray:
    """Hashes of the ids, uint64 [M, 2]."""
    joined = b"".join(document_hash(doc_id) for doc_id in dict.fromkeys(ids))
    return np.frombuffer(joined, "<u8").reshape(-1, 2)


def _check_deleted(parent: Manifest, plan: UpdatePlan, max_deleted: float) -> None:
    gone = plan.changes.counts["deleted"]
    if not plan.changes.wins_N.any():
        raise SourceError(
            f"the corpus must hold at least one usable text, none is left of the {parent.num_docs} of version {parent.version};"
            " check the SOURCE arguments"
        )
    if parent.num_docs >= GUARDED_DOCUMENTS and gone > max_deleted * parent.num_docs:
        raise SourceError(
            f"at most {max_deleted:.0%} of the documents may vanish in one update (--max-deleted), got {gone} of"
            f" {parent.num_docs} ({gone / parent.num_docs:.0%}); nothing was published. If the corpus is meant to be as it is,"
            " raise the bound; --append is for a SOURCE that lists only what is new"
        )


def _no_changes(parent: Manifest) -> dict[str, int]:
    none = dict.fromkeys(("added", "edited", "deleted", "revived"), 0)
    return {**none, "unchanged": parent.num_docs, "texts_to_encode": 0}


def _sources_facts(sources: Sequence[str], listing: Listing, append: bool, parent: Manifest) -> dict[str, Any]:
    return {
        "arguments": [*parent.sources["arguments"], *sources] if append else list(sources),
        "digest": listing.digest,
        "num_objects": len(listing.objects),
        "size_bytes": sum(obj.size_bytes for obj in listing.objects),
        "ignored": len(listing.ignored),
    }


def _same_content(parent: Manifest, candidate: Manifest) -> bool:
    """Whether nothing of what is searched or counted differs."""
    rows = [[segment.name, segment.num_rows, segment.num_deleted] for segment in parent.segments]
    now = [[segment.name, segment.num_rows, segment.num_deleted] for segment in candidate.segments]
    bitmaps = [[s.deleted and s.deleted["sha256"] for s in m.segments] for m in (parent, candidate)]
    return rows == now and bitmaps[0] == bitmaps[1] and parent.rows == candidate.rows
