"""`report`: what a version is and how it was made, as plain facts; `report_page` draws them."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from operators.artifact.manifest import Manifest, Segment, read_part_records
from operators.errors import ConfigError, IndexNotFoundError
from operators.merger import open_runs
from operators.storage.store import Store, open_store
from pipelines.info import info
from pipelines.telemetry.run_record import read_run_record
from pipelines.versions import CANDIDATE, history, open_version

NUM_THREADS = 16
MAX_LIST_BINS = 48
TAIL = 99.5  # percentile beyond which list sizes share one bin


def report(root: str, version: str | None = None) -> dict[str, Any]:
    """Facts about a version (the published one for None) and the run that made it, as plain JSON.

    Those of `info` (`operating_points` among them), and `quality` with its `curve`; `lists` {"num_lists", "empty", "mean",
    "median", "largest", "imbalance", "histogram": {"low", "step", "counts", "beyond"}}, of all entries that the segments
    hold, deleted ones too; `bytes` by segment and role; `rows` with `reconciles`; `history`; `seconds` by stage; and `run`,
    the telemetry that was stored beside the manifest (docs/telemetry.md), None where there is none.
    Raises IndexNotFoundError, IntegrityError.
    """
    store = open_store(root)
    manifest = open_version(store, version)
    rows = manifest.rows
    left_out = sum(rows["rejected"].values()) + sum(rows["dropped"].values())
    facts = info(root, version)
    return {
        **facts,
        "rows": {**rows, "reconciles": rows["read"] == rows["indexed"] + left_out},
        "quality": manifest.quality,
        "run_id": manifest.run_id,
        "lists": list_facts(store, manifest),
        "segments": [
            {**said, "bytes": _bytes_by_role(segment)}
            for said, segment in zip(facts["segments"], manifest.segments, strict=True)
        ],
        "quantizer_bytes": manifest.quantizer["size_bytes"],
        "seconds": manifest.reports.get("seconds", {}),
        "encoded": manifest.reports.get("encoded"),
        "run": read_run_record(store, manifest.version) if version != CANDIDATE else None,
        "history": _history(root),
    }


def list_facts(store: Store, manifest: Manifest) -> dict[str, Any]:
    """How entries spread over the inverted lists; see `report`. Reads the lists' headers only."""
    sizes_L = np.zeros(manifest.nlist, np.int64)
    digest = manifest.quantizer["sha256"]
    records = read_part_records(store, [ref for segment in manifest.segments for ref in segment.parts])
    with ThreadPoolExecutor(NUM_THREADS) as pool:  # opening a run takes a few requests to the store
        for reader in pool.map(lambda record: open_runs(store, [record], digest, cache_bytes=1)[0], records):
            sizes_L[reader.first_list : reader.end_list] += reader.list_sizes_L
    total = int(sizes_L.sum())
    largest, high = int(sizes_L.max()), float(np.percentile(sizes_L, TAIL))
    high = largest if largest <= 2 * high else high
    num_bins = min(MAX_LIST_BINS, max(8, round(2 * manifest.nlist**0.5)))  # fewer where there are few lists to count
    step = max(1, int(np.ceil((high + 1) / num_bins)))
    counts = np.bincount(np.minimum(sizes_L // step, num_bins), minlength=num_bins + 1)
    used = int(np.flatnonzero(counts[:num_bins]).max(initial=0)) + 1
    return {
        "num_lists": manifest.nlist,
        "entries": total,
        "empty": int((sizes_L == 0).sum()),
        "mean": total / manifest.nlist,
        "median": float(np.median(sizes_L)),
        "largest": largest,
        # As faiss counts it: how much longer a random entry's list is than lists of equal sizes were.
        "imbalance": float(manifest.nlist * (sizes_L.astype(float) ** 2).sum() / max(1, total) ** 2),
        "histogram": {"low": 0, "step": step, "counts": counts[:used].tolist(), "beyond": int(counts[num_bins])},
    }


def _bytes_by_role(segment: Segment) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in segment.parts:
        for role, size_bytes, _ in part.content:
            found[role] = found.get(role, 0) + int(size_bytes)
    return found


def _history(root: str) -> list[dict[str, Any]]:
    """All versions, the oldest first; none where only a candidate is kept."""
    with contextlib.suppress(IndexNotFoundError):
        return list(history(root)["versions"])
    return []


def write_report(facts: dict[str, Any], path: str) -> int:
    """Write the page of the facts to a file; its size in bytes. Raises ConfigError when its folder does not exist."""
    from pipelines.report_page.page import page

    target = Path(path)
    if not target.parent.is_dir():
        raise ConfigError(f"the folder of the report must exist, got {path!r} (--out)")
    text = page(facts).encode()
    target.write_bytes(text)
    return len(text)
