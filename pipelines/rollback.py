"""`rollback`: CURRENT goes back to an earlier version, or forward to a later one, in one step that fences builds off."""

from __future__ import annotations

import time
from typing import Any

from operators.artifact.manifest import CURRENT_KEY, fence_current, publish
from operators.crash_points import crash_point
from operators.errors import ConfigError, IndexNotFoundError, IntegrityError
from operators.storage.commits import unseal
from operators.storage.fencing import take_epoch
from operators.storage.store import Store, open_store
from pipelines.announcements import pinned
from pipelines.runs import discard_run
from pipelines.telemetry.progress import RunProgress
from pipelines.verify import verify
from pipelines.versions import check_whole, hold


def rollback(
    root: str, version: str | None = None, *, full: bool = False, progress: RunProgress | None = None
) -> dict[str, Any]:
    """{"root", "version", "before", "changed", "epoch", "checked", "seconds"}: CURRENT names `version`, by default the parent.

    Before that the version is checked: manifest and part records by checksum, all objects by size; with `full` every byte,
    as `verify` does. The swap takes a new epoch, so a build that runs meanwhile ends as the loser and publishes
    nothing. `before` is None where CURRENT was damaged or missing: with a named `version` it is written anew.
    Raises IndexNotFoundError (nothing published, no such version), ConfigError (no parent), IntegrityError (the version is
    not whole, or gc is removing it), FencedError (another run published, or took the root). CURRENT is then as it was.
    """
    started = time.monotonic()
    with progress or RunProgress(quiet=True) as shown:
        store = open_store(root)
        before, digest = _current(store, lenient=version is not None)
        target = version if version is not None else _parent(store, before)
        facts = {"root": root, "version": target, "before": before, "changed": False, "epoch": None, "checked": "light"}
        if target == before:
            return {**facts, "checked": None, "seconds": time.monotonic() - started}
        shown.stage("check version", total=1)
        with pinned(store, target):
            held = check_whole(store, target)
            assert held.manifest is not None
            if full:
                _check_every_byte(root, target)
            shown.stage("publish", total=1)
            epoch = take_epoch(store, f"rollback-to-{target}")
            tag = fence_current(store, epoch, digest)
            crash_point("rollback.after_epoch")
            _finish_run_of(store, before)
            publish(store, held.manifest, held.digest, epoch, tag)
    checked = "full" if full else "light"
    return {
        **facts,
        "changed": True,
        "epoch": epoch.number,
        "checked": checked,
        "seconds": time.monotonic() - started,
    }


def _current(store: Store, *, lenient: bool) -> tuple[str | None, str | None]:
    """The published version and its manifest's digest. `lenient`: (None, None) when CURRENT is damaged or missing."""
    found = store.read_tagged(CURRENT_KEY)
    if found is None:
        if lenient:
            return None, None
        raise IndexNotFoundError(
            f"no index is published at {store.url} (no object CURRENT there); check the path, or name a version that is"
            " there (`vectormill history`)"
        )
    try:
        body = unseal(found[0], f"{store.url}/{CURRENT_KEY}")
        return body["version"], body["manifest"]
    except IntegrityError as error:
        if lenient:
            return None, None
        raise IntegrityError(f"{error}; or name the version to roll back to (`vectormill history`)") from None


def _parent(store: Store, version: str | None) -> str:
    assert version is not None
    held = hold(store, version)
    if held is None:
        raise IntegrityError(
            f"CURRENT at {store.url} names {version}, whose manifest is missing; name the version to roll back to"
            " (`vectormill history`)"
        )
    if held.manifest is None:
        raise IntegrityError(f"{held.problems[0]}; its parent is not known: name the version to roll back to")
    if held.manifest.parent is None:
        raise ConfigError(
            f"{version} at {store.url} has no parent to roll back to; name a version (`vectormill history {store.url}`)"
        )
    return held.manifest.parent


def _check_every_byte(root: str, version: str) -> None:
    """Raise IntegrityError with what `verify` finds."""
    problems = verify(root, version)["problems"]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise IntegrityError(f"version {version} at {root} is damaged: {shown}")


def _finish_run_of(store: Store, version: str | None) -> None:
    """Remove what is left of the run that published the version: a build would take it for unfinished once CURRENT is another."""
    held = hold(store, version) if version is not None else None
    if held is not None and held.manifest is not None:
        discard_run(store, held.manifest.run_id)
