"""`drift`: whether the published version still fits what is in it, and what to do about it: nothing, compact or retrain."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.artifact.index import Index
from operators.artifact.manifest import Manifest, open_current
from operators.artifact.quantizer import read_quantizer
from operators.drift import SampledSegment, code_error, spread
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
from operators.storage.store import Store, open_store
from operators.trainer import PQ_TRAIN_POINTS
from pipelines.compact import trained_rows
from pipelines.gate import MAX_RECALL_LOSS
from pipelines.recall import PROBE_RECALL_K
from pipelines.telemetry.progress import RunProgress

SAMPLED_ROWS = 4_096  # of the base, and as many of all deltas: the mean error is then known to about one percent
SAMPLE_SEED = 20_601
# Recall is measured anew where the stored vectors are no more than this: exact search reads them all.
EXACT_BYTES = 1 << 30

# A segment costs every search a scan of its own. A month of nights is far below the 100 that are tested, and a
# compaction then costs less a night than an update.
MAX_DELTAS = 30
# Deleted rows are scanned and dropped again, and are asked for beyond the wanted hits: at a fifth a search does about a
# quarter more work than it has to.
MAX_DELETED_SHARE = 0.2
# A quantizer fits the rows it was trained on better than others of their kind: with made-up clustered vectors (d 96) of
# one kind the deltas' error was 2.9, 1.6, 1.26 and 1.09 times the base's for a base of 600, 2,000, 10,000 and 40,000 rows, with
# half of the deltas of another kind 3.1, 2.0, 3.4 and 3.2 times. So small bases are judged by recall alone.
MAX_ERROR_RATIO = 1.5
MIN_TRAINED_ROWS = PQ_TRAIN_POINTS[0]
# Of few rows, whatever their error or their lists, recall as a whole depends little.
MIN_DELTA_SHARE = 0.05
# nlist follows the square root of the rows (index_config.default_nlist): at four times as many rows it is half of what
# a build would choose, and every probed list is twice as long.
MAX_GROWTH = 4.0
# A probed list is on average longer than one of equal lists by the imbalance. Of the whole version against the base alone:
# deltas about one subject lie in few lists, which matters once they are so many that searches scan half as much again.
MAX_IMBALANCE_RATIO = 1.5


def drift(root: str, *, progress: RunProgress | None = None) -> dict[str, Any]:
    """What `version_drift` says of the published version. Raises IndexNotFoundError, IntegrityError."""
    started = time.monotonic()
    with progress or RunProgress(quiet=True) as shown:
        store = open_store(root)
        manifest = open_current(store)
        shown.stage("drift", total=1)
        facts = version_drift(store, manifest)
    return {"root": root, **facts, "seconds": time.monotonic() - started}


def version_drift(store: Store, manifest: Manifest) -> dict[str, Any]:
    """How the deltas differ from the base, and a recommendation, as plain JSON. Reads samples; deterministic.

    {"version", "ntotal", "deltas", "delta_rows", "deleted_rows", "deleted_share", "trained_rows", "growth", "imbalance", "base",
    "delta", "recall", "recommendation", "reason"}. `base` and `delta` are {"rows", "squared_error", "relative_error", "sampled_rows",
    "imbalance", "empty_lists"}; `delta` is of all deltas together, None without any. `recall` says at which operating point, how it was measured,
    and what it was when the quantizer was trained.
    """
    quantizer = read_quantizer(store, manifest.quantizer_entry)
    segments = [SampledSegment(store, segment) for segment in manifest.segments]

    def side(chosen: list[SampledSegment]) -> dict[str, Any]:
        error = code_error(quantizer, chosen, SAMPLED_ROWS, SAMPLE_SEED)
        lists = spread(_list_sizes(manifest, chosen))
        return {
            "rows": lists.num_entries,
            "sampled_rows": error.num_rows if error else 0,
            "squared_error": error.squared_error if error else None,
            "relative_error": error.relative_error if error else None,
            "imbalance": lists.imbalance,
            "empty_lists": lists.empty_share,
        }

    deleted = sum(segment.num_deleted for segment in manifest.segments)
    held = manifest.ntotal + deleted
    facts: dict[str, Any] = {
        "version": manifest.version,
        "ntotal": manifest.ntotal,
        "deltas": len(segments) - 1,
        "delta_rows": sum(segment.num_live for segment in manifest.segments[1:]),
        "deleted_rows": deleted,
        "deleted_share": deleted / max(1, held),
        "trained_rows": trained_rows(manifest),
        "growth": manifest.ntotal / max(1, trained_rows(manifest)),
        "imbalance": spread(_list_sizes(manifest, segments)).imbalance,
        "base": side(segments[:1]),
        "delta": side(segments[1:]) if len(segments) > 1 else None,
        "recall": _recall(store, manifest),
    }
    what, reason = recommendation(facts)
    return {**facts, "recommendation": what, "reason": reason}


def _list_sizes(manifest: Manifest, segments: Sequence[SampledSegment]) -> npt.NDArray[np.int64]:
    """Entries of each list over the segments, int64 [nlist]."""
    return sum((each.list_sizes_L for each in segments), np.zeros(manifest.nlist, np.int64))


def _recall(store: Store, manifest: Manifest) -> dict[str, Any]:
    """recall@10 at the stored operating point: over all live rows, and of those neighbours that lie in the deltas."""
    quality = manifest.quality
    found: dict[str, Any] = {
        "nprobe": quality["nprobe"],
        "refine_factor": quality["refine_factor"],
        "recall@10": quality["recall@10"],
        "delta_recall@10": None,
        "trained_recall@10": quality.get("trained_recall@10", quality["recall@10"]),
        "measured": "when the version was published, against exact search over all live rows",
    }
    if not manifest.ntotal or 2 * manifest.d * (manifest.next_row_id) > EXACT_BYTES:
        return found
    index = Index(store, manifest)
    stored = read_table(store, ObjectEntry.from_json(manifest.queries), ["vector"])
    queries = np.array(stored.column("vector").to_pylist(), np.float32).reshape(stored.num_rows, manifest.d)
    k = min(PROBE_RECALL_K, manifest.ntotal)
    exact, hits = index.exact_search(queries, k), index.search(queries, k)
    was_found = np.array([np.isin(e, f) for e, f in zip(exact.row_ids_Qk, hits.row_ids_Qk, strict=True)])
    in_deltas = exact.row_ids_Qk >= manifest.segments[0].num_rows
    return {
        **found,
        "recall@10": float(was_found.mean()) if was_found.size else 1.0,
        "delta_recall@10": float(was_found[in_deltas].mean()) if in_deltas.any() else None,
        "measured": "now, against exact search over all live rows",
    }


def recommendation(facts: dict[str, Any]) -> tuple[str, str]:
    """(nothing, compact or retrain, why in a sentence with numbers) for what `version_drift` found."""
    base, delta, recall = facts["base"], facts["delta"], facts["recall"]
    delta_share = facts["delta_rows"] / max(1, facts["ntotal"])
    lost = recall["trained_recall@10"] - recall["recall@10"]
    if lost > MAX_RECALL_LOSS:
        return "retrain", (
            f"recall@10 is {recall['recall@10']:.4f}, {lost:.4f} under the {recall['trained_recall@10']:.4f} that it was when the"
            f" quantizer was trained (more than {MAX_RECALL_LOSS:g})"
        )
    if facts["growth"] >= MAX_GROWTH:
        return "retrain", (
            f"{facts['ntotal']:,} rows are searched with a quantizer trained for {facts['trained_rows']:,}: {facts['growth']:.1f} times"
            f" as many (from {MAX_GROWTH:g} on lists are twice as long as those of a new quantizer)"
        )
    if delta is not None and delta_share >= MIN_DELTA_SHARE:
        judged = facts["trained_rows"] >= MIN_TRAINED_ROWS and delta["squared_error"] is not None
        if judged and base["squared_error"]:
            ratio = delta["squared_error"] / base["squared_error"]
            if ratio >= MAX_ERROR_RATIO:
                return "retrain", (
                    f"the codes of the deltas' rows ({delta_share:.0%} of all) have {ratio:.2f} times the squared error of the base's"
                    f" (from {MAX_ERROR_RATIO:g} on)"
                )
        ratio = facts["imbalance"] / max(base["imbalance"], 1.0)
        if ratio >= MAX_IMBALANCE_RATIO:
            return "retrain", (
                f"the deltas' rows ({delta_share:.0%} of all) crowd into few lists: the imbalance of all is {facts['imbalance']:.2f},"
                f" that of the base alone {base['imbalance']:.2f} (from {MAX_IMBALANCE_RATIO:g} times on)"
            )
    if facts["deltas"] >= MAX_DELTAS:
        return "compact", f"there are {facts['deltas']} deltas (from {MAX_DELTAS} on each search pays for them)"
    if facts["deleted_share"] >= MAX_DELETED_SHARE:
        return "compact", (
            f"{facts['deleted_rows']:,} rows, {facts['deleted_share']:.0%} of those stored, are deleted and searched over"
            f" (from {MAX_DELETED_SHARE:.0%} on)"
        )
    return "nothing", (
        f"{facts['deltas']} delta(s) with {delta_share:.1%} of the rows, {facts['deleted_share']:.1%} deleted, recall@10"
        f" {recall['recall@10']:.4f}: all within their bounds"
    )
