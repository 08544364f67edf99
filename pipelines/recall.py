"""Recall of a version on its query sample: the operating point of a new quantizer, and what an update or a merge leaves of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.artifact.exact_neighbours import (
    KEPT,
    ExactNeighbours,
    exact_after_update,
    exact_neighbours,
    write_exact,
)
from operators.artifact.index import Index
from operators.artifact.manifest import Manifest
from operators.artifact.part_scan import Best, PartsToScan, best_of_groups, scan_groups, scan_parts
from operators.index_config import IndexConfig
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
from operators.storage.store import Store, open_store
from pipelines.index_stages import Threads
from pipelines.run_context import RunContext

PROBE_RECALL_K = 10
STUCK_GAIN = 0.001  # a doubling of nprobe that gains less recall than this: the codes are the limit
MAX_REFINE_GROWTH = 4


def measure_quality(
    store_url: str,
    manifest: Manifest,
    config: IndexConfig,
    threads: Threads,
    exact_key: str,
    scanned: Best | None,
    scan_threads: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Recall on the stored query sample, and the smallest nprobe (and refine factor) that reaches the target.

    Besides, as JSON, the entry of the object with the queries' exact neighbours, which is written at `exact_key`.
    scanned: what `scan_in_tasks` found; None: this task scans all rows. scan_threads: of the searches, they change nothing.

    nprobe doubles, then is bisected, until recall@10 against exact search over the stored vectors reaches `index.target_recall`. Where
    more lists no longer help, the codes are what limits it, and the refine factor doubles (up to 4 times).
    """
    threads.apply()
    store = open_store(store_url)
    index = Index(store, manifest, scan_threads=scan_threads)
    queries = query_sample(store, manifest)
    k = min(PROBE_RECALL_K, manifest.ntotal)
    exact = exact_neighbours(index, queries, scanned)
    refine, curve = config.refine_factor, []

    def recall_at(nprobe: int, refine_factor: int) -> float:
        found = index.search(queries, k, nprobe=nprobe, refine_factor=refine_factor).row_ids_Qk
        recall = intersection_recall(found, exact.first(k))
        curve.append({"nprobe": nprobe, "refine_factor": refine_factor, "recall@10": recall})
        return float(curve[-1]["recall@10"])

    too_few, nprobe, best = 0, 1, 0.0
    while (recall := recall_at(nprobe, refine)) < config.target_recall:
        stuck = recall - best < STUCK_GAIN and nprobe >= 8
        best = max(best, recall)
        if (stuck or nprobe == manifest.nlist) and refine < MAX_REFINE_GROWTH * config.refine_factor:
            refine *= 2
        elif nprobe < manifest.nlist:
            too_few, nprobe = nprobe, min(2 * nprobe, manifest.nlist)
        else:
            break
    else:
        # Between the last two powers of two, to an eighth: on a small index a doubling may be the whole of it.
        while nprobe - too_few > max(1, nprobe // 8):
            middle = (too_few + nprobe) // 2
            recall_in_between = recall_at(middle, refine)
            if recall_in_between >= config.target_recall:
                nprobe, recall = middle, recall_in_between
            else:
                too_few = middle
    quality = {
        "nprobe": nprobe,
        "refine_factor": refine,
        "recall@10": recall,
        "target_recall": config.target_recall,
        "queries": len(queries),
        "curve": curve,
    }
    return quality, write_exact(store, exact_key, exact).to_json()


def measure_recall(
    store_url: str,
    manifest: Manifest,
    queries_Qd: npt.NDArray[np.float32],
    parent: Manifest | None,
    threads: Threads,
    scanned: Best | None,
    scan_threads: int,
) -> tuple[float, ExactNeighbours] | None:
    """recall@10 against exact search over the live rows, at the version's nprobe and refine factor; and the exact neighbours.

    parent: the version that this one follows, with the same queries and row ids; None: they follow from a scan of all rows.
    scanned: what `scan_in_tasks` found in what the parent does not have, or without one in all; None: this task scans it.
    Returns None when nothing follows from the parent's neighbours, and a scan of all rows is work for several tasks.
    """
    threads.apply()
    index = Index(open_store(store_url), manifest, scan_threads=scan_threads)
    k = min(PROBE_RECALL_K, manifest.ntotal)
    if parent is None:
        exact = exact_neighbours(index, queries_Qd, scanned)
    else:
        carried = exact_after_update(index, queries_Qd, parent, k, scanned)
        if carried is None and count_scans(manifest):
            return None
        exact = carried or exact_neighbours(index, queries_Qd)
    return intersection_recall(index.search(queries_Qd, k).row_ids_Qk, exact.first(k)), exact


def operating_point(context: RunContext, manifest: Manifest, exact_key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stage "measure recall" of a version with a new quantizer: what `measure_quality` returns."""
    num_scans = count_scans(manifest)
    context.progress.stage("measure recall", total=num_scans + 1)
    scanned = scan_in_tasks(context, manifest, query_sample(context.store, manifest)) if num_scans else None
    threads = Threads(context.config.encode.threads_per_worker)
    scan_threads = threads_of_searches(context, manifest)
    call = (context.store.url, manifest, context.config.index, threads, exact_key, scanned, scan_threads)
    found: tuple[dict[str, Any], dict[str, Any]]
    (found,) = context.tasks(measure_quality, [call], num_cpus=max(threads.count, scan_threads))
    return found


def threads_of_searches(context: RunContext, manifest: Manifest) -> int:
    """All CPU slots of a node, as training has, where the rows are so many that tasks scan them; else 0, as many as an encoder."""
    if not count_scans(manifest):
        return 0
    return context.config.index.train_threads or max(1, int(context.session.node_cpus))


def count_scans(manifest: Manifest, from_row_id: int = 0) -> int:
    """Tasks of `scan_in_tasks`."""
    groups = len(scan_groups(manifest, from_row_id))
    return groups if groups > 1 else 0


def scan_in_tasks(
    context: RunContext, manifest: Manifest, queries_Qd: npt.NDArray[np.float32], from_row_id: int = 0
) -> Best | None:
    """The best entries of all live rows, or of the segments from a row id on: each group of parts is scanned by a task.

    None where there are not several: then the task that searches scans as well.
    """
    groups = scan_groups(manifest, from_row_id)
    if len(groups) <= 1:
        return None
    k = min(KEPT, sum(s.num_live for s in manifest.segments if s.first_row_id >= from_row_id))
    threads = Threads(context.config.encode.threads_per_worker)
    shared = (context.store.url, queries_Qd, k, manifest.metric, threads)
    found = context.tasks(scan, [(group,) for group in groups], shared=shared, num_cpus=threads.count)
    return best_of_groups(found, k)


def scan(
    store_url: str,
    queries_Qd: npt.NDArray[np.float32],
    k: int,
    metric: str,
    threads: Threads,
    group: Sequence[PartsToScan],
) -> Best:
    """The k best entries of a group of parts."""
    threads.apply()
    return scan_parts(open_store(store_url), group, queries_Qd, k, metric)


def query_sample(store: Store, manifest: Manifest) -> npt.NDArray[np.float32]:
    """Vectors float32 [Q, d] of the version's query sample."""
    table = read_table(store, ObjectEntry.from_json(manifest.queries), ["vector"])
    return np.array(table.column("vector").to_pylist(), np.float32).reshape(table.num_rows, manifest.d)


def intersection_recall(found_Qk: np.ndarray, exact_Qk: Sequence[np.ndarray] | np.ndarray) -> float:
    """Mean share of the exact top k that was found (`intersection` recall@k), order ignored."""
    hits = [len(np.intersect1d(f[f >= 0], e)) / len(e) for f, e in zip(found_Qk, exact_Qk, strict=True)]
    return float(np.mean(hits)) if hits else 1.0
