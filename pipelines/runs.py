"""Runs at an index root: begin one or go on with an unfinished one, and tidy up after it."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

from operators.errors import FencedError, FingerprintError
from operators.settings import differing_fields
from operators.storage.commits import seal, unseal
from operators.storage.store import Store

RUN_FILE = "run.json"  # by which a later build finds the run


@dataclass(frozen=True)
class Run:
    """A run's place in the store and what its pieces are made with."""

    run_id: str
    fingerprint: dict[str, Any]
    resumed: bool

    @property
    def prefix(self) -> str:
        return f"runs/{self.run_id}"


def unfinished_runs(store: Store) -> list[Run]:
    """All runs whose work lies at the root, the oldest first."""
    runs = []
    for key in store.list_keys("runs"):
        if key.endswith(f"/{RUN_FILE}") and key.count("/") == 2:
            body = unseal(store.read(key), f"{store.url}/{key}")
            runs.append(Run(body["run_id"], body["fingerprint"], resumed=True))
    return runs


def begin_or_resume(store: Store, fingerprint: dict[str, Any], sources: list[str], finished: set[str]) -> Run:
    """The unfinished run at the root, or a new one. `finished`: ids of published runs, never resumed.

    Raises FingerprintError naming the fields in which the unfinished run differs from what is asked for.
    """
    candidates = [run for run in unfinished_runs(store) if run.run_id not in finished]
    if candidates:
        run = candidates[-1]
        differing = differing_fields(run.fingerprint, json.loads(json.dumps(fingerprint)))
        if differing:
            raise FingerprintError(
                f"an unfinished run at {store.url} ({run.run_id}) was made with other settings: {'; '.join(differing)}."
                " Use its settings to resume it, or --fresh to discard its work and begin anew"
            )
        return run
    run = Run(f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}", fingerprint, resumed=False)
    body = {"run_id": run.run_id, "fingerprint": fingerprint, "sources": sources}
    store.put(f"{run.prefix}/{RUN_FILE}", seal(body))
    return run


def check_run_kept(store: Store, run: Run) -> None:
    """Raise FencedError when gc has removed the run. Call it after taking the epoch: see pipelines/garbage.py."""
    if store.size_bytes(f"{run.prefix}/{RUN_FILE}") is None:
        raise FencedError(
            f"run {run.run_id} at {store.url} was removed by gc before this build took it over; run the build again"
        )


def discard_run(store: Store, run_id: str) -> None:
    """Delete the work of a run, first the file by which a build would find what is left of it."""
    store.delete(f"runs/{run_id}/{RUN_FILE}")
    store.delete_tree(f"runs/{run_id}")


def discard_unfinished(store: Store) -> None:
    """Delete the work of all runs (--fresh, after taking the epoch)."""
    for run in unfinished_runs(store):
        discard_run(store, run.run_id)


def sweep_segment(store: Store, segment_prefix: str, referenced: set[str]) -> None:
    """Delete what lost attempts left beside the published objects of a segment."""
    for key in store.list_keys(segment_prefix):
        if key not in referenced:
            store.delete(key)
