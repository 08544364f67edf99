"""`compact`: all segments of the published version become one, without the deleted rows; nothing is encoded again.

    count live rows -> merge ranges of lists of all segments -> ledger with the new row ids -> verify, measure -> publish

With `retrain` the stored vectors are quantized anew in between: sample -> train -> shards -> parts.
Every step commits its units; running compact again does only what is missing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.preflight import check_environment
from operators.artifact.manifest import Manifest, fence_current, open_published
from operators.errors import ConfigError
from operators.fingerprint import index_fingerprint
from operators.settings import differing_fields
from operators.storage.fencing import Epoch, take_epoch
from operators.storage.store import Store, open_store
from pipelines import recall
from pipelines.candidate_quality import measured
from pipelines.compact_candidate import KIND, build_compacted
from pipelines.config import RunConfig, config_of_version
from pipelines.gate import gate
from pipelines.index_build import exact_key, verify_candidate
from pipelines.publication import finish_published, publish_version
from pipelines.run_context import RunContext, epoch_watch, open_session
from pipelines.runs import Run, begin_or_resume, check_run_kept, discard_run, told_as_lost, unfinished_runs
from pipelines.telemetry.progress import RunProgress

# So many rows are merged in this process sooner than Ray and its workers start.
IN_PROCESS_ROWS = 200_000


@dataclass(frozen=True)
class CompactResult:
    """What a compaction did. `manifest` is of the version that is published now, `before` of the one it started from."""

    manifest: Manifest
    before: Manifest
    published: bool  # False: there was nothing to do
    seconds: dict[str, float]


def compact(
    root: str,
    configure: Callable[[RunConfig], RunConfig] = lambda config: config,
    *,
    retrain: bool = False,
    min_recall: float | None = None,
    fresh: bool = False,
    progress: RunProgress | None = None,
) -> CompactResult:
    """Merge the published version's segments into one, drop deleted rows, publish; or go on with what was interrupted.

    Answers stay the same. With `retrain` the vectors get a new quantizer, of sizes chosen for them as they are now, and
    nprobe is measured again. configure: from the version's settings to those of the run. min_recall: bound of the
    gate; None: `index.min_recall` for a new quantizer, and none for a merge, which changes no code; in both cases
    recall@10 must not fall by more than gate.MAX_RECALL_LOSS.
    Raises a VectormillError (see operators/errors.py); what was committed until then is kept, and CURRENT is as it was.
    """
    with progress or RunProgress(quiet=True) as shown:
        check_environment()
        store = open_store(root)
        parent, digest = open_published(store)
        config = configure(config_of_version(parent.config))
        finished = finish_published(store, parent)
        finished = finished if finished is not None and finished.kind == KIND else None
        if not retrain and is_compact(parent):
            return CompactResult(parent, parent, finished is not None, shown.stages)
        if finished is not None and finished.fingerprint["retrain"] and retrain:
            return CompactResult(parent, parent, True, shown.stages)
        _check(parent, config, retrain)
        run, epoch, tag = _begin(store, parent, digest, config, retrain, fresh)
        is_small = parent.ntotal <= IN_PROCESS_ROWS
        with told_as_lost(store, epoch, tag), open_session(config.cluster, shown, is_small=is_small) as session:
            context = RunContext(store, config, run, epoch, session, shown, epoch_watch(store, epoch))
            candidate = build_compacted(context, parent, retrain)
            candidate = _measured(context, parent, candidate, retrain)
            candidate = dataclasses.replace(candidate, reports={**parent.reports, "seconds": dict(shown.stages)})
            least = min_recall if min_recall is not None else config.index.min_recall if retrain else 0.0
            gate(store, candidate, parent.quality["recall@10"], least)
            publish_version(context, candidate, tag)
        return CompactResult(candidate, parent, True, shown.stages)


def is_compact(manifest: Manifest) -> bool:
    """Whether there is nothing to merge or to drop."""
    return len(manifest.segments) == 1 and not manifest.segments[0].num_deleted and manifest.amended is None


def _check(parent: Manifest, config: RunConfig, retrain: bool) -> None:
    """Raise ConfigError for settings that a compaction cannot change, and where there is no row to keep."""
    was, asked = config_of_version(parent.config).semantic(), config.semantic()
    free = {name for name in asked if retrain and name.startswith("index.")} - {"index.metric"} | {"index.part_bytes"}
    differing = differing_fields(
        {name: value for name, value in was.items() if name not in free},
        {name: value for name, value in asked.items() if name not in free},
    )
    if differing:
        raise ConfigError(
            f"a compaction keeps the settings that version {parent.version} was made with, got {'; '.join(differing)}: leave them"
            f" out, or build the index again{'' if retrain else ' (--retrain may change those of the index, but its metric)'}"
        )
    if not parent.ntotal:
        raise ConfigError(f"version {parent.version} has no live row that could be kept; build the index again")


def _begin(
    store: Store, parent: Manifest, digest: str, config: RunConfig, retrain: bool, fresh: bool
) -> tuple[Run, Epoch, str | None]:
    """The run to go on with, or a new one. Work on another version, or for other settings, is of no use and discarded."""
    asked: dict[str, Any] = {"version": parent.version, "manifest": digest, "retrain": retrain}
    asked |= index_fingerprint({}, config.semantic("index"))
    asked = json.loads(json.dumps(asked))
    others = [run for run in unfinished_runs(store) if run.kind == KIND and (fresh or run.fingerprint != asked)]
    if others:
        take_epoch(store, "discard")
        for run in others:
            discard_run(store, run.run_id)
    run = begin_or_resume(store, asked, [], {parent.run_id}, KIND)
    epoch = take_epoch(store, run.run_id)
    tag = fence_current(store, epoch, digest)
    check_run_kept(store, run)
    return run, epoch, tag


def _measured(context: RunContext, parent: Manifest, candidate: Manifest, retrain: bool) -> Manifest:
    """The candidate, verified, with its quality: at the parent's operating point, or with `retrain` at one measured anew.

    Either says of how many rows the quantizer was trained (`trained_rows`): growth since then is what `drift` looks at.
    """
    if not retrain:
        found = measured(context, parent, candidate, candidate.segments, []).candidate
        return dataclasses.replace(found, quality={**found.quality, "trained_rows": trained_rows(parent)})
    verify_candidate(context, candidate, candidate.segments)
    quality, exact = recall.operating_point(context, candidate, exact_key(candidate))
    return dataclasses.replace(candidate, exact=exact, quality={**quality, "trained_rows": candidate.ntotal})


def trained_rows(manifest: Manifest) -> int:
    """Rows that the version's quantizer was trained for: those of the base, unless a compaction has enlarged it since."""
    return int(manifest.quality.get("trained_rows", manifest.segments[0].num_rows))
