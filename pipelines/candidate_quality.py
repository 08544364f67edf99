"""Before an update or a merge is published: everything new is read back, and recall is measured on the fixed query sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from operators.artifact.exact_neighbours import ExactNeighbours, write_exact
from operators.artifact.manifest import Manifest, Segment
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
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
    context.progress.stage("measure recall", total=3 if queries else 1)
    stored = read_table(context.store, ObjectEntry.from_json(candidate.queries), ["vector"])
    vectors = np.array(stored.column("vector").to_pylist(), np.float32).reshape(stored.num_rows, candidate.d)
    recall, exact = _recall(context, candidate, vectors, parent if candidate.kind == "update" else None)
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
    call = (context.store.url, manifest, queries_Qd, parent, threads)
    found: tuple[float, ExactNeighbours]
    (found,) = context.tasks(recall_tasks.measure_recall, [call], num_cpus=threads.count)
    return found
