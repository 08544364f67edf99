"""From source objects to committed pieces: the plan, the check of the encoder, the streaming job. Builds and updates share it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.in_process import pieces_in_turn
from cluster.preflight import await_stream_plan
from cluster.stream import StreamJob, stream_pieces
from operators.cleaner import plugin_fingerprints
from operators.encoder import NOT_THE_INDEX_ENCODER
from operators.errors import ConfigError, RejectLimitError, SourceError
from operators.piece_store import piece_key
from operators.settings import digest_of
from operators.sources.listing import SourceObject
from operators.sources.pieces import Piece, plan_pieces
from operators.sources.staging import stage_object
from operators.storage.commits import CommitRecord, read_record
from operators.storage.store import open_store
from pipelines.parity_check import check_parity, sample_of
from pipelines.run_context import RunContext
from pipelines.telemetry.progress import RunProgress

MAX_LISTED_FAILURES = 10


def plan_corpus(context: RunContext, objects: Sequence[SourceObject]) -> tuple[list[Piece], list[str]]:
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


def stage_at(obj: Any, config: Any, store_url: str, prefix: str) -> list[Piece] | str:
    """Task: cut one object into staged pieces; what is wrong with it if it cannot be read."""
    try:
        return stage_object(obj, config, open_store(store_url), prefix)
    except SourceError as error:
        return str(error)


def stream(context: RunContext, pieces: list[Piece], unreadable: list[str]) -> tuple[list[CommitRecord], set[str]]:
    """Commit records of all pieces in source order, and the ids of those that were encoded by this attempt."""
    config, store, run = context.config, context.store, context.run
    job = stream_job(context)
    committed = {key.rsplit("/", 1)[1][:-5] for key in store.list_keys(f"{run.prefix}/pieces") if key.endswith(".json")}
    missing = [piece for piece in pieces if piece.piece_id not in committed]
    failures = list(unreadable)
    if missing:
        plan = await_stream_plan(
            context.session,
            config.cluster.wait_for_nodes_s,
            context.progress.say,
            # An update of a few texts shall not wait for a fleet that was named for many.
            workers=min(config.encode.workers, len(missing)) if context.reference else config.encode.workers,
            threads_per_worker=config.encode.threads_per_worker,
            use_gpu=context.uses_gpu,
            pieces_in_flight=config.cluster.pieces_in_flight,
        )
        if context.reference is None:  # else the encoders are held against it
            _check_parity(context, job, missing)
    context.progress.stage("encode pieces", total=len(pieces), done=len(pieces) - len(missing))
    encoders = plan.workers if missing else 0
    context.progress.expect_pieces(pieces, missing, encoders, context.session.in_process)
    if missing:
        if context.session.in_process:
            results = pieces_in_turn(job, missing)
        else:
            results = stream_pieces(
                job,
                missing,
                plan,
                piece_bytes=config.read.piece_bytes,
                stall_timeout_s=config.cluster.stall_timeout_s,
                wait_for_nodes_s=config.cluster.wait_for_nodes_s,
                check=context.watch,
                say=context.progress.say,
            )
        for result in results:
            context.watch()
            context.progress.piece_done(result)
            if result.error is not None:
                names = ", ".join(o.source for o in result.piece.objects[:3])
                failures.append(
                    f"{names} ({result.piece.kind} {result.piece.start}..{result.piece.end}): {result.error}"
                )
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
    records: list[CommitRecord] = []
    lost: list[str] = []
    with ThreadPoolExecutor(16) as pool:
        read = pool.map(lambda piece: read_record(store, piece_key(run.prefix, piece.piece_id)), pieces)
        for piece, record in zip(pieces, read, strict=True):
            if record is None:
                lost.append(piece.piece_id)
                continue
            context.progress.telemetry.note_records([record.facts])
            record.facts.pop("token_lengths", None)  # kilobytes a piece, and the records stay with the driver
            records.append(record)
    if lost:
        raise SourceError(
            f"{len(lost)} piece(s) were not committed although the job ended ({', '.join(lost[:3])}); run again"
        )
    return records, {piece.piece_id for piece in missing}


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


def stream_job(context: RunContext) -> StreamJob:
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


def _check_parity(context: RunContext, job: StreamJob, missing: list[Piece]) -> None:
    """Refuse to start with an encoder that does not give the model's vectors. What was found goes into the manifest."""
    context.progress.stage("check encoder", total=1)
    threads = context.config.encode.threads_per_worker
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1} if context.uses_gpu else {"num_cpus": threads}
    found = context.tasks(check_parity, [(job, sample_of(missing))], **resources)[0]
    context.store.put(context.parity_key, json.dumps(found, sort_keys=True).encode())
    if not found["num_vectors"]:
        context.progress.say(
            "no text of the pieces that were sampled could be read: the encoder was not compared with float32"
        )
    if found["attention_reason"]:
        context.progress.say(f"batches are padded, which is slower: {found['attention_reason']}")


def check_rejects(context: RunContext, records: list[CommitRecord]) -> None:
    """Raise RejectLimitError, with counts by reason, when too many rows were bad."""
    where = f"{context.store.url}/{context.run.prefix}/pieces/*.rejects.parquet"
    check_rejected_share(
        context, sum_counts(records, "rejected"), sum(r.facts["num_rows_read"] for r in records), where
    )


def check_rejected_share(context: RunContext, reasons: dict[str, int], read: int, where: str) -> None:
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
