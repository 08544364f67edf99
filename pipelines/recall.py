"""Recall of a version on its query sample: the operating point of a new quantizer, and what an update or a merge leaves of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.artifact.exact_neighbours import (
    ExactNeighbours,
    exact_after_update,
    exact_neighbours,
    write_exact,
)
from operators.artifact.index import Index
from operators.artifact.manifest import Manifest
from operators.index_config import IndexConfig
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
from operators.storage.store import open_store
from pipelines.index_stages import Threads

PROBE_RECALL_K = 10
STUCK_GAIN = 0.001  # a doubling of nprobe that gains less recall than this: the codes are the limit
MAX_REFINE_GROWTH = 4


def measure_quality(
    store_url: str, manifest: Manifest, config: IndexConfig, threads: Threads, exact_key: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Recall on the stored query sample, and the smallest nprobe (and refine factor) that reaches the target.

    Besides, as JSON, the entry of the object with the queries' exact neighbours, which is written at `exact_key`.

    nprobe doubles, then is bisected, until recall@10 against exact search over the stored vectors reaches `index.target_recall`. Where
    more lists no longer help, the codes are what limits it, and the refine factor doubles (up to 4 times).
    """
    threads.apply()
    store = open_store(store_url)
    index = Index(store, manifest)
    table = read_table(store, ObjectEntry.from_json(manifest.queries))
    queries = np.array(table.column("vector").to_pylist(), np.float32).reshape(table.num_rows, manifest.d)
    k = min(PROBE_RECALL_K, manifest.ntotal)
    exact = exact_neighbours(index, queries)
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
    store_url: str, manifest: Manifest, queries_Qd: npt.NDArray[np.float32], parent: Manifest | None, threads: Threads
) -> tuple[float, ExactNeighbours]:
    """recall@10 against exact search over the live rows, at the version's nprobe and refine factor; and the exact neighbours.

    parent: the version that this one follows, with the same queries and row ids; None: scan everything.
    """
    threads.apply()
    index = Index(open_store(store_url), manifest)
    k = min(PROBE_RECALL_K, manifest.ntotal)
    exact = exact_after_update(index, queries_Qd, parent, k) if parent is not None else None
    exact = exact or exact_neighbours(index, queries_Qd)
    return intersection_recall(index.search(queries_Qd, k).row_ids_Qk, exact.first(k)), exact


def intersection_recall(found_Qk: np.ndarray, exact_Qk: Sequence[np.ndarray] | np.ndarray) -> float:
    """Mean share of the exact top k that was found (`intersection` recall@k), order ignored."""
    hits = [len(np.intersect1d(f[f >= 0], e)) / len(e) for f, e in zip(found_Qk, exact_Qk, strict=True)]
    return float(np.mean(hits)) if hits else 1.0
