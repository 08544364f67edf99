"""Runs at an index root: begin one or go on with an unfinished one, and tidy up after it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from operators.artifact.manifest import check_current
from operators.errors import ConfigError, FencedError, FingerprintError, IntegrityError, VectormillError
from operators.settings import differing_fields
from operators.storage.commits import seal, unseal
from operators.storage.fencing import Epoch
from operators.storage.store import Store

UNKNOWN_KIND = "unknown"
RUN_FILE = "run.json"  # by which a later build finds the run


@dataclass(frozen=True)
class Run:
    """A run's place in the store and what its pieces are made with."""

    run_id: str
    fingerprint: dict[str, Any]
    resumed: bool
    kind: str = "build"  # or update, compact: a run is only resumed by its own kind

    @property
    def prefix(self) -> str:
        return f"runs/{self.run_id}"


def unfinished_runs(store: Store) -> list[Run]:
    """All runs whose work lies at the root, the oldest first."""
    runs = []
    for key in store.list_keys("runs"):
        if key.endswith(f"/{RUN_FILE}") and key.count("/") == 2:
            try:
                body = unseal(store.read(key), f"{store.url}/{key}")
            except FileNotFoundError:  # it ended since it was listed
                continue
            runs.append(Run(body["run_id"], body["fingerprint"], resumed=True, kind=body.get("kind", "build")))
    return runs


def run_kind(store: Store, run_id: str) -> str:
    """The command that the run is of; UNKNOWN_KIND for one whose file is damaged or just went."""
    try:
        key = f"runs/{run_id}/{RUN_FILE}"
        return str(unseal(store.read(key), f"{store.url}/{key}").get("kind", "build"))
    except (FileNotFoundError, IntegrityError):
        return UNKNOWN_KIND


def is_outdated(store: Store, run_id: str, version: str) -> bool:
    """Whether the run can only be of use for another version than the published one."""
    return any(
        run.run_id == run_id and run.fingerprint.get("version", version) != version for run in unfinished_runs(store)
    )


def begin_or_resume(
    store: Store, fingerprint: dict[str, Any], sources: list[str], finished: set[str], kind: str = "build"
) -> Run:
    """The unfinished run of this kind at the root, or a new one. `finished`: ids of published runs, never resumed.

    Raises FingerprintError naming the fields in which the unfinished run differs from what is asked for.
    """
    candidates = [run for run in unfinished_runs(store) if run.run_id not in finished and run.kind == kind]
    if candidates:
        run = candidates[-1]
        differing = differing_fields(run.fingerprint, json.loads(json.dumps(fingerprint)))
        if differing:
            raise FingerprintError(
                f"an unfinished {kind} at {store.url} ({run.run_id}) was made with other settings: {'; '.join(differing)}."
                " Use its settings to resume it, or --fresh to discard its work and begin anew"
            )
        return run
    run = Run(f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}", fingerprint, False, kind)
    body = {"run_id": run.run_id, "kind": kind, "fingerprint": fingerprint, "sources": sources}
    store.put(f"{run.prefix}/{RUN_FILE}", seal(body))
    return run


def check_run_kept(store: Store, run: Run) -> None:
    """Raise FencedError when gc has removed the run. Call it after taking the epoch: see pipelines/garbage.py."""
    if store.size_bytes(f"{run.prefix}/{RUN_FILE}") is None:
        raise FencedError(
            f"run {run.run_id} at {store.url} was removed by gc, or by a process that had nothing to publish, before this one took it over; run the command again"
        )


@contextmanager
def told_as_lost(store: Store, epoch: Epoch, tag: str | None) -> Iterator[None]:
    """A run that fails because another one took the root over, and tidied up, says so: FencedError in place of what it missed.

    `tag`: CURRENT's when the run began.
    """
    try:
        yield
    except FencedError:
        raise
    except (VectormillError, FileNotFoundError) as error:
        lost = _why_lost(store, epoch, tag)
        if lost is None:
            raise
        raise lost from error


def _why_lost(store: Store, epoch: Epoch, tag: str | None) -> FencedError | None:
    try:
        epoch.check(store)
        check_current(store, epoch, tag)
    except FencedError as lost:
        return lost
    except Exception:  # the storage fails: the error that is on its way says that
        return None
    return None


@contextmanager
def forgotten_if_refused(store: Store, run: Run) -> Iterator[None]:
    """A run that is refused for its settings before it has done anything is no unfinished work: mended ones differ."""
    try:
        yield
    except ConfigError:
        if not run.resumed and not store.list_keys(f"{run.prefix}/pieces"):
            store.delete_tree(run.prefix)
        raise


def discard_unpublished(store: Store, run: Run, epoch: Epoch) -> None:
    """Delete the work of a run that ends without publishing. Raises FencedError when another process goes on with it.

    First the file by which others find the run. Whoever took the epoch before that may work on it and publish it; whoever
    takes it later finds in `check_run_kept` that the run is gone.
    """
    store.delete(f"{run.prefix}/{RUN_FILE}")
    epoch.check(store)
    store.delete_tree(run.prefix)
    store.delete_many([key for key in store.list_keys("segments") if key.startswith(f"segments/{run.run_id}-")])


def discard_run(store: Store, run_id: str) -> None:
    """Delete the work of a run, first the file by which a build would find what is left of it."""
    store.delete(f"runs/{run_id}/{RUN_FILE}")
    store.delete_tree(f"runs/{run_id}")


def discard_unfinished(store: Store, kind: str | None = None) -> None:
    """Delete the work of all runs, or of all of one kind (--fresh, after taking the epoch)."""
    for run_id in sorted({key.split("/")[1] for key in store.list_keys("runs")}):
        if kind is None or run_kind(store, run_id) in (kind, UNKNOWN_KIND):
            discard_run(store, run_id)
