"""Conditional puts, checked objects, commit records and epochs, on a local disk and on S3, with and without conditional puts."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from operators.errors import ConfigError, FencedError, IntegrityError
from operators.storage import s3_store
from operators.storage.checked import BLOCK_BYTES, CheckedFile, ObjectEntry, put_checked, verify_object, write_checked
from operators.storage.commits import CommitRecord, commit, new_attempt, read_record
from operators.storage.fencing import read_epoch, take_epoch
from operators.storage.s3_store import S3Store
from operators.storage.store import Store, open_store


@pytest.fixture(params=["local", "s3", "s3 without conditional puts"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "root"))
    made = open_store(request.getfixturevalue("bucket") + "/root")
    assert isinstance(made, S3Store)
    if request.param != "s3":
        made._conditional = False  # what the probe finds on a store that ignores the headers (tested below)
    return made


def test_a_key_is_put_only_once(store: Store) -> None:
    assert store.put_if_absent("a/b", b"first")
    assert not store.put_if_absent("a/b", b"second")
    assert store.read("a/b") == b"first"


def test_compare_and_swap_needs_the_tag_in_force(store: Store) -> None:
    assert store.read_tagged("CURRENT") is None
    assert store.replace_if("CURRENT", b"1", None)
    assert not store.replace_if("CURRENT", b"x", None)
    found = store.read_tagged("CURRENT")
    assert found is not None and found[0] == b"1"
    assert store.replace_if("CURRENT", b"2", found[1])
    assert not store.replace_if("CURRENT", b"3", found[1])
    assert store.read("CURRENT") == b"2"


def test_listing_sees_what_was_put_and_no_temporary_names(store: Store) -> None:
    store.put("x/1", b"1")
    store.put("x/y/2", b"2")
    store.put("z", b"3")
    assert store.list_keys("x") == ["x/1", "x/y/2"]
    store.delete_tree("x")
    assert store.list_keys("x") == []
    assert store.size_bytes("z") == 1
    assert store.size_bytes("x/1") is None


def test_a_listing_with_ages_and_a_deletion_of_many(store: Store) -> None:
    before = store.clock()
    for key in ("x/a/1", "x/a/2", "x/b/3"):
        store.put(key, key.encode() * 10)
    found = store.list_objects("x")
    assert [(one.key, one.size_bytes) for one in found] == [("x/a/1", 50), ("x/a/2", 50), ("x/b/3", 50)]
    # S3 tells time in whole seconds.
    assert all(before - 1 <= one.modified_at <= store.clock() + 1 for one in found)
    store.delete_many(["x/a/1", "x/a/2", "x/a/never"])
    assert [one.key for one in store.list_objects("x")] == ["x/b/3"]
    assert store.list_objects("nowhere") == store.list_half_written("nowhere") == []
    folder = store.local_path("x/a")
    assert folder is None or not folder.exists()  # an empty folder goes with its last object


def test_a_deletion_that_s3_refuses_for_one_key_is_an_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(bucket + "/root")
    assert isinstance(store, S3Store)
    refused = {"Errors": [{"Key": "root/x", "Code": "AccessDenied", "Message": "Access Denied"}]}
    monkeypatch.setattr(store._fs, "call_s3", lambda method, **options: refused)
    with pytest.raises(OSError, match=r"could not delete .*root/x: AccessDenied"):
        store.delete_many(["x"])


def _increment(url: str, times: int) -> None:
    store = open_store(url)
    for _ in range(times):
        while True:
            data, tag = store.read_tagged("counter") or (b"0", None)
            if store.replace_if("counter", str(int(data) + 1).encode(), tag):
                break


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_concurrent_swaps_lose_no_update(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = str(tmp_path) if kind == "local" else request.getfixturevalue("bucket") + "/root"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_increment, args=(url, 10)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert open_store(url).read("counter") == b"30"


def test_claims_of_dead_processes_are_taken_over(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(bucket + "/root")
    assert isinstance(store, S3Store)
    store._conditional = False
    import hashlib

    folder = f".claims/{hashlib.sha256(b'key').hexdigest()[:32]}"
    store.put(f"{folder}/{'0' * 32}", b"key")  # left by a killed process
    monkeypatch.setattr("operators.storage.s3_store.CLAIM_STALE_S", 0.5)
    assert store.put_if_absent("key", b"1")
    assert store.list_keys(".claims") == []


def test_probe_finds_a_store_that_ignores_conditional_puts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, ignoring = open_store(bucket + "/root"), open_store(bucket + "/root")
    assert isinstance(honest, S3Store) and isinstance(ignoring, S3Store)
    assert honest.conditional

    def without_condition(key: str, data: bytes, **condition: str) -> bool:
        ignoring.put(key, data)  # a real put over the wire, without the header, as an old server would treat it
        return True

    monkeypatch.setattr(ignoring, "_put_conditionally", without_condition)
    assert ignoring.conditional  # of the same bucket, in the same process: not tried again
    monkeypatch.setattr(s3_store, "_CONDITIONAL", {})
    ignoring._conditional = None
    assert not ignoring.conditional


def test_a_relative_root_means_the_same_folder_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = pickle.loads(pickle.dumps(open_store("root")))
    monkeypatch.chdir("/")
    store.put("key", b"1")
    assert (tmp_path / "root" / "key").exists()


def test_root_without_a_prefix_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a prefix inside the bucket"):
        open_store("s3://bucket")
    with pytest.raises(ConfigError, match="scheme 'gs'"):
        open_store("gs://bucket/x")


def test_checked_object_reads_back_any_range(store: Store) -> None:
    data = os.urandom(5 * BLOCK_BYTES + 77)
    entry = put_checked(store, "blob", data)
    assert entry == ObjectEntry.from_json(entry.to_json())
    file = CheckedFile(store, entry, cache_bytes=2 * BLOCK_BYTES)
    for start, stop in [
        (0, 1),
        (BLOCK_BYTES - 1, BLOCK_BYTES + 1),
        (3 * BLOCK_BYTES, 10**9),
        (7, 7),
        (10, 5 * BLOCK_BYTES),
    ]:
        assert file.read_range(start, stop) == data[start:stop]
    file.seek(-5, 2)
    assert file.read() == data[-5:]
    verify_object(store, entry)


def test_empty_object_is_fine(store: Store) -> None:
    entry = put_checked(store, "empty", b"")
    assert CheckedFile(store, entry).read() == b""
    verify_object(store, entry)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "must hold .* bytes, found"),
        (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], "is damaged: bytes 0 to"),
        (lambda data: None, "is missing"),
    ],
)
def test_damage_is_found_where_it_is_read(store: Store, damage: Callable[[bytes], bytes | None], message: str) -> None:
    data = os.urandom(3 * BLOCK_BYTES)
    entry = put_checked(store, "folder/blob", data)
    damaged = damage(data)
    store.delete("folder/blob")
    if damaged is not None:
        store.put("folder/blob", damaged)
    with pytest.raises(IntegrityError, match=f"folder/blob.*{message}"):
        CheckedFile(store, entry).read_range(0, 200)


def test_object_appears_only_when_it_is_complete(store: Store) -> None:
    class Interrupted(Exception):
        pass

    def write_half() -> None:
        with write_checked(store, "half") as pending:
            pending.file.write(b"x" * 100)
            raise Interrupted

    with pytest.raises(Interrupted):
        write_half()
    assert store.size_bytes("half") is None


def test_the_first_commit_wins_and_the_losers_objects_go(store: Store) -> None:
    def attempt(content: bytes) -> CommitRecord:
        name = new_attempt()
        entry = put_checked(store, f"unit-{name}", content)
        return commit(store, "unit.json", CommitRecord("unit u", "inputs", name, {"data": entry}, {"n": 1}))

    first, second = attempt(b"one"), attempt(b"two")
    assert second == first == read_record(store, "unit.json")
    assert store.read(first.objects["data"].key) == b"one"
    assert len(store.list_keys("")) == 2 or isinstance(store, S3Store)
    assert read_record(store, "other.json") is None


def test_a_commit_whose_answer_was_lost_is_recognised(store: Store) -> None:
    name = new_attempt()
    record = CommitRecord("unit u", "inputs", name, {"data": put_checked(store, f"unit-{name}", b"one")})
    commit(store, "unit.json", record)
    assert commit(store, "unit.json", record) == record
    assert store.read(f"unit-{name}") == b"one"


def test_damaged_record_is_named(store: Store) -> None:
    commit(store, "unit.json", CommitRecord("unit u", "inputs", new_attempt()))
    data = store.read("unit.json")
    store.put("unit.json", data.replace(b'"inputs"', b'"inputz"', 1))
    with pytest.raises(IntegrityError, match=r"unit\.json is damaged"):
        read_record(store, "unit.json")


def test_a_later_run_fences_the_earlier_off(store: Store) -> None:
    first = take_epoch(store, "run-1")
    first.check(store)
    second = take_epoch(store, "run-2")
    assert second.number == first.number + 1
    with pytest.raises(FencedError, match=r"run-1, epoch 1\) no longer owns .*run run-2"):
        first.check(store)
    second.check(store)
    found = read_epoch(store)
    assert found is not None and found[0] == second
