"""`build`: the whole walk, from source objects to a published version.

    list and plan pieces -> stream (read, chunk, encode, commit) -> number rows -> sample and train -> shards -> parts
    -> verify and measure -> publish

Every step commits its units; running build again does only what is missing. Nothing is published before all of it has
been read back and checked.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cluster.in_process import pieces_in_turn, tasks_in_turn
from cluster.preflight import check_environment, plan_stream
from cluster.session import Session, connect
from cluster.stream import StreamJob, stream_pieces
from cluster.tasks import run_tasks
from operators.artifact.manifest import (
    Manifest,
    fence_current,
    manifest_key,
    publish,
    read_current,
    read_manifest,
    read_part_records,
    write_manifest,
)
from operators.chunker import Chunker
from operators.cleaner import plugin_fingerprints
from operators.crash_points import crash_point
from operators.encoder import NOT_THE_INDEX_ENCODER
from operators.encoding.encode_config import NEEDS_PRECISION, configured_model, precision_of_run
from operators.encoding.model_folder import ModelSpec
from operators.encoding.outputs import parse_outputs
from operators.errors import ConfigError, IntegrityError, RejectLimitError, SourceError
from operators.fingerprint import index_fingerprint, piece_fingerprint
from operators.piece_store import piece_key
from operators.settings import digest_of
from operators.sources.listing import Listing, SourceObject, list_sources
from operators.sources.pieces import Piece, plan_pieces
from operators.sources.staging import stage_object
from operators.storage.checked import ObjectEntry
from operators.storage.commits import CommitRecord, read_record
from operators.storage.fencing import Epoch, take_epoch
from operators.storage.filesystem import filesystem_for
from operators.storage.store import Store, open_store
from pipelines.config import RunConfig
from pipelines.index_build import build_candidate
from pipelines.parity_check import check_parity, sample_of
from pipelines.progress import RunProgress
from pipelines.runs import Run, begin_or_resume, check_run_kept, discard_unfinished, told_as_lost, unfinished_runs
from pipelines.versions import hold, version_number, versions_in

EPOCH_CHECK_EVERY_S = 5.0
MAX_LISTED_FAILURES = 10


@dataclass(frozen=True)
class BuildResult:
    """What a build did."""

    manifest: Manifest
    published: bool  # False: the root already held exactly this
    pieces_encoded: int
    pieces_resumed: int
    seconds: dict[str, float]


@dataclass
class BuildContext:
    """What the steps share."""

    store: Store
    config: RunConfig
    spec: ModelSpec
    run: Run
    epoch: Epoch
    session: Session
    progress: RunProgress
    fingerprint: dict[str, Any]
    check: Callable[[], None]
    reference: ObjectEntry | None = None  # the query sample whose vectors the encoders must give again (an update)

    @property
    def uses_gpu(self) -> bool:
        """Whether encoders run on GPUs: wherever the session has one, unless the settings say otherwise."""
        encode = self.config.encode
        on_cpu = encode.device == "cpu" or (encode.device == "auto" and encode.precision == "int8")
        return not on_cpu and (encode.device == "cuda" or self.session.num_gpus > 0)

    @property
    def parity_key(self) -> str:
        """Where the outcome of the run's parity check is kept."""
        return f"{self.run.prefix}/parity.json"

    def tasks(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], **options: Any) -> list[Any]:
        """Parallel tasks (without Ray: in turn) under this run's watch: epoch, stall timeout, progress."""
        watch: dict[str, Any] = {"check": self.check, "on_done": lambda number, result: self.progress.advance()}
        if self.session.in_process:
            return tasks_in_turn(function, calls, **watch)
        stall_timeout_s = self.config.cluster.stall_timeout_s
        return run_tasks(function, calls, stall_timeout_s=stall_timeout_s, **watch, **options)


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
        Chunker(
            config.chunk, spec
        ).setup()  # refuses settings that do not go with the model, before anything is written
        config = dataclasses.replace(config, encode=dataclasses.replace(config.encode, precision=precision))
        settings = config.semantic("read", "clean", "chunk", "encode") | plugin_fingerprints(config.clean)
        # Equal texts are found when rows are numbered: pieces hold them all.
        numbering = {"clean.duplicates": settings.pop("clean.duplicates")}
        pieces_of = piece_fingerprint(settings, spec.fingerprint)
        fingerprint = index_fingerprint(pieces_of, config.semantic("index") | numbering)
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
        if config.cluster.where != "process":
            shown.stage("start Ray")
        with told_as_lost(store, epoch, tag), connect(config.cluster) as session, forgotten_if_refused(store, run):
            context = BuildContext(
                store, config, spec, run, epoch, session, shown, fingerprint, epoch_watch(store, epoch)
            )
            if context.uses_gpu and asked == "auto" and not torch.cuda.is_available():
                raise ConfigError(NEEDS_PRECISION)
            pieces, unreadable = plan_corpus(context, listing.objects)
            if not pieces:
                raise no_rows(listing.objects, unreadable)
            records, encoded = stream(context, pieces, unreadable)
            check_rejects(context, records)
            manifest = build_candidate(context, listing, list(sources), records, current)
            manifest.reports["encoded"] = encoded_report(shown, pieces, records, encoded)
            shown.stage("publish")
            crash_point("manifest.before")
            epoch.check(store)
            digest = write_manifest(store, manifest)
            publish(store, manifest, digest, epoch, tag)
            tidy_up(store, run, manifest)
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
    return same_settings and current.sources["digest"] == listing_digest(listing)


def listing_digest(listing: Listing) -> str:
    """Digest of which objects, in which state, make up the corpus."""
    return digest_of([[o.uri, o.source, o.etag, o.size_bytes] for o in listing.objects])


def epoch_watch(store: Store, epoch: Epoch) -> Callable[[], None]:
    last = time.monotonic()

    def check() -> None:
        nonlocal last
        if time.monotonic() - last > EPOCH_CHECK_EVERY_S:
            epoch.check(store)
            last = time.monotonic()

    return check


def plan_corpus(context: BuildContext, objects: Sequence[SourceObject]) -> tuple[list[Piece], list[str]]:
    """Pieces of all readable ones of the objects, in their order, and what is wrong with the others.

    Objects that cannot be sliced are cut by a streaming pass first. An unreadable object does not stop the rest: their
    vectors are committed, so that mending it costs only its own.
    """
    plan = plan_pieces(objects, context.config.read, keep_going=True)
    unreadable = [str(failure) for failure in plan.failures]
    staged: dict[str, list[Piece]] = {}
    if plan.to_stage:
        context.progress.stage("cut into pieces", total=len(plan.to_stage))
        calls = [(o, context.config.read, context.store.url, f"{context.run.prefix}/staged") for o in plan.to_stage]
        for obj, outcome in zip(plan.to_stage, context.tasks(stage_at, calls), strict=True):
            staged[obj.uri] = [] if isinstance(outcome, str) else outcome
            unreadable += [outcome] if isinstance(outcome, str) else []
    pieces = plan.pieces(staged)
    for problem in unreadable:
        context.progress.say(f"unreadable, will not be published without it: {problem}")
    return pieces, unreadable


def encoded_report(
    shown: RunProgress, pieces: Sequence[Piece], records: Sequence[CommitRecord], encoded: set[str]
) -> dict[str, float | None]:
    """What was encoded and how long that took, or would have at the rate of this attempt: by it `update --dry-run` says what an update would take."""
    now = [record.facts for piece, record in zip(pieces, records, strict=True) if piece.piece_id in encoded]
    tokens, tokens_now = (sum(facts["num_tokens"] for facts in some) for some in ((r.facts for r in records), now))
    seconds = shown.stages.get("encode pieces", 0.0)
    return {
        "texts": sum(record.facts["num_docs"] for record in records),
        "tokens": tokens,
        "seconds": seconds * tokens / tokens_now if tokens_now else None,
    }


def no_rows(objects: Sequence[SourceObject], unreadable: Sequence[str]) -> SourceError:
    """What to say of a corpus without a row."""
    why = f" ({'; '.join(unreadable[:MAX_LISTED_FAILURES])})" if unreadable else ""
    return SourceError(
        f"the corpus must hold at least one row, found {len(objects)} object(s) and no rows in them{why};"
        " check the SOURCE arguments"
    )


def stage_at(obj: Any, config: Any, store_url: str, prefix: str) -> list[Piece] | str:
    """Task: cut one object into staged pieces; what is wrong with it if it cannot be read."""
    try:
        return stage_object(obj, config, open_store(store_url), prefix)
    except SourceError as error:
        return str(error)


def stream(context: BuildContext, pieces: list[Piece], unreadable: list[str]) -> tuple[list[CommitRecord], set[str]]:
    """Commit records of all pieces in source order, and the ids of those that were encoded by this attempt."""
    config, store, run = context.config, context.store, context.run
    job = stream_job(context)
    committed = {key.rsplit("/", 1)[1][:-5] for key in store.list_keys(f"{run.prefix}/pieces") if key.endswith(".json")}
    missing = [piece for piece in pieces if piece.piece_id not in committed]
    failures = list(unreadable)
    if missing:
        plan = plan_stream(
            context.session,
            workers=config.encode.workers,
            threads_per_worker=config.encode.threads_per_worker,
            use_gpu=context.uses_gpu,
            pieces_in_flight=config.cluster.pieces_in_flight,
        )
        if context.reference is None:  # else the encoders are held against it
            _check_parity(context, job, missing)
    context.progress.stage("encode pieces", total=len(pieces), done=len(pieces) - len(missing))
    if missing:
        totals: Counter[str] = Counter()
        started = time.monotonic()
        if context.session.in_process:
            results = pieces_in_turn(job, missing)
        else:
            results = stream_pieces(
                job,
                missing,
                plan,
                piece_bytes=config.read.piece_bytes,
                stall_timeout_s=config.cluster.stall_timeout_s,
                check=context.check,
            )
        for result in results:
            context.check()
            if result.error is not None:
                names = ", ".join(o.source for o in result.piece.objects[:3])
                failures.append(
                    f"{names} ({result.piece.kind} {result.piece.start}..{result.piece.end}): {result.error}"
                )
                continue
            totals.update({name: result.facts[name] for name in ("num_docs", "num_tokens")})
            seconds = time.monotonic() - started
            rate = f"{totals['num_docs'] / seconds:,.0f} docs/s {totals['num_tokens'] / seconds:,.0f} tokens/s"
            context.progress.advance(note=rate)
    unlike = [failure for failure in failures if NOT_THE_INDEX_ENCODER in failure]
    if unlike:
        raise ConfigError(unlike[0][unlike[0].index(NOT_THE_INDEX_ENCODER) :])
    if failures:
        shown = "; ".join(sorted(failures)[:MAX_LISTED_FAILURES])
        more = f"; and {len(failures) - MAX_LISTED_FAILURES} more" if len(failures) > MAX_LISTED_FAILURES else ""
        raise SourceError(
            f"{len(failures)} object(s) or pieces of {len(pieces)} could not be indexed, nothing was published; the vectors of"
            f" the others are kept, mend these and run again: {shown}{more}"
        )
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda piece: read_record(store, piece_key(run.prefix, piece.piece_id)), pieces))
    lost = [piece.piece_id for piece, record in zip(pieces, records, strict=True) if record is None]
    if lost:
        raise SourceError(
            f"{len(lost)} piece(s) were not committed although the job ended ({', '.join(lost[:3])}); run again"
        )
    return [record for record in records if record is not None], {piece.piece_id for piece in missing}


@contextmanager
def forgotten_if_refused(store: Store, run: Run) -> Iterator[None]:
    """A run that is refused for its settings before it has done anything is no unfinished work: mended ones differ."""
    try:
        yield
    except ConfigError:
        if not run.resumed and not store.list_keys(f"{run.prefix}/pieces"):
            store.delete_tree(run.prefix)
        raise


def stream_job(context: BuildContext) -> StreamJob:
    config, run = context.config, context.run
    inputs = digest_of(run.fingerprint)
    model = context.spec.fingerprint
    plugins = tuple(plugin_fingerprints(config.clean).items())
    return StreamJob(
        context.store.url,
        run.prefix,
        inputs,
        model,
        config.read,
        config.chunk,
        config.encode,
        config.clean,
        plugins,
        context.reference,
    )


def _check_parity(context: BuildContext, job: StreamJob, missing: list[Piece]) -> None:
    """Refuse to start with an encoder that does not give the model's vectors. What was found goes into the manifest."""
    context.progress.stage("check encoder", total=1)
    threads = context.config.encode.threads_per_worker
    resources = {"num_cpus": 1, "num_gpus": 1} if context.uses_gpu else {"num_cpus": threads}
    found = context.tasks(check_parity, [(job, sample_of(missing))], **resources)[0]
    context.store.put(context.parity_key, json.dumps(found, sort_keys=True).encode())
    if not found["num_vectors"]:
        context.progress.say(
            "no text of the pieces that were sampled could be read: the encoder was not compared with float32"
        )
    if found["attention_reason"]:
        context.progress.say(f"batches are padded, which is slower: {found['attention_reason']}")


def check_rejects(context: BuildContext, records: list[CommitRecord]) -> None:
    """Raise RejectLimitError, with counts by reason, when too many rows were bad."""
    where = f"{context.store.url}/{context.run.prefix}/pieces/*.rejects.parquet"
    check_rejected_share(
        context, sum_counts(records, "rejected"), sum(r.facts["num_rows_read"] for r in records), where
    )


def check_rejected_share(context: BuildContext, reasons: dict[str, int], read: int, where: str) -> None:
    """Raise RejectLimitError when more than the allowed share of the rows was rejected; `where` they are listed."""
    rejected = sum(reasons.values())
    limit = context.config.read.max_reject_fraction
    if rejected > limit * read:
        by_reason = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        raise RejectLimitError(
            f"rejected rows must be at most {limit:.2%} of those read (read.max_reject_fraction), got {rejected} of {read}"
            f" ({rejected / read:.2%}): {by_reason}. Nothing was published. The rows are listed in {where}; mend them, or raise"
            " the limit and run again"
        )


def sum_counts(records: Sequence[CommitRecord], outcome: str) -> dict[str, int]:
    """Rows rejected or dropped in the pieces, by reason."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.facts[outcome])
    return dict(sorted(total.items()))


def tidy_up(store: Store, run: Run, manifest: Manifest) -> None:
    """Remove the run's work and what its lost attempts left: what counts of it is in the published version now.

    Segments of earlier versions are not looked at: those versions may still name objects that this one does not.
    """
    referenced = {entry["key"] for entry in manifest.small_objects}
    for segment in manifest.segments:
        if segment.name.startswith(run.run_id):
            for part, record in zip(segment.parts, read_part_records(store, segment.parts), strict=True):
                referenced |= {part.record_key, *(entry.key for entry in record.objects.values())}
    if run.resumed:
        _discard_lost_manifests(store, run, manifest)
    for key in store.list_keys("segments"):
        if key.startswith(f"segments/{run.run_id}-") and key not in referenced:
            store.delete(key)
    crash_point("tidy.before_runs")
    store.delete_tree(run.prefix)


def _discard_lost_manifests(store: Store, run: Run, manifest: Manifest) -> None:
    """Delete the manifests of the run's attempts that ended between manifest and publication: they name what goes now."""
    for version in versions_in(store):
        if version_number(version) < manifest.epoch and version != manifest.parent:
            held = hold(store, version)
            if held is not None and held.manifest is not None and held.manifest.run_id == run.run_id:
                store.delete(manifest_key(version))


def finish_published(store: Store, current: Manifest) -> Run | None:
    """The run that published `current`, tidied up after, if it was ended before it had done that itself; else None.

    Every command that makes a version does this first. Once another run has published, the work that is left would be
    taken for that of an unfinished run, which would go on in the folders of a published version.
    """
    for run in unfinished_runs(store):
        if run.run_id == current.run_id:
            tidy_up(store, run, current)
            return run
    return None
