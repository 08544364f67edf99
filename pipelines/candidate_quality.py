"""Before an update or a merge is published: everything new is read back, and recall is measured on the fixed query sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from operators.artifact.exact_neighbours import ExactNeighbours, write_exact
from operators.artifact.manifest import Manifest, Segment
from pipelines import recall as recall_tasks
from pipelines.index_build import exact_key, verify_candidate
from pipelines.index_stages import Threads
from pipelines.run_context import RunContext
from pipelines.search import encode_queries


@dataclass(frozen=True)
class Measured:
    """A candidate with its quality, and what the gate compares: recall@10 of it and of its parent on the same queries."""

    candidate: Manifest
    recall: float
    parent_recall: float


def measured(
    context: RunContext, parent: Manifest, candidate: Manifest, new: Sequence[Segment], queries: Sequence[str]
) -> Measured:
    """Verify what is new, and measure recall on the stored query sample.

    queries: texts that the gate measures with in place of the sample; the parent is then measured with them too, and the
    manifest says both. Raises IntegrityError with all that is wrong in the candidate.
    """
    verify_candidate(context, candidate, new)
    since = parent if candidate.kind == "update" else None
    num_tasks = 1 + recall_tasks.count_scans(candidate, since.next_row_id if since else 0)
    if queries:
        num_tasks += 2 + sum(recall_tasks.count_scans(manifest) for manifest in (candidate, parent))
    context.progress.stage("measure recall", total=num_tasks)
    vectors = recall_tasks.query_sample(context.store, candidate)
    recall, exact = _recall(context, candidate, vectors, since)
    entry = write_exact(context.store, exact_key(candidate), exact)
    parent_recall = float(parent.quality["recall@10"])
    point = {name: parent.quality[name] for name in ("nprobe", "refine_factor")}
    quality = {
        **parent.quality,
        "recall@10": recall,
        "queries": len(vectors),
        "curve": [{**point, "recall@10": recall}],
    }
    quality.setdefault("trained_recall@10", parent.quality["recall@10"])
    quality.pop("given_queries", None)
    found = dataclasses.replace(candidate, quality=quality, exact=entry.to_json())
    if not queries:
        return Measured(found, recall, parent_recall)
    given = encode_queries(candidate, queries, context.config.encode.model)
    recall, _ = _recall(context, candidate, given, None)
    parent_recall, _ = _recall(context, parent, given, None)
    quality["given_queries"] = {"queries": len(given), "recall@10": recall, "parent_recall@10": parent_recall}
    return Measured(found, recall, parent_recall)


def _recall(
    context: RunContext, manifest: Manifest, queries_Qd: npt.NDArray[np.float32], parent: Manifest | None
) -> tuple[float, ExactNeighbours]:
    threads = Threads(context.config.encode.threads_per_worker)
    scanned = recall_tasks.scan_in_tasks(context, manifest, queries_Qd, parent.next_row_id if parent else 0)
    scan_threads = recall_tasks.threads_of_searches(context, manifest)
    call = (context.store.url, manifest, queries_Qd, parent, threads, scanned, scan_threads)
    found: tuple[float, ExactNeighbours] | None
    (found,) = context.tasks(recall_tasks.measure_recall, [call], num_cpus=max(threads.count, scan_threads))
    if found is not None:
        return found
    context.progress.stage("measure recall", total=1 + recall_tasks.count_scans(manifest))
    return _recall(context, manifest, queries_Qd, None)
