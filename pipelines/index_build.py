"""The second half of a build: committed pieces become a verified, measured candidate version."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version as package_version
from typing import Any

import numpy as np

from operators.artifact.manifest import Manifest, PartRef, Segment, compute_content_digest, part_ref
from operators.documents import SourceEntry, write_sources
from operators.errors import IntegrityError, QualityError, SourceError
from operators.index_config import IndexSizes, resolve_sizes
from operators.merger import list_bytes, open_runs, split_lists
from operators.piece_store import write_table
from operators.query_sample import lowest_queries
from operators.row_ids import RowIds
from operators.settings import digest_of
from operators.shard_builder import PieceOfShard
from operators.sources.listing import Listing
from operators.storage.commits import CommitRecord, check_inputs, new_attempt
from pipelines import index_stages, recall
from pipelines.encode_pieces import sum_counts
from pipelines.index_stages import Threads
from pipelines.numbering import consecutive, number_rows
from pipelines.run_context import RunContext

TABLE_DOCUMENTS = 1_000_000  # of one table of the ledger: tables are written in parallel


def build_candidate(
    context: RunContext, listing: Listing, sources: list[str], pieces: list[CommitRecord], current: Manifest | None
) -> Manifest:
    """Manifest of a version that has been read back and measured, not published yet."""
    config, progress = context.config, context.progress
    row_ids = number_rows(context, pieces)
    ntotal, d = sum(row_ids.counts), pieces[0].facts["d"]
    if ntotal == 0:
        raise SourceError(
            f"the corpus must hold at least one usable text, found none in {sum(p.facts['num_rows_read'] for p in pieces)} rows:"
            f" rejected {sum_counts(pieces, 'rejected')}, dropped {sum_counts(pieces, 'dropped')}"
        )
    sizes = resolve_sizes(config.index, ntotal, d)
    # Everything downstream is keyed by what it is made from, so work of other settings can never be mistaken for it.
    corpus = digest_of([context.fingerprint, dataclasses.asdict(sizes), [p.content() for p in pieces], row_ids.bases])
    groups = group_pieces(pieces, row_ids, config.index.shard_rows)
    trained, samples = _train(context, groups, sizes, ntotal, corpus)
    shards = build_shards(context, groups, trained, corpus)
    segment_name = f"{context.run.run_id}-{corpus[:12]}"
    parts = merge_parts(context, shards, trained, pieces, segment_name, corpus)
    entries = _small_objects(context, listing, pieces, row_ids, samples, segment_name)
    segment = Segment(segment_name, 0, ntotal, parts)
    manifest = _manifest(context, sources, listing, pieces, row_ids, sizes, trained, entries, segment, current)
    verify_candidate(context, manifest, manifest.segments)
    quality, exact = _measure(context, manifest)
    return dataclasses.replace(manifest, quality=quality, exact=exact, reports={"seconds": dict(progress.stages)})


def group_pieces(pieces: Sequence[CommitRecord], row_ids: RowIds, shard_rows: int) -> list[list[PieceOfShard]]:
    """Consecutive pieces of at most `shard_rows` rows (or one larger piece): the units of sampling and of shards."""
    groups: list[list[PieceOfShard]] = []
    held = 0
    for number, record in enumerate(pieces):
        count = row_ids.counts[number]
        if not count:
            continue
        if not groups or held + count > shard_rows:
            groups.append([])
            held = 0
        groups[-1].append(PieceOfShard(record, row_ids.bases[number], count, row_ids.dropped.get(number, [])))
        held += count
    return groups


def _members(group: list[PieceOfShard]) -> list[Any]:
    """What a group is made of. Keys of its work carry a digest of it: `index.shard_rows` may change between attempts."""
    return [(p.record.content(), p.first_row_id) for p in group]


def _train(
    context: RunContext, groups: list[list[PieceOfShard]], sizes: IndexSizes, ntotal: int, corpus: str
) -> tuple[CommitRecord, list[CommitRecord]]:
    """Records of the trained quantizer and of the samples drawn for it and for measuring."""
    config, store = context.config, context.store
    prefix = f"{context.run.prefix}/train-{corpus[:16]}"
    train_share = min(1.0, sizes.train_points / ntotal)
    context.progress.stage("draw samples", total=len(groups))
    calls = []
    for number, group in enumerate(groups):
        made_from = digest_of([corpus, _members(group)])
        key = f"{prefix}/sample-{number:05d}-{made_from[:12]}"
        calls.append((store.url, key, group, train_share, config.index.query_sample, made_from))
    samples = context.tasks(index_stages.sample_group, calls)
    context.progress.stage("train quantizer", total=1)
    threads = Threads(config.index.train_threads or max(1, int(context.session.node_cpus)))
    call = (store.url, prefix, samples, config.index, sizes, threads, corpus)
    trained: CommitRecord = context.tasks(index_stages.train, [call], num_cpus=threads.count)[0]
    return trained, samples


def build_shards(
    context: RunContext, groups: list[list[PieceOfShard]], trained: CommitRecord, corpus: str
) -> list[CommitRecord]:
    threads = Threads(context.config.encode.threads_per_worker)
    context.progress.stage("build shards", total=len(groups))
    calls, inputs = [], []
    for number, group in enumerate(groups):
        made_from = digest_of([corpus, trained.content(), trained.facts["assignment"], _members(group)])
        key = f"{context.run.prefix}/shards-{corpus[:16]}/shard-{number:05d}-{made_from[:12]}"
        calls.append((context.store.url, key, group, trained, threads, made_from))
        inputs.append(made_from)
    shards = context.tasks(index_stages.shard, calls, num_cpus=threads.count)
    check_inputs(shards, inputs)
    return shards


def merge_parts(
    context: RunContext,
    shards: list[CommitRecord],
    trained: CommitRecord,
    pieces: list[CommitRecord],
    segment_name: str,
    corpus: str,
) -> list[PartRef]:
    config, store = context.config.index, context.store
    digest = trained.objects["quantizer"].sha256
    runs = shards
    wave = 0
    while len(runs) > config.merge_fan_in:
        wave += 1
        groups = [runs[i : i + config.merge_fan_in] for i in range(0, len(runs), config.merge_fan_in)]
        context.progress.stage(f"merge wave {wave}", total=len(groups))
        nlist = runs[0].facts["num_lists"]
        calls: list[tuple[Any, ...]] = []
        for number, group in enumerate(groups):
            made_from = digest_of([corpus, [run.content() for run in group]])
            key = f"{context.run.prefix}/waves-{corpus[:16]}/wave{wave}-{number:05d}-{made_from[:12]}"
            calls.append((store.url, key, group, (0, nlist), digest, config.merge_buffer_bytes, made_from))
        runs = context.tasks(index_stages.merge, calls)
    ranges = part_ranges(context, runs, digest, pieces)
    context.progress.stage("merge parts", total=len(ranges))
    calls = [
        (
            store.url,
            f"segments/{segment_name}/part-{number:05d}",
            runs,
            lists,
            digest,
            config.merge_buffer_bytes,
            digest_of([corpus, lists]),
        )
        for number, lists in enumerate(ranges)
    ]
    merged = context.tasks(index_stages.merge, calls)
    indexed = sum(record.facts["num_entries"] for record in merged)
    expected = sum(record.facts["num_entries"] for record in shards)
    if indexed != expected:
        raise IntegrityError(f"the shards hold {expected} entries, the merged parts {indexed}; nothing was published")
    if (
        sum(r.facts["row_id_checksum"] for r in merged) % 2**64
        != sum(r.facts["row_id_checksum"] for r in shards) % 2**64
    ):
        raise IntegrityError("the merged parts hold other row ids than the shards; nothing was published")
    return [part_ref(store, call[1] + ".json") for call in calls]


def part_ranges(
    context: RunContext, runs: list[CommitRecord], digest: str, pieces: list[CommitRecord]
) -> list[tuple[int, int]]:
    """Contiguous ranges of lists of about `index.part_bytes` each.

    Sized by entries times a mean size that depends on the corpus alone, not on how it was cut into shards: the
    boundaries are part of what is published.
    """
    readers = open_runs(context.store, runs, digest)
    nlist = runs[0].facts["num_lists"]
    list_bytes(readers, nlist)  # refuses a run over other lists
    sizes = sum((reader.list_sizes_L for reader in readers), np.zeros(nlist, np.int64))
    facts = runs[0].facts
    encoded_bytes = sum(record.objects["encoded"].size_bytes for record in pieces)
    encoded_rows = sum(record.facts["num_chunks"] for record in pieces)
    mean_bytes = encoded_bytes / encoded_rows + facts["code_size"] + 8
    return split_lists(sizes * mean_bytes, 0, context.config.index.part_bytes)


def _small_objects(
    context: RunContext,
    listing: Listing,
    pieces: list[CommitRecord],
    row_ids: RowIds,
    samples: list[CommitRecord],
    segment_name: str,
) -> dict[str, Any]:
    """Rejects, ledger and query sample of the version, as JSON of the manifest."""
    store, attempt = context.store, new_attempt()
    prefix = f"segments/{segment_name}"
    groups = ledger_groups(pieces)
    context.progress.stage("write ledger", total=len(groups))
    rejects = index_stages.write_rejects(store, f"{prefix}/rejects-{attempt}.parquet", pieces, row_ids.duplicates)
    calls = []
    for number, group in enumerate(groups):
        placed = [(pieces[i], row_ids.bases[i], row_ids.dropped.get(i, [])) for i in group]
        calls.append((store.url, f"{prefix}/documents-{attempt}-{number:05d}.parquet", placed))
    tables = context.tasks(index_stages.write_piece_documents, calls)
    counts: Counter[str] = Counter()
    for _, docs_of_source, _ in tables:
        counts.update(docs_of_source)
    left_out: Counter[str] = Counter()
    for _, _, rejects_of_source in tables:
        left_out.update(rejects_of_source)
    entries, first = [], 0
    for obj in listing.objects:
        num_docs = counts[obj.source]
        entries.append(SourceEntry(obj, num_docs + left_out[obj.source], first, num_docs))
        first += num_docs
    queries = lowest_queries(store, samples, context.config.index.query_sample)
    return {
        "rejects": rejects.to_json() if rejects else None,
        "documents": [table for table, _, _ in tables],
        "listing": write_sources(store, f"{prefix}/sources-{attempt}.parquet", entries).to_json(),
        "queries": write_table(store, f"{prefix}/queries-{attempt}.parquet", queries).to_json(),
    }


def ledger_groups(pieces: Sequence[CommitRecord]) -> list[list[int]]:
    """Numbers of consecutive pieces of together at most TABLE_DOCUMENTS documents (or one larger piece)."""
    return consecutive(pieces, TABLE_DOCUMENTS)


def _manifest(
    context: RunContext,
    sources: list[str],
    listing: Listing,
    pieces: list[CommitRecord],
    row_ids: RowIds,
    sizes: IndexSizes,
    trained: CommitRecord,
    entries: dict[str, Any],
    segment: Segment,
    current: Manifest | None,
) -> Manifest:
    quantizer = trained.objects["quantizer"]
    # Which of the documents did not fit in one sequence: they are in windows, or truncated (chunk.mode).
    lengths = {
        name: sum(record.facts[f"num_{name}"] for record in pieces) for name in ("over_length", "truncated_tokens")
    }
    rows = {
        "read": sum(record.facts["num_rows_read"] for record in pieces),
        "indexed": row_ids.num_docs,
        **{outcome: _left_out(pieces, row_ids, outcome) for outcome in ("rejected", "dropped")},
    }
    manifest = Manifest(
        **context.identity,
        parent=current.version if current else None,
        config=json.loads(json.dumps(context.config.to_json())),
        fingerprint=json.loads(json.dumps(context.fingerprint)),
        model={
            "name": context.spec.name,
            "given_as": context.config.encode.model,
            "revision": context.spec.revision,
            "fingerprint": context.spec.fingerprint,
            "precision": context.config.encode.precision,
            "prompts": {"query": context.spec.query_prompt, "document": context.spec.document_prompt},
            "parity": json.loads(context.store.read(context.parity_key)),
            **lengths,
            "batch_tokens": min(record.facts["batch_tokens"] for record in pieces),
            "vectormill": package_version("vectormill"),
        },
        metric=context.config.index.metric,
        d=sizes.d,
        nlist=sizes.nlist,
        M=sizes.M,
        nbits=sizes.nbits,
        ntotal=segment.num_rows,
        num_docs=row_ids.num_docs,
        rows=rows,
        sources={
            "arguments": sources,
            "digest": listing.digest,
            "num_objects": len(listing.objects),
            "size_bytes": sum(o.size_bytes for o in listing.objects),
            "ignored": len(listing.ignored),
            "listing": entries["listing"],
        },
        quantizer=quantizer.to_json(),
        queries=entries["queries"],
        segments=[segment],
        rejects=entries["rejects"],
        documents=entries["documents"],
        amended=None,
        quality={},
        content_digest="",
        assignment=trained.facts["assignment"],
    )
    return dataclasses.replace(manifest, content_digest=compute_content_digest(manifest))


def verify_candidate(context: RunContext, manifest: Manifest, segments: Sequence[Segment]) -> None:
    """Read everything that is new back before it can be published. Raises IntegrityError with all that is wrong.

    segments: those whose parts are new; the others were verified when their version was published.
    """
    threads = Threads(context.config.encode.threads_per_worker)
    context.progress.stage("verify", total=sum(len(s.parts) for s in segments) + 1)
    reports = {}
    for segment in segments:
        given = (manifest.quantizer_entry, manifest.list_assignment, dataclasses.replace(segment, parts=[]), threads)
        calls = [(context.store.url, ref, *given) for ref in segment.parts]
        reports[segment.name] = context.tasks(index_stages.check_part, calls, num_cpus=threads.count)
    problems = context.tasks(index_stages.check_candidate, [(context.store.url, manifest, reports)])[0]
    if problems:
        raise IntegrityError(f"the candidate is not what it should be, nothing was published: {'; '.join(problems)}")


def _measure(context: RunContext, manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    config = context.config
    quality, exact = recall.operating_point(context, manifest, exact_key(manifest))
    if quality["recall@10"] < config.index.min_recall:
        raise QualityError(
            f"recall@10 on the query sample must be at least {config.index.min_recall} (index.min_recall), got"
            f" {quality['recall@10']:.4f} at nprobe {quality['nprobe']} of {manifest.nlist}; nothing was published."
            " Raise index.M or index.refine_factor, or lower the bound, and run again: vectors are kept"
        )
    return quality, exact


def exact_key(manifest: Manifest) -> str:
    """A new key for the exact neighbours of the query sample, in the folder of the run that makes the version."""
    folder = manifest.sources["listing"]["key"].rsplit("/", 1)[0]
    return f"{folder}/exact-{new_attempt()}.parquet"


def _left_out(pieces: Sequence[CommitRecord], row_ids: RowIds, outcome: str) -> dict[str, int]:
    """Rows rejected or dropped by reason: in the pieces, and as duplicates across them (which have reasons of their own)."""
    return dict(sorted((sum_counts(pieces, outcome) | row_ids.duplicates.counts(outcome)).items()))
