"""The one segment that a compaction makes of all segments of a version, by merging them or by quantizing their vectors anew."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np

from operators.artifact.manifest import (
    Manifest,
    PartRef,
    Segment,
    compute_content_digest,
    part_ref,
    read_part_records,
)
from operators.errors import IntegrityError
from operators.fingerprint import index_fingerprint
from operators.index_config import IndexSizes, resolve_sizes
from operators.merger import open_runs, split_lists
from operators.settings import digest_of
from operators.storage.commits import CommitRecord, check_inputs
from pipelines import compact_stages, index_stages
from pipelines.compact_stages import ListsOfPart
from pipelines.index_stages import Input, Threads, bare
from pipelines.run_context import RunContext

KIND = "compact"
NUM_THREADS = 16


def build_compacted(context: RunContext, parent: Manifest, retrain: bool) -> Manifest:
    """Manifest of a version of one segment, its objects written, not verified or measured yet."""
    store, config = context.store, context.config
    made_from = digest_of(context.run.fingerprint)
    segment_name = f"{context.run.run_id}-{made_from[:12]}"
    if retrain:
        sizes = resolve_sizes(config.index, parent.ntotal, parent.d)
        trained, shards = _requantized(context, parent, sizes, made_from)
        changed = {
            "nlist": sizes.nlist,
            "M": sizes.M,
            "nbits": sizes.nbits,
            "quantizer": trained.objects["quantizer"].to_json(),
            "assignment": trained.facts["assignment"],
            "config": {**parent.config, "index": dataclasses.asdict(config.index)},
            "fingerprint": json.loads(json.dumps(index_fingerprint(parent.fingerprint, config.semantic("index")))),
        }
        merged = dataclasses.replace(parent, **changed)
        parts, checksum = _merged(context, merged, shards, None, segment_name, made_from)
        checksum = sum(record.facts["entry_checksum"] for record in shards) % 2**64
    else:
        part_bytes = {"part_bytes": config.index.part_bytes}
        merged = dataclasses.replace(
            parent,
            config={**parent.config, "index": {**parent.config.get("index", {}), **part_bytes}},
            fingerprint={**parent.fingerprint, "index.part_bytes": config.index.part_bytes},
        )
        inputs: list[Input] = [ref for segment in parent.segments for ref in segment.parts]
        parts, checksum = _merged(context, parent, inputs, parent.segments, segment_name, made_from)
    _check_kept(context, parent, parts, checksum, with_codes=not retrain)
    context.progress.stage("rewrite ledger", total=1)
    key = f"{context.run.prefix}/ledger-{made_from[:16]}"
    call = (store.url, key, f"segments/{segment_name}", parent, made_from)
    ledger: CommitRecord = context.tasks(compact_stages.rewrite_ledger, [call])[0]
    tables = [ledger.objects[f"documents-{number:05d}"] for number in range(len(ledger.facts["num_rows"]))]
    manifest = dataclasses.replace(
        merged,
        **context.identity,
        parent=parent.version,
        kind=KIND,
        changes={},
        sources={**parent.sources, "listing": ledger.objects["listing"].to_json()},
        segments=[Segment(segment_name, 0, parent.ntotal, parts)],
        documents=[
            {"num_rows": count, "object": table.to_json()}
            for count, table in zip(ledger.facts["num_rows"], tables, strict=True)
        ],
        amended=None,
        exact=None,  # of row ids that are others now
    )
    return dataclasses.replace(manifest, content_digest=compute_content_digest(manifest))


def _merged(
    context: RunContext,
    version: Manifest,
    inputs: Sequence[Input],
    segments: Sequence[Segment] | None,
    segment_name: str,
    made_from: str,
) -> tuple[list[PartRef], int]:
    """Parts of the new segment, and the checksum of the entries that went into them.

    segments: of the published version whose live rows the inputs hold, all of its parts in order. None: the inputs are
    shards of all lists.
    """
    store, config = context.store, context.config.index
    digest = version.quantizer["sha256"]
    context.progress.stage("plan parts", total=1)
    ranges = _part_ranges(context, version, inputs, segments)
    inputs = _waves(context, version, inputs, segments, made_from)
    calls = []
    rows_of = bare(segments) if segments is not None else None
    for number, (first, end) in enumerate(ranges):
        key = f"segments/{segment_name}/part-{number:05d}"
        sharing = [each for each in inputs if _lists_of(each)[0] < end and first < _lists_of(each)[1]]
        fixed = ((first, end), digest, config.merge_buffer_bytes, digest_of([made_from, first, end]), rows_of)
        calls.append((store.url, key, sharing, *fixed))
    context.progress.stage("merge parts", total=len(calls))
    records: list[CommitRecord] = context.tasks(index_stages.merge, calls)
    check_inputs(records, [call[-2] for call in calls])
    found = sum(record.facts["num_entries"] for record in records)
    if found != version.ntotal:
        raise IntegrityError(
            f"version {version.version} has {version.ntotal} live rows, the merged parts {found}; nothing was published"
        )
    checksum = sum(record.facts.get("entry_checksum", 0) for record in records) % 2**64
    return [part_ref(store, call[1] + ".json") for call in calls], checksum


def _lists_of(each: Input) -> tuple[int, int]:
    """The lists [first, end) that a part or run covers."""
    if isinstance(each, PartRef):
        return each.first_list, each.first_list + each.num_lists
    return each.facts["first_list"], each.facts["first_list"] + each.facts["num_lists"]


def _part_ranges(
    context: RunContext, version: Manifest, inputs: Sequence[Input], segments: Sequence[Segment] | None
) -> list[tuple[int, int]]:
    """Contiguous ranges of lists of about `index.part_bytes` each, by entries times their mean size in the old version.

    Deleted rows count by their share of the segment: which ones they are is only known by reading.
    """
    digest = version.quantizer["sha256"]
    live_shares = [s.num_live / max(1, s.num_rows) for s in segments or [] for _ in s.parts] or [1.0] * len(inputs)
    records = [each for each in inputs if isinstance(each, CommitRecord)]
    records += read_part_records(context.store, [each for each in inputs if isinstance(each, PartRef)])
    with ThreadPoolExecutor(NUM_THREADS) as pool:  # opening a run takes a few requests to the store
        readers = list(pool.map(lambda record: open_runs(context.store, [record], digest, cache_bytes=1)[0], records))
    weights_L = np.zeros(version.nlist)
    for reader, share in zip(readers, live_shares, strict=True):
        weights_L[reader.first_list : reader.end_list] += reader.list_sizes_L * share
    # Not that of the shards: how the rows were cut into them is no part of what is published.
    old = [ref for segment in version.segments for ref in segment.parts]
    mean_bytes = sum(ref.size_bytes for ref in old) / max(1, sum(ref.num_entries for ref in old))
    return split_lists(weights_L * mean_bytes, 0, context.config.index.part_bytes)


def _waves(
    context: RunContext,
    version: Manifest,
    inputs: Sequence[Input],
    segments: Sequence[Segment] | None,
    made_from: str,
) -> list[Input]:
    """What the parts are merged from: the inputs, or intermediate runs of them where one task would open too many.

    The base's parts are always merged directly. Each of the others has a part of every list.
    """
    config = context.config.index
    base = list(inputs[: len(segments[0].parts)]) if segments is not None else []
    groups = [list(s.parts) for s in segments[1:]] if segments is not None else [[each] for each in inputs]
    wave = 0
    while len(groups) + bool(base) > config.merge_fan_in:
        wave += 1
        fan_in = config.merge_fan_in
        joined = [list(chain.from_iterable(groups[i : i + fan_in])) for i in range(0, len(groups), fan_in)]
        context.progress.stage(f"merge wave {wave}", total=len(joined))
        calls = []
        for number, group in enumerate(joined):
            contents = [each.content if isinstance(each, PartRef) else each.content() for each in group]
            inputs_digest = digest_of([made_from, contents])
            key = f"{context.run.prefix}/waves-{made_from[:16]}/wave{wave}-{number:05d}-{inputs_digest[:12]}"
            fixed = (version.quantizer["sha256"], config.merge_buffer_bytes, inputs_digest)
            calls.append((context.store.url, key, group, (0, version.nlist), *fixed))
        groups = [[record] for record in context.tasks(index_stages.merge, calls)]
    return [*base, *chain.from_iterable(groups)]


def _requantized(
    context: RunContext, parent: Manifest, sizes: IndexSizes, made_from: str
) -> tuple[CommitRecord, list[CommitRecord]]:
    """Records of a quantizer trained on the live rows, and of shards of all of them made with it."""
    store, config, shown = context.store, context.config, context.progress
    prefix = f"{context.run.prefix}/train-{made_from[:16]}"
    buffer_bytes, segments = config.index.merge_buffer_bytes, bare(parent.segments)
    groups = _row_groups(context, parent)
    members = [digest_of([[g.ref.record_sha256, g.first, g.end] for g in group]) for group in groups]
    shown.stage("draw samples", total=len(groups))
    share = min(1.0, sizes.train_points / parent.ntotal)
    calls: list[tuple[Any, ...]] = []
    for number, (group, member) in enumerate(zip(groups, members, strict=True)):
        key = f"{prefix}/sample-{number:05d}-{member[:12]}"
        calls.append((store.url, key, group, segments, share, buffer_bytes, digest_of([made_from, member])))
    samples = context.tasks(compact_stages.sample_live, calls)
    shown.stage("train quantizer", total=1)
    threads = Threads(config.index.train_threads or max(1, int(context.session.node_cpus)))
    call = (store.url, prefix, samples, config.index, sizes, threads, made_from)
    trained: CommitRecord = context.tasks(index_stages.train, [call], num_cpus=threads.count)[0]
    shown.stage("build shards", total=len(groups))
    threads = Threads(config.encode.threads_per_worker)
    calls = []
    for number, (group, member) in enumerate(zip(groups, members, strict=True)):
        key = f"{context.run.prefix}/shards-{made_from[:16]}/shard-{number:05d}-{member[:12]}"
        inputs = digest_of([made_from, trained.content(), trained.facts["assignment"], member])
        calls.append((store.url, key, group, segments, trained, threads, buffer_bytes, inputs))
    shards: list[CommitRecord] = context.tasks(compact_stages.shard_live, calls, num_cpus=threads.count)
    check_inputs(shards, [call[-1] for call in calls])
    return trained, shards


def _row_groups(context: RunContext, parent: Manifest) -> list[list[ListsOfPart]]:
    """Consecutive lists of the parts of all segments, of at most `index.shard_rows` rows together (or one longer list)."""
    limit = context.config.index.shard_rows
    refs = [ref for segment in parent.segments for ref in segment.parts]
    readers = open_runs(
        context.store, read_part_records(context.store, refs), parent.quantizer["sha256"], cache_bytes=1
    )
    groups: list[list[ListsOfPart]] = []
    held = 0
    for ref, reader in zip(refs, readers, strict=True):
        for first, end in split_lists(reader.list_sizes_L.astype(float), reader.first_list, limit):
            low, high = first - reader.first_list, end - reader.first_list
            count = int(reader.starts_L[high] - reader.starts_L[low])
            if not groups or held + count > limit:
                groups.append([])
                held = 0
            groups[-1].append(ListsOfPart(ref, first, end))
            held += count
    return groups


def _check_kept(
    context: RunContext, parent: Manifest, parts: Sequence[PartRef], expected: int, *, with_codes: bool
) -> None:
    """Raise IntegrityError unless the written parts hold what was live, every row under its new id."""
    context.progress.stage("compare with parent", total=len(parts))
    calls = [(context.store.url, ref, with_codes) for ref in parts]
    found = sum(context.tasks(compact_stages.part_checksum, calls)) % 2**64
    if found != expected:
        raise IntegrityError(
            f"the new parts do not hold the live rows of version {parent.version} (other checksum over row ids, vectors"
            f"{' and codes' if with_codes else ''}); nothing was published: run `vectormill verify`, and report this if it"
            " finds nothing"
        )
