"""A service that follows CURRENT, and one that has too much to do: nobody waits for ever, nobody gets half an answer."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from operators.artifact.manifest import manifest_key
from operators.errors import ConfigError
from pipelines.compact import compact
from pipelines.rollback import rollback
from pipelines.service import batching
from pipelines.service.api import Service
from pipelines.service.batching import Batcher
from pipelines.service.guard import LARGE_BODIES, BodyReader
from pipelines.service.metrics import Metrics
from pipelines.service.refusals import Refusal
from pipelines.service.search_request import SearchRequest
from pipelines.service.searcher import Searcher
from pipelines.service.settings import ServiceSettings
from tests.pipelines.nightly_site import Site, configured
from tests.pipelines.running_service import Served, serving

SOON_S = 30.0  # the machine may be busy


def _settings(site: Site, **fields: Any) -> ServiceSettings:
    return ServiceSettings(site.root, poll_s=0.05, **fields)


def _until(served: Served, version: str) -> None:
    deadline = time.monotonic() + SOON_S
    while served.get("/v1/index")["version"] != version:
        assert time.monotonic() < deadline, f"{version} is not served"
        time.sleep(0.02)


@pytest.fixture
def asking() -> Iterator[Any]:
    """Function that asks a service again and again from four threads until the test ends, and the answers it got."""
    stop = threading.Event()
    answers: list[dict[str, Any]] = []

    def ask(served: Served) -> None:
        while not stop.is_set():
            answers.append(served.search(queries=["a wing", "new text 3"], k=4, doc_id_prefix=""[:0] or None))

    with ThreadPoolExecutor(4) as pool:
        try:
            yield lambda served: ([pool.submit(ask, served) for _ in range(4)], answers)[1]
        finally:
            stop.set()


def test_new_versions_take_the_place_of_old_ones_and_no_request_fails(site: Site, asking: Any) -> None:
    first = site.current
    texts = {first.version: site.live()}
    with serving(_settings(site)) as served:
        answers = asking(served)
        assert served.search(queries=["new text 3"], k=3, doc_id_prefix="n-")["results"] == [{"hits": []}]
        site.change()
        second = site.update().manifest
        assert second is not None
        texts[second.version] = site.live()
        _until(served, second.version)
        found = served.search(queries=["new text 3"], k=3, doc_id_prefix="n-")
        assert {hit["doc_id"][:2] for hit in found["results"][0]["hits"]} == {"n-"}
        for version in (first.version, second.version) * 3:
            rollback(site.root, version)
            _until(served, version)
    assert {answer.get("version") for answer in answers} == {first.version, second.version}
    for answer in answers:  # all rows of one answer are rows of its version
        of_version = texts[answer["version"]]
        for result in answer["results"]:
            assert all(of_version[hit["doc_id"]] == hit["text"] for hit in result["hits"])


def test_a_broken_version_is_not_taken_and_a_whole_one_after_it_is(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    first = site.current
    with serving(_settings(site)) as served:
        site.change()
        # The update publishes, and in the same moment a part of what it published is gone.
        segments = {path.name for path in (Path(site.root) / "segments").iterdir()}
        hidden = Path(site.root) / "hidden"
        (Path(site.root) / manifest_key(first.version)).stat()
        second = site.update().manifest
        assert second is not None
        new = next(p for p in (Path(site.root) / "segments").iterdir() if p.name not in segments)
        _until(served, second.version)
        rollback(site.root, first.version)
        _until(served, first.version)
        new.rename(hidden)
        current = Path(site.root) / "CURRENT"
        before = current.read_bytes()
        hidden.rename(new)
        rollback(site.root, second.version)
        broken = current.read_bytes()
        current.write_bytes(before)
        _until(served, first.version)
        new.rename(hidden)
        current.write_bytes(broken)
        deadline = time.monotonic() + SOON_S
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.05)
        assert f"goes on serving {first.version}" in caplog.text
        assert served.search(queries=["a wing"])["version"] == first.version
        hidden.rename(new)
        _until(served, second.version)


def test_of_a_remote_root_copies_are_kept_of_the_served_version_and_the_one_before(
    tiny_model: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("VECTORMILL_CACHE", str(cache))
    site = Site(tmp_path, tiny_model, root=f"{bucket}/root")
    site.put_three()
    site.build()
    searcher = Searcher(_settings(site), Metrics())
    searcher.open()
    (cache / "of-another-index.lists").touch()
    of_version: list[set[str]] = []
    for number in range(4):
        if number:
            site.put("a.jsonl", [(f"night-{number}-{n}", f"words of night {number}, {n}") for n in range(9)])
            site.update()
            compact(site.root, configured)
            searcher._take(searcher._opened())
        held = {path.name for path in cache.iterdir()} - {"of-another-index.lists"}
        of_version.append({path.name for path in searcher.current.index.copies} & held)
        assert of_version[-1]
        assert held == of_version[-1] | (of_version[-2] if number else set())
    assert (cache / "of-another-index.lists").exists()
    searcher.close()


def _held(site: Site) -> tuple[int, int]:
    """Mappings of files of the index, and open files, of this process."""
    mapped = sum(site.root in line for line in Path("/proc/self/maps").read_text().splitlines())
    return mapped, len(os.listdir("/proc/self/fd"))


def test_a_version_that_was_replaced_gives_back_its_memory_and_files(site: Site) -> None:
    first = site.current
    searcher = Searcher(_settings(site), Metrics())
    searcher.open()
    gc.collect()
    gc.freeze()  # as the service does
    try:
        searcher.current.index.prefixes.entries("a")
        before = _held(site)
        site.change()
        second = site.update().manifest
        assert second is not None
        rollback(site.root, first.version)
        searcher.follow()
        held: dict[str, set[tuple[int, int]]] = {}
        for version in (second.version, first.version) * 4:
            gone = weakref.ref(searcher.current.index)
            rollback(site.root, version)
            deadline = time.monotonic() + SOON_S
            while searcher.current.name != version or gone() is not None:
                assert time.monotonic() < deadline, f"{version} is not served, or what was before it is still there"
                time.sleep(0.02)
            held.setdefault(version, set()).add(_held(site))
        # One of each: the first and the eighth opening of a version hold as much.
        assert held[first.version] == {before}
        assert len(held[second.version]) == 1
    finally:
        gc.unfreeze()
        searcher.close()


class _SlowEncoder:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def encode_queries(self, texts: list[str]) -> Any:
        time.sleep(self.seconds)
        raise ValueError("only time is of interest")


class _Version:
    """As much of an OpenVersion as a request needs that never gets to the index."""

    d = 4

    def __init__(self, seconds: float) -> None:
        self.encoder = _SlowEncoder(seconds)

    def cleaned(self, texts: list[str]) -> list[str]:
        return texts


def _ask(batcher: Batcher, seconds: float) -> Any:
    request = SearchRequest(["a"], None, 1, None, None, None, None, True)
    return batcher.answer(_Version(seconds), request, None)  # type: ignore[arg-type]


def test_what_is_not_answered_in_time_and_what_finds_no_room_is_refused_at_once() -> None:
    async def run() -> None:
        batcher = Batcher(ServiceSettings("nowhere", max_queue=2, max_batch=2, deadline_s=0.3), Metrics())
        started = time.monotonic()
        waiting = [asyncio.create_task(_ask(batcher, 1.0)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="2 queries to answer, and takes at most 2") as refused:
            await _ask(batcher, 0.0)
        assert time.monotonic() - started < 0.3
        assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
        for task in waiting:
            with pytest.raises(Refusal, match=r"no answer within 0.3 s") as late:
                await task
            assert (late.value.status, late.value.retry_after_s) == (503, 1)
        assert batcher.outstanding == 0
        await asyncio.to_thread(batcher.close)

    asyncio.run(run())


class _WordEncoder:
    """An encoder as of a model without special tokens: a text of which nothing is left is a ValueError."""

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        if "?" in texts:
            raise ValueError("a sequence must have 1..512 tokens, got 0")
        return np.full((len(texts), 4), 2.0, np.float32)


def test_a_text_without_tokens_is_refused_alone() -> None:
    async def run() -> None:
        batcher = Batcher(ServiceSettings("nowhere"), Metrics())
        batcher._searching.put = lambda work: batching._in_loop([work], batching._succeed)  # type: ignore[method-assign]
        version: Any = _Version(0.0)
        version.encoder = _WordEncoder()

        def ask(texts: list[str]) -> asyncio.Task[Any]:
            request = SearchRequest(texts, None, 1, None, None, None, None, True)
            return asyncio.create_task(batcher.answer(version, request, None))  # type: ignore[arg-type]

        good, bad = ask(["a", "b"]), ask(["c", "?"])
        assert ((await good).vectors_Qd == 2.0).all()
        with pytest.raises(Refusal, match="at least one token of the model") as refused:
            await bad
        assert (refused.value.status, refused.value.where) == (422, "queries[1]")
        await asyncio.to_thread(batcher.close)

    asyncio.run(run())


def test_bodies_that_are_not_whole_hold_bounded_memory_and_small_ones_always_find_room() -> None:
    size = 1 << 20

    async def run() -> None:
        reader, going = BodyReader(size), asyncio.Event()

        def body_of(size: int) -> Any:
            sent = iter([{"type": "http.request", "body": b"x" * (size - 1), "more_body": True}])

            async def receive() -> Any:
                first = next(sent, None)
                if first is None:
                    await going.wait()
                return first or {"type": "http.request", "body": b"x", "more_body": False}

            return receive

        large = [asyncio.create_task(reader.read(body_of(size))) for _ in range(LARGE_BODIES)]
        await asyncio.sleep(0.01)
        with pytest.raises(Refusal, match="no room for more") as refused:
            await reader.read(body_of(size))
        assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
        small = asyncio.create_task(reader.read(body_of(1000)))
        await asyncio.sleep(0.01)
        going.set()
        assert [len(body) for body in await asyncio.gather(*large, small)] == [size] * LARGE_BODIES + [1000]
        assert len(await reader.read(body_of(size))) == size  # all room is free again

    asyncio.run(run())


def test_draining_refuses_what_comes_and_waits_for_what_is_there(site: Site) -> None:
    async def run() -> None:
        service = Service(ServiceSettings(site.root, drain_s=10, deadline_s=5))
        await asyncio.to_thread(service.open)
        service.start()
        batcher = service.check_ready()
        inside = asyncio.create_task(_ask(batcher, 0.5))
        await asyncio.sleep(0.05)
        draining = asyncio.create_task(service.drain())
        await asyncio.sleep(0.05)
        assert not draining.done()
        with pytest.raises(Refusal, match="the service is ending") as refused:
            service.check_ready()
        assert refused.value.status == 503
        with pytest.raises(Refusal):  # its encoder failed: it was answered
            await inside
        await draining
        await asyncio.to_thread(service.close)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_k": 0}, "--max-k must be at least 1, got 0"),
        ({"max_queue": 10, "max_batch": 20}, "--max-queue must be at least --max-batch"),
        ({"max_hits": 999}, r"--max-hits must be at least --max-k \(1000\)"),
        ({"max_candidates": 10, "max_k": 11}, r"--max-candidates must be at least --max-k \(11\)"),
        ({"deadline_s": 0.0}, r"--deadline-s must be in \(0, 3600\] seconds, got 0"),
        ({"recall": 0.9, "nprobe": 3}, "--recall chooses nprobe"),
        ({"token_env": "A", "token_file": "b"}, "give --token-env or --token-file"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServiceSettings("root", **fields)


def test_a_token_is_read_from_its_place_and_must_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    assert ServiceSettings("r", token_file=str(file)).token() == "0123456789abcdef"
    monkeypatch.setenv("SOME_TOKEN", "short")
    with pytest.raises(ConfigError, match=r"at least 16 printable ASCII characters .* SOME_TOKEN .* is 5 characters"):
        ServiceSettings("r", token_env="SOME_TOKEN").token()
    with pytest.raises(ConfigError, match=r"environment variable NO_TOKEN \(--token-env\) is not set"):
        ServiceSettings("r", token_env="NO_TOKEN").token()
    with pytest.raises(ConfigError, match="unknown setting 'max_kk'"):
        ServiceSettings.of({"root": "r", "max_kk": 3})
