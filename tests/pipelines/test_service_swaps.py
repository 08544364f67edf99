"""A service that follows CURRENT, and one that has too much to do: nobody waits for ever, nobody gets half an answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from operators.artifact.manifest import manifest_key
from operators.errors import ConfigError
from pipelines.rollback import rollback
from pipelines.service.api import Service
from pipelines.service.batching import Batcher
from pipelines.service.metrics import Metrics
from pipelines.service.refusals import Refusal
from pipelines.service.search_request import SearchRequest
from pipelines.service.settings import ServiceSettings
from tests.pipelines.nightly_site import Site
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
