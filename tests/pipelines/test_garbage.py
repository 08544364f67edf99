"""`gc`: what goes and what stays, killed at any moment, and beside builds and rollbacks that begin at any moment."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.artifact.manifest import manifest_key, publish, read_current, read_manifest, write_manifest
from operators.errors import ConfigError, FencedError, IndexNotFoundError, IntegrityError, VectormillError
from operators.storage.fencing import read_epoch, take_epoch
from operators.storage.store import Store, open_store
from pipelines import garbage
from pipelines import rollback as rollback_module
from pipelines.garbage import collect_garbage, parse_age
from pipelines.rollback import rollback
from pipelines.runs import Run, begin_or_resume, check_run_kept
from pipelines.verify import verify
from pipelines.versions import NamedObjects, history, hold, stored_objects, versions_in
from tests.artifact_maker import Version, flip_bit
from tests.pipelines.copied_versions import DAY_S, Build, build_version, grow_old

NUM_SCHEDULES = int(os.environ.get("VECTORMILL_TEST_SCHEDULES", "12"))  # there are 8,008


@pytest.fixture
def local(tmp_path: Path, template: Version) -> Store:
    """A local root with v000001 to v000004, two days old."""
    store = open_store(str(tmp_path / "root"))
    for number in range(1, 5):
        build_version(store, template, f"run-{number}")
    grow_old(store.url)
    return store


def everything(store: Store) -> set[str]:
    return {key for folder in ("versions", "segments", "quantizers", "runs", "gc") for key in store.list_keys(folder)}


def named_by_all(store: Store) -> set[str]:
    """What a root without garbage holds: the manifests, and what they name."""
    keys = set()
    for version in versions_in(store):
        held = hold(store, version, NamedObjects(store))
        assert held is not None and not held.problems
        keys |= {manifest_key(version), *held.objects}
    return keys


def assert_all_whole(store: Store) -> None:
    for version in versions_in(store):
        assert verify(store.url, version)["problems"] == []


def test_only_what_no_kept_version_names_goes_and_only_when_told_to(store: Store, template: Version) -> None:
    for number in range(1, 5):
        build_version(store, template, f"run-{number}")
    rollback(store.url, "v000002")
    before = everything(store)
    planned = collect_garbage(store.url, 1, 0)
    assert everything(store) == before
    done = collect_garbage(store.url, 1, 0, delete=True)
    assert {key: planned[key] for key in ("kept", "dropped", "objects", "bytes")} == {
        key: done[key] for key in ("kept", "dropped", "objects", "bytes")
    }
    assert done["kept"] == {"v000002": "published", "v000004": "one of the 1 newest"}
    assert done["dropped"] == ["v000001", "v000003"]
    assert before - everything(store) == {found["key"] for found in done["objects"]}
    assert everything(store) == named_by_all(store)
    assert_all_whole(store)
    assert collect_garbage(store.url, 1, 0, delete=True)["num_objects"] == 0


def test_what_is_younger_than_the_age_stays_with_all_that_it_names(local: Store, template: Version) -> None:
    build_version(local, template, "run-5")
    build_version(local, template, "run-6")
    local.put("segments/run-0-lost/part-00000-attempt.vectors", b"young and named by nothing")
    done = collect_garbage(local.url, 1, DAY_S, delete=True)
    assert done["kept"] == {"v000006": "published", "v000005": "young"}
    assert local.size_bytes("segments/run-0-lost/part-00000-attempt.vectors") is not None
    assert_all_whole(local)
    grow_old(local.url)
    collect_garbage(local.url, 1, DAY_S, delete=True)
    assert everything(local) == named_by_all(local)
    assert versions_in(local) == ["v000006"]


def test_an_s3_store_tells_ages_by_its_own_clock(
    bucket: str, template: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"{bucket}/root")
    for number in (1, 2):
        build_version(store, template, f"run-{number}")
    # This machine's clock is decades ahead.
    monkeypatch.setattr("operators.storage.s3_store.time", SimpleNamespace(time=lambda: 4e9))
    assert collect_garbage(store.url, 1, 60)["dropped"] == []
    server_now = store.clock()
    monkeypatch.setattr(type(store), "clock", lambda self: server_now + 61)
    assert collect_garbage(store.url, 1, 60)["dropped"] == ["v000001"]


def test_files_that_a_killed_writer_left_go_once_they_rest(local: Store) -> None:
    root = Path(local.url)
    for place in (
        "segments/run-1-0123456789ab/.tmp-dead",
        "quantizers/.tmp-dead",
        ".tmp-dead",
        "versions/.tmp-writing",
    ):
        (root / place).write_bytes(b"half")
    for dead in root.rglob(".tmp-dead"):
        os.utime(dead, (time.time() - 4000, time.time() - 4000))
    collect_garbage(local.url, 9, 0, delete=True)
    assert [path.name for path in root.rglob(".tmp-*")] == [".tmp-writing"]
    assert_all_whole(local)


def test_a_living_run_and_the_one_that_a_build_goes_on_with_stay_whatever_their_age(
    local: Store, template: Version
) -> None:
    for run_id in ("run-1a", "run-8", "run-9"):  # two abandoned ones, and the one that `build` would resume
        Build(local, template, run_id).begin().write()
    living = Build(local, template, "run-7").begin().write()
    grow_old(local.url)
    done = collect_garbage(local.url, 1, 0, delete=True)
    assert set(done["kept_runs"]) == {"run-7", "run-9"}
    assert done["dropped_runs"] == ["run-1a", "run-8"]
    left = everything(local)
    for run_id in ("run-7", "run-9"):
        assert f"runs/{run_id}/run.json" in left
        assert any(key.startswith(f"segments/{run_id}-") for key in left)
    assert not any("run-1a" in key or "run-8" in key for key in left)
    published = living.publish()
    assert verify(local.url)["version"] == published
    assert verify(local.url)["ok"]


def test_a_killed_gc_leaves_whole_versions_and_the_next_one_finishes(local: Store, template: Version) -> None:
    Build(local, template, "run-0").begin()
    Build(local, template, "run-9").begin()
    build_version(local, template, "run-10")
    grow_old(local.url)
    script = (
        "import sys; from pipelines import garbage; garbage.KEYS_AT_ONCE = 3;"
        "garbage.collect_garbage(sys.argv[1], 2, 86400, delete=True)"
    )
    points = ["gc.after_intent:1", "gc.after_runs:1", "gc.after_manifest:1", "gc.after_objects:1", "gc.after_objects:4"]
    for point in points:
        environment = {**os.environ, "VECTORMILL_CRASH_AT": point}
        killed = subprocess.run([sys.executable, "-c", script, local.url], env=environment, check=False)
        assert killed.returncode == -signal.SIGKILL, f"{point} was not passed"
        assert all(version["state"] == "whole" for version in history(local.url)["versions"]), point
        assert_all_whole(local)
    # What the killed ones announced goes, although these bounds would keep it.
    collect_garbage(local.url, 3, DAY_S, delete=True)
    assert versions_in(local) == ["v000004", "v000007"]
    assert {key for key in everything(local) if not key.startswith("runs/run-9/")} == named_by_all(local)
    assert local.list_keys("gc") == []


def test_a_version_that_a_gc_has_announced_cannot_be_rolled_back_to(local: Store) -> None:
    named = NamedObjects(local)
    intent, plan = garbage._announce(local, garbage._plan(local, named, 1, 0), named, 1, 0)
    assert "v000003" in plan.dropped
    with pytest.raises(FencedError, match=r"v000003 .* is being removed by gc \(.*choose another"):
        rollback(local.url)
    assert read_current(local) is not None and verify(local.url)["version"] == "v000004"
    local.delete(intent)
    rollback(local.url)


def test_a_rollback_that_has_pinned_its_target_is_spared_it(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(store: Store, *args: Any) -> None:
        monkeypatch.undo()
        # Whatever else takes the root meanwhile: the rollback may be at its swap already.
        take_epoch(store, "another")
        assert collect_garbage(store.url, 1, 0, delete=True)["kept"]["v000001"] == "being rolled back to"
        publish(store, *args)

    monkeypatch.setattr(rollback_module, "publish", collect)
    with pytest.raises(FencedError, match="another .* took it over"):
        rollback(local.url, "v000001")
    assert versions_in(local) == ["v000001", "v000004"]
    rollback(local.url, "v000001")
    assert verify(local.url)["ok"]


def test_the_pin_of_a_killed_rollback_is_free_again_after_a_while(local: Store) -> None:
    for point in ("pin.after:1", "rollback.after_epoch:1"):
        environment = {**os.environ, "VECTORMILL_CRASH_AT": point}
        command = [sys.executable, "-m", "pipelines.cli", "rollback", local.url, "v000001"]
        assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert collect_garbage(local.url, 1, 0)["kept"] == {"v000004": "published", "v000001": "being rolled back to"}
    grow_old(local.url)
    collect_garbage(local.url, 1, 0, delete=True)
    assert versions_in(local) == ["v000004"]
    assert local.list_keys("gc") == []


def test_a_rollback_that_comes_between_a_plan_and_its_announcement_is_seen(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = garbage._plan

    def overtaken(*args: Any) -> Any:
        plan = honest(*args)
        monkeypatch.undo()
        rollback(local.url, "v000002")
        return plan

    monkeypatch.setattr(garbage, "_plan", overtaken)
    done = collect_garbage(local.url, 1, 0, delete=True)
    assert (done["current"], sorted(done["kept"])) == ("v000002", ["v000002", "v000004"])
    assert verify(local.url)["ok"]


GC_STEPS = ("read_epoch", "pinned_versions", "read_current", "announced_versions", "announce", "_delete_in_turn")


class Paused:
    """A rollback in a thread of its own that stops at every crash point and before its epoch, and goes on by one step when it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch, root: str, version: str) -> None:
        self._turn, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        for module in ("pipelines.announcements", "pipelines.rollback", "operators.artifact.manifest"):
            patch.setattr(f"{module}.crash_point", self._park)
        honest = rollback_module.take_epoch

        def take(*args: Any) -> Any:
            self._park("before the epoch")
            return honest(*args)

        patch.setattr(rollback_module, "take_epoch", take)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(root, version))
        self._thread.start()
        self._parked.acquire()

    def _park(self, point: str) -> None:
        if threading.current_thread() is self._thread:
            self._parked.release()
            self._turn.acquire()

    def _run(self, root: str, version: str) -> None:
        self._park("start")
        try:
            rollback(root, version)
        except VectormillError as error:
            self.error = error
        self._parked.release()

    def step(self) -> None:
        if self._thread.is_alive():
            self._turn.release()
            self._parked.acquire()

    def finish(self) -> None:
        while self._thread.is_alive():
            self._turn.release()
            self._thread.join(0.01)


def interleave(store: Store, schedule: list[int], patch: pytest.MonkeyPatch) -> Paused:
    """A gc and a rollback to v000001; before its n-th look or deletion the gc waits for `schedule.count(n)` steps of the other."""
    other = Paused(patch, store.url, "v000001")
    place = 0

    def waiting(honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal place
            for _ in range(schedule.count(place)):
                other.step()
            place += 1
            return honest(*args)

        return call

    for name in GC_STEPS:
        patch.setattr(garbage, name, waiting(getattr(garbage, name)))
    collect_garbage(store.url, 1, 0, delete=True)
    other.finish()
    patch.undo()
    return other


def test_however_a_gc_and_a_rollback_meet_the_published_version_is_whole(
    tmp_path: Path, template: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(5)
    refused = 0
    # Steps of the rollback: to its pin, past the announcements, to its epoch, to its swap, past it, to its end.
    schedules = [
        [0, 0, 0, 2, 2, 2],  # swapped and unpinned between two looks of the plan
        [4, 4, 6, 6, 6, 6],  # pinned before the announcement, swapped and unpinned between the two looks after it
        [0] * 6,
        [6, 6, 7, 7, 7, 7],
    ]
    schedules += [sorted(rng.randrange(11) for _ in range(6)) for _ in range(NUM_SCHEDULES)]
    for number, schedule in enumerate(schedules):
        store = open_store(str(tmp_path / str(number)))
        for run in (1, 2):
            build_version(store, template, f"run-{run}")
        other = interleave(store, schedule, monkeypatch)
        assert isinstance(other.error, FencedError | IndexNotFoundError | None), schedule
        assert verify(store.url)["problems"] == [], schedule
        assert_all_whole(store)
        refused += other.error is not None
    assert 0 < refused < len(schedules)


def test_a_run_that_is_resumed_while_gc_removes_it_ends_or_keeps_its_work(local: Store, template: Version) -> None:
    for run_id in ("run-7", "run-8"):  # run-8 is the newest: gc drops run-7
        Build(local, template, run_id).begin()
    take_epoch(local, "another")
    grow_old(local.url)
    plan = garbage._plan(local, NamedObjects(local), 1, 0)
    assert plan.dropped_runs == ["run-7"]
    # The build has found the run; gc deletes run.json first, then sees the epoch that the build took meanwhile.
    take_epoch(local, "run-7")
    with garbage.RunProgress(quiet=True) as quiet:
        garbage._delete(local, plan, quiet)
    assert plan.kept_runs["run-7"].startswith("living")
    assert local.list_keys("runs/run-7") == ["runs/run-7/pieces/0000.json", "runs/run-7/run.json"]
    # The other way round: gc was first, and the build finds nothing.
    collected = Run("run-gone", {}, resumed=True)
    with pytest.raises(FencedError, match="run-gone .* was removed by gc"):
        check_run_kept(local, collected)
    check_run_kept(local, begin_or_resume(local, {}, [], finished=set()))


def test_what_a_damaged_version_needs_is_not_guessed(local: Store) -> None:
    before = everything(local)
    flip_bit(local, manifest_key("v000003"), 300)
    with pytest.raises(IntegrityError, match="v000003 is to be kept and cannot be read.* nothing was deleted"):
        collect_garbage(local.url, 2, 0, delete=True)
    assert everything(local) == before
    # Below the bound its content does not matter.
    assert collect_garbage(local.url, 1, 0, delete=True)["dropped"] == ["v000001", "v000002", "v000003"]
    local.delete(manifest_key("v000004"))
    with pytest.raises(IntegrityError, match=r"names v000004, whose manifest is missing; nothing was deleted"):
        collect_garbage(local.url, 1, 0, delete=True)


def test_a_version_whose_part_record_is_lost_keeps_all_that_the_record_may_name(local: Store) -> None:
    folder = "segments/run-3-0123456789ab"
    local.delete(f"{folder}/part-00000.json")
    before = local.list_keys(folder)
    done = collect_garbage(local.url, 2, 0, delete=True)
    assert "incomplete: part record" in done["kept"]["v000003"]
    assert local.list_keys(folder) == before
    assert versions_in(local) == ["v000003", "v000004"]
    assert verify(local.url)["ok"]


def test_a_root_without_an_index_has_no_garbage(tmp_path: Path) -> None:
    with pytest.raises(IndexNotFoundError, match="gc has nothing to go by"):
        collect_garbage(str(tmp_path), 1, 0)
    with pytest.raises(ConfigError, match=r"at least 1, got 0 \(--keep\)"):
        collect_garbage(str(tmp_path), 0, 0)
    assert [parse_age(text) for text in ("0", "90s", "30m", "12h", "1.5d")] == [0, 90, 1800, 43200, 129600]
    for text in ("", "1", "-1d", "1 d", "1w"):
        with pytest.raises(ConfigError, match=r"--min-age"):
            parse_age(text)


@dataclass
class ModelVersion:
    """What the model knows of a version."""

    name: str
    parent: str | None
    young: bool = True


STEPS = st.one_of(
    st.just(("build",)),
    st.just(("candidate",)),
    st.just(("age",)),
    st.tuples(st.just("rollback"), st.integers(0, 5)),
    st.just(("rollback to parent",)),
    st.tuples(st.just("gc"), st.integers(1, 3)),
)


@settings(max_examples=8)
@given(steps=st.lists(STEPS, min_size=4, max_size=12))
def test_any_history_of_builds_rollbacks_and_gcs_keeps_what_a_plain_model_keeps(
    steps: list[tuple[Any, ...]], template: Version
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = f"{folder}/root"
        store = open_store(root)
        versions = [ModelVersion(build_version(store, template, "run-0000"), None)]
        current = versions[0].name
        for number, (step, *arguments) in enumerate(steps, 1):
            if step == "build":
                versions.append(ModelVersion(build_version(store, template, f"run-{number:04d}"), current))
                current = versions[-1].name
            elif step == "candidate":  # written, and killed before it was published
                build = Build(store, template, f"run-{number:04d}").begin().write()
                assert build.manifest is not None
                write_manifest(store, build.manifest)
                store.delete_tree(f"runs/run-{number:04d}")
                take_epoch(store, "the next")
                versions.append(ModelVersion(build.manifest.version, current))
            elif step == "age":
                grow_old(root)
                for version in versions:
                    version.young = False
            elif step == "rollback":
                current = versions[arguments[0] % len(versions)].name
                rollback(root, current)
            elif step == "rollback to parent":
                parent = next(v.parent for v in versions if v.name == current)
                if parent in {v.name for v in versions}:
                    rollback(root)
                    current = str(parent)
                else:
                    with pytest.raises((ConfigError, IndexNotFoundError)):
                        rollback(root)
            else:
                newest = {v.name for v in versions[-arguments[0] :]}
                versions = [v for v in versions if v.young or v.name == current or v.name in newest]
                collect_garbage(root, arguments[0], DAY_S, delete=True)
                assert set(stored_objects(store)) | set(store.list_keys("versions")) == named_by_all(store)
            assert versions_in(store) == [v.name for v in versions]
            found = read_current(store)
            assert found is not None and found[0]["version"] == current
        assert_all_whole(store)


@pytest.mark.slow  # timing decides what meets what; the schedules above step through it
def test_current_always_verifies_while_builds_rollbacks_and_gcs_run_at_once(tmp_path: Path, template: Version) -> None:
    store = open_store(str(tmp_path / "root"))
    build_version(store, template, "run-0")
    started = time.monotonic()
    done: dict[str, int] = {"built": 0, "rolled back": 0, "collected": 0, "read": 0}
    failures: list[BaseException | str] = []

    def enough() -> bool:
        seconds = time.monotonic() - started
        return seconds > 30 or (seconds > 3 and all(count > 2 for count in done.values()))

    def loop(seed: int, step: Callable[[random.Random, int], None]) -> None:
        rng = random.Random(seed)
        number = 0
        while not (enough() or failures):
            number += 1
            try:
                with contextlib.suppress(FencedError):
                    step(rng, number)
            except BaseException as error:
                failures.append(error)

    def build(rng: random.Random, number: int) -> None:
        Build(store, template, f"run-{threading.get_ident()}-{number:06d}").begin().write().publish()
        done["built"] += 1
        time.sleep(0.2)

    def roll_back(rng: random.Random, number: int) -> None:
        with contextlib.suppress(IndexNotFoundError, ConfigError, IntegrityError):  # gc has removed it, or is about to
            done["rolled back"] += rollback(store.url, rng.choice(versions_in(store)))["changed"]
        time.sleep(0.1)

    def collect(rng: random.Random, number: int) -> None:
        done["collected"] += len(collect_garbage(store.url, rng.randint(1, 2), 1.5, delete=True)["dropped"])

    def read(rng: random.Random, number: int) -> None:
        before = read_current(store)
        problems: list[str] = []
        try:
            problems = verify(store.url)["problems"]
        except VectormillError as error:
            problems = [str(error)]
        # A version that was replaced while it was read may be gone by now; one that still is published may not.
        if problems and read_current(store) == before:
            failures.append(f"{before}: {problems}")
        done["read"] += 1

    steps = (build, roll_back, collect, collect, read)
    threads = [threading.Thread(target=loop, args=(seed, step)) for seed, step in enumerate(steps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(done.values()), done
    assert verify(store.url)["ok"]
    epoch = read_epoch(store)
    assert epoch is not None and read_manifest(store, verify(store.url)["version"]).epoch <= epoch[0].number
