"""`gc`: deletes what no kept version and no living run needs.

It takes no epoch, so it fences nobody off, and a build or a rollback may begin at any moment of it. What keeps them whole:

* Every object has a name of its own attempt, so what nothing names now is never needed by a run that begins later, except by
  one that goes on with a run that lies at the root.
* Such a run stays with its segments, when it is the living one (the last epoch's, not published yet), the newest
  unfinished one (`build` would go on with it), or has written something within the age.
* Another run's `run.json` is deleted before its work. A build that goes on with a run looks for that file again after taking its
  epoch, gc looks at the epoch again after deleting it: at least one of the two sees the other.
* The versions to drop are announced in `gc/drop-<id>.json` before their manifests go, and pins are read after that. A rollback
  pins its target in `gc/pin-<id>.json` until CURRENT names it, and reads the announcements after pinning: again one sees the other.
* The age covers what no protocol does: a build that was fenced off between its last look at the epoch and its swap.
* Manifests go before the objects that only they name, so a kill at any moment leaves no version that is listed and not whole.
  The announcement stays then, and the next gc drops those versions too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from operators.artifact.manifest import CURRENT_KEY, manifest_key, read_current
from operators.crash_points import crash_point
from operators.errors import ConfigError, FencedError, IndexNotFoundError, IntegrityError
from operators.storage.fencing import read_epoch
from operators.storage.store import Store, StoredObject, open_store
from pipelines.announcements import (
    DEAD_AGE_S,
    announce,
    announced_versions,
    pinned_versions,
    withdraw_finished,
)
from pipelines.runs import RUN_FILE, is_outdated, run_kind
from pipelines.telemetry.progress import RunProgress
from pipelines.versions import PUBLISHED_FOLDERS, Held, NamedObjects, hold, is_manifest, version_number

KEYS_AT_ONCE = 1000
MAX_PLANS = 20
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_age(text: str) -> float:
    """`90s`, `30m`, `12h`, `1d` or `0` in seconds. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text) or re.fullmatch(r"(0)()", text)
    if match is None:
        raise ConfigError(f"an age is a number and s, m, h or d (90s, 30m, 12h, 1d), got {text!r} (--min-age)")
    return float(match[1]) * _UNITS.get(match[2], 1)


@dataclass
class Plan:
    """What stays and why, and what goes: `run_files`, then `manifests`, then `objects`."""

    epoch: int | None
    current: str
    kept: dict[str, str] = field(default_factory=dict)  # version -> why
    kept_folders: set[str] = field(default_factory=set)  # with objects of kept versions, which of them is not known
    dropped: list[str] = field(default_factory=list)
    kept_runs: dict[str, str] = field(default_factory=dict)  # run -> why
    dropped_runs: list[str] = field(default_factory=list)
    run_files: dict[str, StoredObject] = field(default_factory=dict)  # run -> its run.json
    manifests: list[StoredObject] = field(default_factory=list)
    objects: list[StoredObject] = field(default_factory=list)

    def removed(self) -> list[StoredObject]:
        """Everything that goes, in the order in which it does."""
        return [*self.run_files.values(), *self.manifests, *self.objects]

    def spare_run(self, run_id: str, why: str) -> None:
        """Take the run and its segments out of what goes."""
        self.kept_runs[run_id] = why
        self.dropped_runs = [other for other in self.dropped_runs if other != run_id]
        self.run_files.pop(run_id, None)
        self.objects = [found for found in self.objects if not belongs_to_run(found.key, run_id)]


def belongs_to_run(key: str, run_id: str) -> bool:
    """Whether the object lies in the run's folder or in a segment that it makes (their names begin with the run's)."""
    return key.startswith((f"runs/{run_id}/", f"segments/{run_id}-", f"segments/{run_id}/"))


def collect_garbage(
    root: str, keep: int, min_age_s: float, *, delete: bool = False, progress: RunProgress | None = None
) -> dict[str, Any]:
    """What goes and what stays, as plain JSON; with `delete` it is gone when this returns.

    Kept are the published version, the `keep` newest, those younger than `min_age_s`, what all of these name, living
    and resumable runs, and every object younger than `min_age_s` (by the store's clock). {"root", "deleted", "current",
    "kept": {version: why}, "dropped", "kept_runs": {run: why}, "dropped_runs", "num_objects", "bytes", "objects":
    [{"key", "size_bytes"}], "seconds"}. May be killed at any moment; the next one finishes the work.
    Raises ConfigError, IndexNotFoundError (nothing published), IntegrityError (a version that is to be kept cannot be
    read, so what it needs is not known: nothing was deleted), FencedError (runs keep taking the root).
    """
    if keep < 1:
        raise ConfigError(f"the number of versions to keep must be at least 1, got {keep} (--keep)")
    started = time.monotonic()
    with progress or RunProgress(quiet=True) as shown:
        store = open_store(root)
        shown.stage("look", total=1)
        named = NamedObjects(store)  # kept from plan to plan: only the first one costs a read of every part record
        plan = _settled_plan(store, named, keep, min_age_s)
        if delete:
            intent, plan = _announce(store, plan, named, keep, min_age_s)
            crash_point("gc.after_intent")
            _delete(store, plan, shown)
            withdraw_finished(store, intent)
    removed = plan.removed()
    return {
        "root": root,
        "deleted": delete,
        "current": plan.current,
        "kept": plan.kept,
        "dropped": plan.dropped,
        "kept_runs": plan.kept_runs,
        "dropped_runs": plan.dropped_runs,
        "num_objects": len(removed),
        "bytes": sum(found.size_bytes for found in removed),
        "objects": [{"key": found.key, "size_bytes": found.size_bytes} for found in removed],
        "seconds": time.monotonic() - started,
    }


def _settled_plan(store: Store, named: NamedObjects, keep: int, min_age_s: float) -> Plan:
    """A plan whose version was published from the first look to the last: of one that was not another gc may have taken a part."""
    for _ in range(MAX_PLANS):
        before = store.read_tagged(CURRENT_KEY)
        try:
            return _plan(store, named, keep, min_age_s)
        except IntegrityError:
            if store.read_tagged(CURRENT_KEY) == before:
                raise
    raise _overtaken(store)


def _overtaken(store: Store) -> FencedError:
    return FencedError(
        f"runs take {store.url} faster than gc can look at it ({MAX_PLANS} times in a row); nothing was deleted, run gc again"
    )


def _plan(store: Store, named: NamedObjects, keep: int, min_age_s: float) -> Plan:
    # In this order. A rollback pins, takes an epoch, swaps CURRENT and unpins: one whose pin is not there yet has an epoch that
    # `_announce` finds to be new, one whose pin is gone already has swapped CURRENT.
    epoch = read_epoch(store)
    now = store.clock()
    pins, dead_pins = pinned_versions(store, now, min_age_s)
    found = read_current(store)
    if found is None:
        raise IndexNotFoundError(
            f"no index is published at {store.url} (no object CURRENT there): gc has nothing to go by; check the path, or run"
            " `vectormill build` first"
        )
    plan = Plan(epoch[0].number if epoch else None, found[0]["version"])
    living = epoch[0].run_id if epoch and epoch[0].number != found[0]["epoch"] else None

    def is_young(stored: StoredObject) -> bool:
        return now - stored.modified_at < min_age_s

    in_versions = store.list_objects("versions")
    manifests = {stored.key.split("/")[1]: stored for stored in in_versions if is_manifest(stored.key)}
    announced = announced_versions(store)
    young = {version for version, stored in manifests.items() if is_young(stored)}
    _choose_versions(plan, manifests, announced, pins, keep, young)
    needed, current = _named_by(store, plan, named)
    run_starts = _choose_runs(plan, store, living, current, is_young)
    plan.manifests = [manifests[version] for version in plan.dropped]
    candidates = [stored for folder in PUBLISHED_FOLDERS for stored in store.list_objects(folder)]
    candidates += [stored for stored in in_versions if not is_manifest(stored.key)]
    resumed_since = min((run_starts[run_id] for run_id in plan.kept_runs if run_id in run_starts), default=float("inf"))
    plan.objects += [
        stored
        for stored in candidates
        if stored.key not in needed
        and not stored.key.startswith(tuple(plan.kept_folders))
        and not is_young(stored)
        and not (stored.key.startswith("versions/") and stored.key.split("/")[1] in plan.kept)
        and not any(belongs_to_run(stored.key, run_id) for run_id in plan.kept_runs)
        # A run that stays may have trained it already.
        and not (stored.key.startswith("quantizers/") and stored.modified_at >= resumed_since)
    ]
    plan.objects += dead_pins
    plan.objects += [
        stored
        for stored in store.list_half_written("")
        if now - stored.modified_at >= max(min_age_s, DEAD_AGE_S)
        and not any(belongs_to_run(stored.key, run_id) for run_id in plan.kept_runs)
    ]
    return plan


def _choose_versions(
    plan: Plan, manifests: Iterable[str], announced: set[str], pins: set[str], keep: int, young: set[str]
) -> None:
    """Fill `kept` and `dropped`. `announced`: versions that a gc began to remove; they are removed to the end."""
    names = sorted(manifests, key=lambda version: (version_number(version), version))
    plan.kept[plan.current] = "published"
    for version in names:
        if version in pins:
            plan.kept.setdefault(version, "being rolled back to")
    free = [version for version in names if version not in announced]
    for version in free[-keep:]:
        plan.kept.setdefault(version, f"one of the {keep} newest")
    for version in free:
        if version in young:
            plan.kept.setdefault(version, "young")
    plan.dropped = [version for version in names if version not in plan.kept]


def _named_by(store: Store, plan: Plan, named: NamedObjects) -> tuple[set[str], Held]:
    """Keys that the kept versions name, and the published version. Raises IntegrityError when one cannot be read."""
    needed: set[str] = set()
    current: Held | None = None
    for version in sorted(plan.kept):
        held = hold(store, version, named)
        if held is None:
            if version == plan.current:
                raise IntegrityError(
                    f"CURRENT at {store.url} names {version}, whose manifest is missing; nothing was deleted: roll back to a"
                    " version that is whole, or restore it from a copy"
                )
            del plan.kept[version]  # another gc, with other bounds, removed it
            continue
        if held.manifest is None:
            raise IntegrityError(
                f"version {version} is to be kept and cannot be read, so what it needs is not known, and nothing was deleted:"
                f" {held.problems[0]}; restore it from a copy, or give it up by deleting {store.url}/{manifest_key(version)}"
            )
        if held.problems:
            plan.kept[version] += f"; incomplete: {held.problems[0]}"
        plan.kept_folders |= held.unknown
        needed |= set(held.objects)
        current = held if version == plan.current else current
    assert current is not None
    return needed, current


def _choose_runs(plan: Plan, store: Store, living: str | None, current: Held, is_young: Any) -> dict[str, float]:
    """Fill `kept_runs`, `dropped_runs`, `run_files`, and `objects` with what the dropped ones hold; when each run began."""
    assert current.manifest is not None
    by_run: dict[str, list[StoredObject]] = {}
    for stored in store.list_objects("runs"):
        by_run.setdefault(stored.key.split("/")[1], []).append(stored)
    files = {run_id: stored for run_id, all_of in by_run.items() for stored in all_of if _is_run_file(stored.key)}
    newest: dict[str, str] = {}  # by kind, the run that a command of that kind would go on with
    for run_id in sorted(files):
        # A compaction of another version than the published one is discarded by the next; it may be a copy of the index.
        if run_id != current.manifest.run_id and not is_outdated(store, run_id, current.version):
            newest[run_kind(store, run_id)] = run_id
    if living is not None:
        plan.kept_runs[living] = "living: the last epoch's"
    for kind, run_id in newest.items():
        plan.kept_runs.setdefault(run_id, f"unfinished: `{kind}` goes on with it")
    for run_id, all_of in by_run.items():
        if run_id in plan.kept_runs:
            continue
        if any(map(is_young, all_of)):
            plan.kept_runs[run_id] = "young"
            continue
        plan.dropped_runs.append(run_id)
        plan.objects += [stored for stored in all_of if not _is_run_file(stored.key)]
        if run_id in files:
            plan.run_files[run_id] = files[run_id]
    return {run_id: min(stored.modified_at for stored in all_of) for run_id, all_of in by_run.items()}


def _is_run_file(key: str) -> bool:
    return key.count("/") == 2 and key.endswith(f"/{RUN_FILE}")


def _announce(store: Store, plan: Plan, named: NamedObjects, keep: int, min_age_s: float) -> tuple[str, Plan]:
    """The announcement's key, and a plan that no run has overtaken before it was announced."""
    for _ in range(MAX_PLANS):
        key = announce(store, plan.dropped)
        # In this order: a pin that came and went in between left a new epoch.
        pins, _ = pinned_versions(store, store.clock(), min_age_s)
        epoch = read_epoch(store)
        if (epoch[0].number if epoch else None) == plan.epoch and pins.isdisjoint(plan.dropped):
            return key, plan
        store.delete(key)
        plan = _settled_plan(store, named, keep, min_age_s)
    raise _overtaken(store)


def _delete(store: Store, plan: Plan, shown: RunProgress) -> None:
    shown.stage("delete", total=len(plan.removed()))
    for run_id, stored in list(plan.run_files.items()):
        content = store.read_tagged(stored.key)
        store.delete_many([stored.key])
        shown.advance()
        epoch = read_epoch(store)
        if epoch is not None and epoch[0].run_id == run_id and epoch[0].number != plan.epoch:
            if content is not None:
                store.put(stored.key, content[0])
            plan.spare_run(run_id, "living: it was resumed meanwhile")
    crash_point("gc.after_runs")
    _delete_in_turn(store, plan.manifests, "gc.after_manifest", 1, shown)
    _delete_in_turn(store, plan.objects, "gc.after_objects", KEYS_AT_ONCE, shown)


def _delete_in_turn(
    store: Store, objects: Sequence[StoredObject], point: str, at_once: int, shown: RunProgress
) -> None:
    for start in range(0, len(objects), at_once):
        batch = [stored.key for stored in objects[start : start + at_once]]
        store.delete_many(batch)
        crash_point(point)
        shown.advance(len(batch))
