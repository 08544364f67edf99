"""`build`: the whole walk, from source objects to a published version.

    list and plan pieces -> stream (read, chunk, encode, commit) -> number rows -> sample and train -> shards -> parts
    -> verify and measure -> publish

Every step commits its units; running build again does only what is missing. Nothing is published before all of it has
been read back and checked.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cluster.preflight import check_environment
from operators.artifact.manifest import Manifest, fence_current, read_current, read_manifest
from operators.chunker import Chunker
from operators.encoding.encode_config import NEEDS_PRECISION, configured_model, precision_of_run
from operators.encoding.outputs import parse_outputs
from operators.errors import ConfigError, IntegrityError, SourceError
from operators.sources.listing import Listing, SourceObject, list_sources
from operators.storage.fencing import take_epoch
from operators.storage.filesystem import filesystem_for
from operators.storage.store import Store, open_store
from pipelines.config import RunConfig
from pipelines.encode_pieces import MAX_LISTED_FAILURES, check_rejects, encoded_report, plan_corpus, stream
from pipelines.index_build import build_candidate
from pipelines.publication import finish_published, publish_version
from pipelines.run_context import RunContext, epoch_watch, fingerprints, open_session
from pipelines.runs import begin_or_resume, check_run_kept, discard_unfinished, forgotten_if_refused, told_as_lost
from pipelines.telemetry.progress import RunProgress


@dataclass(frozen=True)
class BuildResult:
    """What a build did."""

    manifest: Manifest
    published: bool  # False: the root already held exactly this
    pieces_encoded: int
    pieces_resumed: int
    seconds: dict[str, float]


def build(
    sources: Sequence[str], root: str, config: RunConfig, *, fresh: bool = False, progress: RunProgress | None = None
) -> BuildResult:
    """Build and publish an index of `sources` at `root`, or go on with a build that was interrupted.

    Raises a VectormillError (see operators/errors.py); what was committed until then is kept.
    """
    with progress or RunProgress(quiet=True) as shown:
        check_environment()
        spec = configured_model(config.encode)
        asked, precision = config.encode.precision, precision_of_run(config.encode)
        parse_outputs(config.encode.outputs, spec.d)
        Chunker(config.chunk, spec).setup()  # refuses what does not go with the model, before anything is written
        config = dataclasses.replace(config, encode=dataclasses.replace(config.encode, precision=precision))
        pieces_of, fingerprint = fingerprints(config, spec)
        store = open_store(root)
        refuse_root_among_sources(sources, root)
        shown.stage("list sources")
        listing = list_sources(sources)
        digest_before, current = _published(store, fresh)
        if current is not None and not fresh:
            finish_published(store, current)
        if current is not None and not fresh and is_up_to_date(current, listing, fingerprint):
            return BuildResult(current, False, 0, 0, shown.stages)
        finished = {current.run_id} if current else set()
        if fresh:
            take_epoch(store, "fresh")
            discard_unfinished(store)
        run = begin_or_resume(store, pieces_of, list(sources), finished)
        epoch = take_epoch(store, run.run_id)
        tag = fence_current(store, epoch, digest_before)
        check_run_kept(store, run)
        with (
            told_as_lost(store, epoch, tag),
            open_session(config.cluster, shown) as session,
            forgotten_if_refused(store, run),
        ):
            watch = epoch_watch(store, epoch)
            context = RunContext(store, config, run, epoch, session, shown, watch, spec, fingerprint)
            if context.uses_gpu and asked == "auto" and not torch.cuda.is_available():
                raise ConfigError(NEEDS_PRECISION)
            pieces, unreadable = plan_corpus(context, listing.objects)
            if not pieces:
                raise no_rows(listing.objects, unreadable)
            records, encoded = stream(context, pieces, unreadable)
            check_rejects(context, records)
            manifest = build_candidate(context, listing, list(sources), records, current)
            manifest.reports["encoded"] = encoded_report(shown, pieces, records, encoded)
            publish_version(context, manifest, tag)
        return BuildResult(manifest, True, len(encoded), len(pieces) - len(encoded), shown.stages)


def refuse_root_among_sources(sources: Sequence[str], root: str) -> None:
    """Raise ConfigError for a root below a SOURCE folder: the index's own objects would be read as documents."""
    place = (filesystem_for(root)[1] + "/").removeprefix("/")
    for source in sources:
        folder = filesystem_for(source)[1].rstrip("/").removeprefix("/") + "/"
        if place.startswith(folder) and ("://" in root) == ("://" in source):
            raise ConfigError(
                f"the index root must not lie in a SOURCE folder, got --out {root!r} below SOURCE {source!r}: the next build"
                " would read the index's own files as documents; put it beside the corpus"
            )


def _published(store: Store, fresh: bool) -> tuple[str | None, Manifest | None]:
    """Digest of the manifest that CURRENT names, and the version; None for what there is not.

    With `fresh` what is damaged is passed over: building anew is the remedy.
    """
    try:
        found = read_current(store)
    except IntegrityError:
        if not fresh:
            raise
        return None, None
    if found is None:
        return None, None
    digest = found[0]["manifest"]
    try:
        return digest, read_manifest(store, found[0]["version"], digest)
    except IntegrityError:
        if not fresh:
            raise
        return digest, None


def is_up_to_date(current: Manifest, listing: Listing, fingerprint: dict[str, Any]) -> bool:
    """Whether the published version was built from these very objects with these settings and this code."""
    same_settings = current.fingerprint == json.loads(json.dumps(fingerprint))
    return same_settings and current.sources["digest"] == listing.digest


def no_rows(objects: Sequence[SourceObject], unreadable: Sequence[str]) -> SourceError:
    """What to say of a corpus without a row."""
    why = f" ({'; '.join(unreadable[:MAX_LISTED_FAILURES])})" if unreadable else ""
    return SourceError(
        f"the corpus must hold at least one row, found {len(objects)} object(s) and no rows in them{why};"
        " check the SOURCE arguments"
    )
