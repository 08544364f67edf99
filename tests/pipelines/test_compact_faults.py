from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from operators.artifact.deletions import write_deleted
from operators.artifact.manifest import (
    Manifest,
    compute_content_digest,
    manifest_key,
    open_current,
    write_manifest,
)
from operators.artifact.manifest import publish as publish_manifest
from operators.errors import FencedError, IntegrityError
from operators.storage.fencing import take_epoch
from operators.storage.store import Store
from pipelines import compact_candidate
from pipelines.compact import compact
from pipelines.runs import unfinished_runs
from pipelines.telemetry.progress import RunProgress
from pipelines.verify import verify
from tests.artifact_maker import Version, add_delta
from tests.pipelines.compact_versions import copied, make_versions, settings


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_versions(tmp_path_factory.mktemp("versions"))


@pytest.fixture
def version(template: Version, tmp_path: Path) -> Version:
    """A copy of the template."""
    return copied(template, tmp_path / "root")


POINTS = [
    "run.before_finish:1",
    "part.after_record:2",
    "ledger.before_record:1",
    "manifest.before:1",
    "publish.before:1",
    "publish.after:1",
    "tidy.before_runs:1",
]
RETRAIN_POINTS = ["sample.before_record:2", "train.before_pq:1", "shard.after_record:1", "publish.after:1"]


def _compact_in_child(root: str, crash_at: str, retrain: bool) -> None:
    if crash_at:
        os.environ["VECTORMILL_CRASH_AT"] = crash_at
    compact(root, settings("index.checkpoint_s=0"), retrain=retrain)


def run_in_child(root: str, crash_at: str, retrain: bool) -> int | None:
    """Exit code of a compaction in a process of its own."""
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload([__name__])
    child = forked.Process(target=_compact_in_child, args=(root, crash_at, retrain))
    child.start()
    child.join(60)
    return child.exitcode


@pytest.mark.parametrize("retrain", [False, True])
def test_killed_at_any_step_and_run_again_it_ends_with_the_same_bytes(
    template: Version, tmp_path: Path, retrain: bool
) -> None:
    undisturbed = copied(template, tmp_path / "undisturbed")
    expected = compact(undisturbed.store.url, settings("index.checkpoint_s=0"), retrain=retrain).manifest
    for point in RETRAIN_POINTS if retrain else POINTS:
        store = copied(template, tmp_path / point.replace(":", "-")).store
        assert run_in_child(store.url, point, retrain) == -9, point
        held = open_current(store)
        published = point.startswith(("publish.after", "tidy"))
        assert held.version != "v000004" if published else held.version == "v000004", point
        assert verify(store.url)["problems"] == [], point
        assert run_in_child(store.url, "", retrain) == 0, point
        found = open_current(store)
        assert found.content_digest == expected.content_digest, point
        assert verify(store.url)["problems"] == [], point
        assert all(key.startswith("runs/test") for key in store.list_keys("runs")), point


class Interfering(RunProgress):
    """Does something when a stage begins."""

    def __init__(self, stage: str, act: Callable[[], object]) -> None:
        super().__init__(quiet=True)
        self._stage, self._act = stage, act

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        super().stage(name, total, done)
        if name == self._stage:
            self._act()


@pytest.mark.parametrize("stage", ["merge parts", "publish"])
def test_a_compaction_that_lost_the_root_publishes_nothing_and_names_the_winner(version: Version, stage: str) -> None:
    store = version.store
    with pytest.raises(FencedError, match=r"run the-other .* took it over"):
        compact(store.url, settings(), progress=Interfering(stage, lambda: take_epoch(store, "the-other")))
    assert open_current(store).version == "v000004"


def test_a_version_published_meanwhile_is_not_replaced(version: Version) -> None:
    store = version.store
    newer: list[Version] = []
    with pytest.raises(FencedError, match=r"CURRENT changed|took it over"):
        compact(store.url, settings(), progress=Interfering("publish", lambda: newer.append(add_delta(version, 6))))
    assert open_current(store) == newer[0].manifest
    # The work was on the version before: it is of no use any more.
    done = compact(store.url, settings())
    assert done.manifest.ntotal == newer[0].manifest.ntotal
    assert unfinished_runs(store) == []


def republish(store: Store, manifest: Manifest) -> None:
    """Publish a changed manifest under its own name."""
    manifest = dataclasses.replace(manifest, content_digest=compute_content_digest(manifest))
    found = store.read_tagged("CURRENT")
    assert found is not None
    store.delete(manifest_key(manifest.version))
    publish_manifest(store, manifest, write_manifest(store, manifest), take_epoch(store, "damage"), found[1])


def test_a_ledger_that_does_not_fit_the_bitmaps_is_refused(version: Version) -> None:
    store, manifest = version.store, version.manifest
    segment = manifest.segments[1]
    deleted_N = np.zeros(segment.num_rows, bool)
    deleted_N[0] = True
    entry = write_deleted(store, f"segments/{segment.name}/deleted-wrongly", deleted_N).to_json()
    segments = list(manifest.segments)
    segments[1] = dataclasses.replace(segment, deleted=entry, num_deleted=1)
    ntotal = sum(each.num_live for each in segments)
    republish(store, dataclasses.replace(manifest, segments=segments, ntotal=ntotal))
    with pytest.raises(IntegrityError, match="the ledger of version v000004 and its deletion bitmaps disagree"):
        compact(store.url, settings())


def test_parts_that_do_not_hold_what_went_in_are_refused(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    part_checksum = compact_candidate.compact_stages.part_checksum
    monkeypatch.setattr(compact_candidate.compact_stages, "part_checksum", lambda *call: part_checksum(*call) ^ 1)
    with pytest.raises(IntegrityError, match="do not hold the live rows of version v000004"):
        compact(version.store.url, settings())
    assert open_current(version.store).version == "v000004"


def test_a_damaged_segment_is_refused_by_name(version: Version) -> None:
    entry = version.part_objects(0, segment=2)["vectors"]
    path = version.store.local_path(entry.key)
    assert path is not None
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=entry.key):
        compact(version.store.url, settings())
