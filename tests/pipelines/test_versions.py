"""`history` and `rollback`, on a local disk and on S3: what they say, what they refuse, and who wins against a build."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from operators.artifact.index import Index
from operators.artifact.manifest import (
    CURRENT_KEY,
    candidate_key,
    manifest_key,
    publish,
    read_current,
    read_manifest,
    write_candidate,
    write_manifest,
)
from operators.errors import ConfigError, FencedError, IndexNotFoundError, IntegrityError
from operators.storage.fencing import read_epoch, take_epoch
from operators.storage.store import Store, open_store
from pipelines import cli
from pipelines import rollback as rollback_module
from pipelines.commands.index_output import show_info
from pipelines.commands.versions_output import show_history
from pipelines.garbage import collect_garbage
from pipelines.info import info
from pipelines.rollback import rollback
from pipelines.verify import verify
from pipelines.versions import NamedObjects, check_whole, history, hold, open_version, stored_objects
from tests.artifact_maker import Version, add_delta, flip_bit, make_version
from tests.pipelines.copied_versions import SMALL, Build, build_version, grow_old, make_template


@pytest.fixture
def local(tmp_path: Path, template: Version) -> Store:
    """A local root with v000001 and v000002, which is published."""
    store = open_store(str(tmp_path / "root"))
    for number in (1, 2):
        build_version(store, template, f"run-{number}")
    return store


def current_version(store: Store) -> str:
    found = read_current(store)
    assert found is not None
    return str(found[0]["version"])


def test_history_tells_what_each_version_is_and_what_it_shares(store: Store, template: Version) -> None:
    for number in (1, 2):
        build_version(store, template, f"run-{number}")
    second = read_manifest(store, "v000002")
    # A version that names the objects of another, as one with a delta names its base's.
    epoch = take_epoch(store, "run-3")
    third = dataclasses.replace(second, version="v000003", parent="v000002", epoch=epoch.number)
    publish(store, third, write_manifest(store, third), epoch, (read_current(store) or ({}, None))[1])
    facts = history(store.url)
    assert (facts["current"], facts["problems"]) == ("v000003", [])
    assert [(v["version"], v["parent"], v["current"], v["state"]) for v in facts["versions"]] == [
        ("v000001", None, False, "whole"),
        ("v000002", "v000001", False, "whole"),
        ("v000003", "v000002", True, "whole"),
    ]
    first, second_facts, third_facts = (version["bytes"] for version in facts["versions"])
    size = sum(
        found.size_bytes for found in store.list_objects("segments/run-1-0123456789ab") if found.key[-5:] != ".json"
    )
    assert first["own"] - second.quantizer["size_bytes"] == size
    assert (first["shared"], second_facts["own"], third_facts["own"]) == (0, 0, 0)
    assert second_facts["shared"] == third_facts["shared"] > 0
    assert {v["ntotal"] for v in facts["versions"]} == {second.ntotal}
    assert {v["num_docs"] for v in facts["versions"]} == {24}


def test_history_has_a_line_for_what_is_damaged(local: Store, capsys: pytest.CaptureFixture[str]) -> None:
    build = Build(local, make_template(Path(local.url).parent / "other"), "run-3").begin().write()
    build.publish()
    flip_bit(local, manifest_key("v000001"), 300)
    lost = next(key for key in local.list_keys("segments/run-2-0123456789ab") if key.endswith("vectors"))
    local.delete(lost)
    facts = history(local.url)
    assert [v["state"] for v in facts["versions"]] == ["damaged", "incomplete", "whole"]
    assert "manifest.json is damaged" in facts["versions"][0]["problems"][0]
    assert facts["versions"][1]["problems"] == [
        f"object {local.url}/{lost} is missing; it should hold {facts_size(lost, build)} bytes"
    ]
    show_history(facts)
    shown = capsys.readouterr().out
    assert "v000001" in shown and "damaged" in shown and lost in shown
    flip_bit(local, CURRENT_KEY, 40)
    broken = history(local.url)
    assert broken["current"] is None
    assert "CURRENT is damaged" in broken["problems"][0]


def facts_size(lost: str, build: Build) -> int:
    """Size of the object of the same role in another copy."""
    suffix = lost.rsplit(".", 1)[1]
    part = lost.rsplit("/", 1)[1].split("-")[1]
    keys = build.store.list_keys(f"segments/{build.run_id}-0123456789ab")
    same = next(key for key in keys if key.endswith(suffix) and f"part-{part}-" in key)
    return build.store.size_bytes(same) or 0


def test_rollback_goes_to_the_parent_and_forward_again_by_name(store: Store, template: Version) -> None:
    for number in (1, 2):
        build_version(store, template, f"run-{number}")
    there = read_epoch(store)
    back = rollback(store.url)
    assert (back["version"], back["before"], back["changed"]) == ("v000001", "v000002", True)
    assert there is not None and back["epoch"] == there[0].number + 1
    assert current_version(store) == "v000001"
    again = rollback(store.url, "v000001")
    assert (again["changed"], again["epoch"]) == (False, None)
    forward = rollback(store.url, "v000002", full=True)
    assert (forward["changed"], forward["checked"]) == (True, "full")
    assert verify(store.url) | {"seconds": 0} == verify(store.url, "v000002") | {"seconds": 0}
    # The next version is a child of what is published then, under a number that was never used.
    rollback(store.url)
    name = build_version(store, template, "run-3")
    assert (name, read_manifest(store, name).parent) == ("v000006", "v000001")


def test_rollback_to_what_is_not_there_or_not_whole_is_refused_and_changes_nothing(local: Store) -> None:
    before = local.read(CURRENT_KEY), local.read("EPOCH")
    with pytest.raises(IndexNotFoundError, match=r"no version 'v000009' .*versions: v000001, v000002"):
        rollback(local.url, "v000009")
    rows = next(key for key in local.list_keys("segments/run-1-0123456789ab") if key.endswith("rows"))
    flip_bit(local, rows, 20)
    with pytest.raises(IntegrityError, match=r"version v000001 .* is damaged: .*rows"):
        rollback(local.url, full=True)
    content = local.read(rows)
    local.put(rows, content[:-1])
    with pytest.raises(IntegrityError, match=r"v000001 .* is not whole: object .*rows must hold"):
        rollback(local.url)
    record = next(key for key in local.list_keys("segments/run-1-0123456789ab") if key.endswith("part-00000.json"))
    flip_bit(local, record, 50)
    with pytest.raises(IntegrityError, match=r"not whole: part record .*part-00000.json is not the one"):
        rollback(local.url)
    flip_bit(local, manifest_key("v000001"), 100)
    with pytest.raises(IntegrityError, match=r"not whole: manifest .*v000001/manifest.json is damaged"):
        rollback(local.url)
    assert (local.read(CURRENT_KEY), local.read("EPOCH")) == before


def test_the_first_version_has_nothing_to_go_back_to(local: Store) -> None:
    rollback(local.url)
    with pytest.raises(ConfigError, match="v000001 .* has no parent"):
        rollback(local.url)


def test_a_build_that_runs_during_a_rollback_loses(store: Store, template: Version) -> None:
    for number in (1, 2):
        build_version(store, template, f"run-{number}")
    build = Build(store, template, "run-3").begin().write()
    rollback(store.url)
    with pytest.raises(FencedError, match="run rollback-to-v000001 .* took it over"):
        build.publish()
    assert current_version(store) == "v000001"


def test_a_build_that_checked_its_epoch_before_a_rollback_loses_at_the_swap(
    local: Store, template: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build(local, template, "run-3").begin().write()

    def overtaken(name: str) -> None:
        if name == "publish.before":
            monkeypatch.undo()
            rollback(local.url)

    monkeypatch.setattr("operators.artifact.manifest.crash_point", overtaken)
    with pytest.raises(FencedError, match=r"run-3, epoch 3.* no longer owns .*: run rollback-to-v000001"):
        build.publish()
    assert current_version(local) == "v000001"


def test_a_rollback_does_not_undo_what_a_build_published_meanwhile(
    local: Store, template: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build(local, template, "run-3").begin().write()

    def late(*args: Any) -> Any:
        build.publish()
        return take_epoch(*args)

    monkeypatch.setattr(rollback_module, "take_epoch", late)
    with pytest.raises(FencedError, match="CURRENT changed .* now names version v000003"):
        rollback(local.url)
    assert current_version(local) == "v000003"


def test_a_version_by_name_mends_a_damaged_or_missing_current(local: Store) -> None:
    flip_bit(local, CURRENT_KEY, 40)
    with pytest.raises(IntegrityError, match="or name the version to roll back to"):
        rollback(local.url)
    assert rollback(local.url, "v000002")["before"] is None
    assert verify(local.url)["ok"]
    local.delete(CURRENT_KEY)
    rollback(local.url, "v000001")
    assert verify(local.url)["version"] == "v000001"
    local.delete(manifest_key("v000001"))
    with pytest.raises(IntegrityError, match="names v000001, whose manifest is missing"):
        rollback(local.url)
    rollback(local.url, "v000002")
    assert verify(local.url)["ok"]


def test_a_rollback_ends_the_run_whose_version_it_leaves(local: Store) -> None:
    # Killed between publishing and tidying up: with another CURRENT a build would take the run for unfinished.
    local.put("runs/run-2/run.json", b"{}")
    local.put("runs/run-2/pieces/0000.json", b"{}")
    rollback(local.url)
    assert local.list_keys("runs") == []


def test_an_open_reader_keeps_its_version_after_rollback_and_is_told_of_gc(
    store: Store, template: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VECTORMILL_CACHE", str(tmp_path / "cache"))
    for number in (1, 2, 3):
        build_version(store, template, f"run-{number}")
    index, cold = Index.open(store), Index.open(store)
    queries = template.corpus.queries_Qd
    expected = index.search(queries, 5, nprobe=4).row_ids_Qk
    rollback(store.url, "v000001")
    assert np.array_equal(index.search(queries, 5, nprobe=4).row_ids_Qk, expected)
    assert np.array_equal(cold.search(queries[:1], 5, nprobe=4, refine_factor=0).row_ids_Qk[0, :0], [])
    for name in ("v000002", "v000003"):
        build_version(store, template, f"run-after-{name}")
    collect_garbage(store.url, 1, 0, delete=True)
    assert np.array_equal(index.search(queries, 5, nprobe=4).row_ids_Qk, expected)  # from its mapping and its cache
    if store.local_path("") is not None:  # its files stay open
        assert np.array_equal(cold.search(queries, 5, nprobe=4).row_ids_Qk, expected)
    else:
        with pytest.raises(IntegrityError, match=r"(went missing|is missing).*`vectormill gc` removed the version"):
            cold.exact_search(queries, 5)
    with pytest.raises(IntegrityError, match="`vectormill gc` removed the version"):
        Index(store, index.manifest)
    assert np.array_equal(Index.open(store).search(queries, 5, nprobe=4).row_ids_Qk, expected)


@pytest.fixture
def nightly(tmp_path: Path) -> Version:
    """v000001, a base; v000002 and v000003 with a delta each and rows deleted in all but the last segment."""
    base = make_version(tmp_path / "nightly", **SMALL)
    return add_delta(add_delta(base, 6, delete=[3]), 3, delete=[20, 50])


def test_history_and_info_tell_of_deltas_deletions_and_changes(
    nightly: Version, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"added": 3, "edited": 0, "deleted": 2, "revived": 0, "unchanged": 26, "texts_to_encode": 3}
    epoch = take_epoch(nightly.store, "run-4")  # whose version differs from v000003 in what it says of itself
    changes = {"objects": {}, "documents": counts}
    fourth = dataclasses.replace(nightly.manifest, version="v000004", epoch=epoch.number, changes=changes)
    digest = write_manifest(nightly.store, fourth)
    publish(nightly.store, fourth, digest, epoch, (read_current(nightly.store) or ({}, None))[1])
    facts = history(nightly.store.url)
    assert [v["state"] for v in facts["versions"]] == ["whole"] * 4
    assert [(v["kind"], v["num_deltas"], v["num_deleted"]) for v in facts["versions"][:3]] == [
        ("build", 0, 0),
        ("update", 1, 3),
        ("update", 2, 3 + 2 + 2),
    ]
    num_rows = len(nightly.corpus.texts)
    assert facts["versions"][3]["deleted_share"] == 7 / num_rows
    assert facts["versions"][3]["changes"]["documents"] == counts
    assert facts["versions"][3]["bytes"]["shared"] > facts["versions"][1]["bytes"]["own"] > 0
    show_history(facts)
    assert "3/0/2" in capsys.readouterr().out
    described = info(nightly.store.url)
    assert (described["ntotal"], described["num_deltas"], described["kind"]) == (num_rows - 7, 2, "update")
    assert sum(segment["num_deleted"] for segment in described["segments"]) == described["num_deleted"] == 7
    assert info(nightly.store.url, "v000001")["ntotal"] == described["segments"][0]["num_rows"]
    described["model"]["precision"] = "float32"
    show_info(described)
    shown = capsys.readouterr().out
    assert "3 added, 2 deleted" in shown
    assert "base and 2 delta(s), 7 deleted rows" in shown


def test_gc_keeps_every_object_of_a_version_with_deltas_and_nothing_else(nightly: Version) -> None:
    store = nightly.store
    held = NamedObjects(store)
    version = hold(store, "v000003", held)
    assert version is not None and version.problems == []
    named = {entry["key"] for entry in nightly.manifest.small_objects}
    assert len(named) == 10  # quantizer, queries, listing, rejects, amended, three tables, two bitmaps
    assert named < set(version.objects)
    grow_old(store.url)
    collect_garbage(store.url, 1, 0, delete=True)
    assert verify(store.url)["problems"] == []
    assert set(stored_objects(store)) == set(version.objects)


def test_a_light_check_misses_no_object_of_a_version_with_deltas(nightly: Version) -> None:
    for entry in nightly.manifest.small_objects:
        content = nightly.store.read(entry["key"])
        nightly.store.delete(entry["key"])
        with pytest.raises(IntegrityError, match="v000003 .* is not whole: object .* is missing"):
            check_whole(nightly.store, "v000003")
        nightly.store.put(entry["key"], content)
    check_whole(nightly.store, "v000003")


def test_the_newest_refused_version_is_opened_as_candidate(store: Store, template: Version) -> None:
    build_version(store, template, "run-1")
    with pytest.raises(IndexNotFoundError, match=r"no candidate is kept at .*: a run keeps one when its version is"):
        open_version(store, "candidate")
    for number in (2, 3):
        refused = Build(store, template, f"run-{number}").begin().write().manifest
        assert refused is not None
        write_candidate(store, refused)
        time.sleep(0.01 if store.local_path("") else 1.1)  # S3 knows seconds
    assert open_version(store, "candidate") == refused
    assert open_version(store).version == open_version(store, "v000001").version == "v000001"
    found = verify(store.url, "candidate")
    assert (found["ok"], found["version"], found["problems"]) == (True, "v000003", [])
    assert info(store.url, "candidate")["version"] == "v000003"
    assert [v["version"] for v in history(store.url)["versions"]] == ["v000001"]
    with pytest.raises(IndexNotFoundError, match="no version 'candidate'"):
        rollback(store.url, "candidate")
    key = candidate_key(refused.run_id)
    store.put(key, store.read(key).replace(b"v000003", b"v000004"))
    assert any(key in problem for problem in verify(store.url, "candidate")["problems"])


def test_the_commands_print_json_and_have_exit_codes(local: Store, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, Any]:
        code = cli.run([*arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    assert run("history", local.url)[1]["current"] == "v000002"
    assert run("rollback", local.url)[1]["version"] == "v000001"
    assert run("rollback", local.url, "v000002")[0] == 0
    assert run("rollback", local.url, "v000007")[0] == 9
    assert run("gc", local.url, "--keep", "1", "--min-age", "0")[1]["dropped"] == ["v000001"]
    flip_bit(local, manifest_key("v000001"), 100)
    assert run("rollback", local.url)[0] == 5
    code, facts = run("history", local.url)
    assert (code, facts["versions"][0]["state"], facts["versions"][0]["ntotal"]) == (0, "damaged", None)
    code = cli.run(["history", local.url])
    assert (code, "damaged" in capsys.readouterr().out) == (0, True)
