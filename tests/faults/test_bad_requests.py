"""Single requests that go wrong: each kind of fault, and lost answers to the puts on which publishing rests."""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs

from operators.artifact.manifest import read_current
from operators.errors import FencedError, IntegrityError
from operators.sources.listing import list_sources
from operators.sources.pieces import plan_pieces
from operators.sources.readers import PieceReader, ReadConfig
from operators.storage import retrying_s3, s3_store
from operators.storage.checked import BLOCK_BYTES, CheckedFile, put_checked, verify_object
from operators.storage.commits import CommitRecord, commit, new_attempt, read_record
from operators.storage.fencing import take_epoch
from operators.storage.retrying_s3 import StorageUnavailableError
from operators.storage.s3_store import S3Store
from operators.storage.store import open_store
from pipelines.garbage import collect_garbage
from pipelines.rollback import rollback
from pipelines.verify import verify
from tests.artifact_maker import add_delta, make_version
from tests.faults.faulty_s3 import FAULTS, Fault, FaultyS3, Request, faulty_s3


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy that all S3 clients made from now on go through; pauses between attempts are short."""
    with faulty_s3(s3, slow_s=0.3) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        monkeypatch.setattr(retrying_s3, "MAX_BACKOFF_S", 0.2)
        yield running


@pytest.fixture
def store(proxy: FaultyS3, bucket: str) -> S3Store:
    made = open_store(f"{bucket}/root")
    assert isinstance(made, S3Store)
    assert made.conditional
    return made


def everything(request: Request) -> bool:
    return True


def puts_of(name: str) -> Callable[[Request], bool]:
    return lambda request: request.method == "PUT" and request.path.endswith(f"/{name}")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_survives_a_fault_of_each_kind(fault: Fault, proxy: FaultyS3, store: S3Store) -> None:
    data = os.urandom(2 * BLOCK_BYTES + 5)

    def once() -> None:
        proxy.plan(fault, everything)

    once()
    store.put("a/small", data)
    once()
    assert store.read("a/small") == data
    once()
    assert store.reader("a/small")(100, 1000) == data[100:1000]
    once()
    assert store.size_bytes("a/small") == len(data)
    once()
    assert store.list_keys("a") == ["a/small"]
    once()
    found = store.read_tagged("a/small")
    assert found is not None and found[0] == data
    once()
    entry = put_checked(store, "a/checked", data)
    once()
    verify_object(store, entry)
    once()
    store.delete_many(["a/small"])
    once()
    store.delete("a/checked")
    once()
    store.delete_tree("a")
    assert store.list_keys("") == []
    assert proxy.done.total() - proxy.done["passed"] >= 10


@pytest.mark.parametrize("fault", FAULTS)
def test_a_multipart_upload_survives_a_fault_in_each_of_its_requests(
    fault: Fault, proxy: FaultyS3, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("operators.storage.s3_store.PART_BYTES", 5 << 20)  # the least that S3 takes
    data = os.urandom(1 << 20) * 11
    for query in ("uploads", "partNumber=2", "partNumber=3", "uploadId"):

        def hit(request: Request, query: str = query) -> bool:
            return query in request.query and ("partNumber" in request.query) == ("partNumber" in query)

        proxy.plan(fault, hit)
    verify_object(store, put_checked(store, "big", data))
    assert proxy.done[fault] + proxy.done["slow"] >= 4  # a put has no body that could break off: it is slow instead
    assert store.list_keys("") == ["big"]


def test_lost_answers_to_conditional_puts_are_recognised_as_ones_own(proxy: FaultyS3, store: S3Store) -> None:
    proxy.plan("lost_answer", puts_of("unit.json"))
    record = CommitRecord("unit u", "inputs", new_attempt(), {"data": put_checked(store, "unit-1", b"1")}, {"n": 1})
    assert commit(store, "unit.json", record) == record == read_record(store, "unit.json")
    assert store.read("unit-1") == b"1"
    for number in (1, 2):  # the first with If-None-Match, the second with If-Match
        proxy.plan("lost_answer", puts_of("EPOCH"))
        epoch = take_epoch(store, f"run-{number}")
        assert epoch.number == number
        epoch.check(store)
    assert proxy.done["lost_answer"] == 3


def test_a_lost_answer_does_not_make_a_loser_the_winner(proxy: FaultyS3, store: S3Store) -> None:
    first = CommitRecord("unit u", "inputs", new_attempt(), {"data": put_checked(store, "unit-1", b"1")})
    second = CommitRecord("unit u", "inputs", new_attempt(), {"data": put_checked(store, "unit-2", b"2")})
    commit(store, "unit.json", first)
    proxy.plan("lost_answer", puts_of("unit.json"))
    assert commit(store, "unit.json", second) == first
    assert store.size_bytes("unit-2") is None
    earlier = take_epoch(store, "run-1")
    proxy.plan("lost_answer", puts_of("EPOCH"))
    take_epoch(store, "run-2")
    with pytest.raises(FencedError, match="run-2"):
        earlier.check(store)


def test_the_probe_for_conditional_puts_is_not_misled_by_a_lost_answer(
    proxy: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Fault] = ["lost_answer", "internal_error"]
    for fault in faults:
        for skipped in range(3):
            seen: list[Request] = []

            def nth(request: Request, seen: list[Request] = seen, skipped: int = skipped) -> bool:
                seen.append(request)
                return len(seen) == skipped + 1

            proxy.plan(fault, nth)
            monkeypatch.setattr(s3_store, "_CONDITIONAL", {})
            made = open_store(f"{bucket}/root")
            assert isinstance(made, S3Store) and made.conditional
            proxy.up_again()
            assert made.list_keys(".probe") == []


def test_damage_on_the_way_is_read_again_and_damage_in_the_store_is_reported(
    proxy: FaultyS3, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(3 * BLOCK_BYTES)
    entry = put_checked(store, "blob", data)
    read, flipped = store.reader("blob"), 0

    def damaged_once(start: int, stop: int) -> bytes:
        nonlocal flipped
        flipped += 1
        found = read(start, stop)
        return bytes([found[0] ^ 1]) + found[1:] if flipped == 1 else found

    file = CheckedFile(store, entry)
    monkeypatch.setattr(file, "_read_range", damaged_once)
    assert file.read() == data
    assert flipped == 2
    store.put("blob", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="blob is damaged"):
        CheckedFile(store, entry).read()


def test_a_storage_that_is_down_is_an_error_within_the_deadline_and_the_next_ones_come_sooner(
    proxy: FaultyS3, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying_s3, "REQUEST_DEADLINE_S", 1.5)
    monkeypatch.setattr(retrying_s3, "DOWN_DEADLINE_S", 0.3)
    store.put("key", b"123456")
    kinds: list[Fault] = ["slow_down", "reset_before", "truncated"]
    for fault in kinds:
        store.read("key")  # a success
        proxy.plan(fault, everything, times=1000)
        started = time.monotonic()
        with pytest.raises(StorageUnavailableError, match=r"get_object failed \d+ time\(s\) within") as caught:
            store.reader("key")(0, 6)
        assert str(caught.value.filename) == f"s3://{store._bucket}/root/key"
        assert 0.5 < time.monotonic() - started < 1.5 + 1.0
        started = time.monotonic()
        with pytest.raises(StorageUnavailableError):
            store.reader("key")(0, 6)
        assert time.monotonic() - started < 1.0
        proxy.up_again()


def test_sources_survive_broken_bodies_and_lose_no_row(proxy: FaultyS3, bucket: str) -> None:
    count = 1000
    data = b"".join(b'{"id": "%d", "text": "text number %d"}\n' % (n, n) for n in range(count))
    fs = s3fs.S3FileSystem(endpoint_url=proxy.endpoint)
    fs.pipe_file(f"{bucket}/corpus/a.jsonl", data)
    fs.pipe_file(f"{bucket}/corpus/b.jsonl.gz", gzip.compress(data))
    config = ReadConfig(piece_bytes=8_000, piece_rows=10_000)
    proxy.rate = 0.2
    listing = list_sources([f"{bucket}/corpus/a.jsonl"])
    pieces = plan_pieces(listing.objects, config).pieces({})
    tables = [PieceReader(config).read(piece).rows for piece in pieces]
    ids = [doc_id for table in tables for doc_id in table.column("doc_id").to_pylist()]
    assert ids == [str(n) for n in range(count)]
    assert len(pieces) >= 5
    assert proxy.done.total() > proxy.done["passed"]


def test_a_version_whose_every_write_lost_its_answer_is_the_same_and_is_published(
    proxy: FaultyS3, bucket: str, tmp_path: Path
) -> None:
    seen: set[Request] = set()

    def first_write(request: Request) -> bool:
        if request.method not in ("PUT", "POST", "DELETE") or request in seen:
            return False
        seen.add(request)
        return True

    proxy.plan("lost_answer", first_write, times=10_000)
    base = make_version(f"{bucket}/root", num_docs=30, nlist=8, num_pieces=1, num_shards=1)
    delta = add_delta(base, 10, delete=[3, 4])
    undisturbed = add_delta(make_version(tmp_path, num_docs=30, nlist=8, num_pieces=1, num_shards=1), 10, delete=[3, 4])
    assert delta.manifest.content_digest == undisturbed.manifest.content_digest
    assert rollback(f"{bucket}/root")["version"] == base.manifest.version
    collect_garbage(f"{bucket}/root", keep=1, min_age_s=0, delete=True)
    assert proxy.done["lost_answer"] > 30
    store = open_store(f"{bucket}/root")
    found = read_current(store)
    assert found is not None and found[0]["version"] == base.manifest.version
    assert verify(f"{bucket}/root")["problems"] == []
