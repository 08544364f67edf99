"""Threads that work for all requests at once: one encodes texts, one searches. Whatever waits is taken together.

There is no timer: a thread that is free takes a query at once, and while it is busy others gather, so batches are as large
as the load makes them and an idle service adds no wait. A large request is worked on in slices, between which others get
their turn. The queue is bounded, and what cannot be answered in time is refused.

Q queries of a request, d dimensions, k hits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.encoding.text_encoder import NonFiniteVectorError, TextEncoder
from operators.errors import VectormillError
from pipelines.service.metrics import Metrics
from pipelines.service.refusals import Refusal, invalid
from pipelines.service.search_request import SearchRequest
from pipelines.service.searcher import OpenVersion, Point
from pipelines.service.settings import ServiceSettings

ENCODED_AT_ONCE = 32  # texts of one forward pass, over all requests
ENCODED_OF_ONE = 16  # of one request, while others wait
SEARCHED_AT_ONCE = 128
SEARCHED_OF_ONE = 64
STEP_TERMS = 200_000  # candidates of one step, over all its queries: bounds memory where k is large or a prefix rare
RETRY_AFTER_S = 1

log = logging.getLogger("vectormill.service")


@dataclass(eq=False)
class Work:
    """A request on its way. Touched by the event loop before and after, and by one thread at a time between."""

    version: OpenVersion
    request: SearchRequest
    point: Point
    future: asyncio.Future[list[dict[str, Any]]]
    arrived: float = field(default_factory=time.perf_counter)
    texts: list[str] | None = None  # cleaned
    vectors_Qd: npt.NDArray[np.float32] | None = None
    num_encoded: int = 0
    results: list[dict[str, Any]] = field(default_factory=list)
    took_s: dict[str, float] = field(default_factory=dict)
    cancelled: bool = False  # nobody waits any more

    @property
    def key(self) -> tuple[Any, ...]:
        """Works with the same key can be searched together, with the results that each would have alone."""
        request = self.request
        return id(self.version), request.k, self.point, request.prefix, request.with_text

    def add(self, stage: str, seconds: float) -> None:
        self.took_s[stage] = self.took_s.get(stage, 0.0) + seconds


class Batcher:
    """Takes requests in an event loop, works on them in two threads, and answers in the loop."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._outstanding = 0  # queries; in the event loop only
        self._filtering = _Line("filter", self._filter, 1)
        self._encoding = _Line("encode", self._encode, settings.threads)
        self._searching = _Line("search", self._search, settings.threads)
        metrics.queue_limit.set(settings.max_queue)
        metrics.waiting.set_function(lambda: self._outstanding)

    def close(self) -> None:
        """End the threads; what waits is not answered."""
        self._filtering.close()
        self._encoding.close()
        self._searching.close()

    @property
    def outstanding(self) -> int:
        """Queries that wait or are being worked on."""
        return self._outstanding

    def check_room(self, num_queries: int) -> None:
        """Raise Refusal 429 unless so many more queries may wait."""
        if self._outstanding + num_queries > self._settings.max_queue:
            raise Refusal(
                429,
                "too_many_requests",
                f"the service has {self._outstanding} queries to answer, and takes at most {self._settings.max_queue}"
                " (--max-queue); come again later, or add replicas",
                retry_after_s=RETRY_AFTER_S,
            )

    async def answer(self, version: OpenVersion, request: SearchRequest, point: Point) -> Work:
        """The finished work, its `results` one for each query. Raises Refusal: no room, or not in time."""
        num_queries = request.num_queries
        self.check_room(num_queries)
        loop = asyncio.get_running_loop()
        work = Work(version, request, point, loop.create_future())
        if request.texts is not None:
            work.texts = version.cleaned(request.texts)
            work.vectors_Qd = np.empty((num_queries, version.d), np.float32)
        else:
            work.vectors_Qd = request.vectors_Qd
        self._outstanding += num_queries
        timer = loop.call_later(self._settings.deadline_s, self._expire, work)
        try:
            if request.prefix is not None:
                self._filtering.put(work)
            else:
                self._enter(work)
            await work.future
        finally:
            timer.cancel()
            work.cancelled = True
            self._outstanding -= num_queries
        return work

    def _enter(self, work: Work) -> None:
        (self._encoding if work.texts is not None else self._searching).put(work)

    def _filter(self, waiting: deque[Work]) -> deque[Work]:
        """Find the entries of one request's prefix, so that the search thread has them at once; what is left."""
        work = waiting.popleft()
        assert work.request.prefix is not None
        try:
            work.version.index.prefixes.entries(work.request.prefix)
        except Exception as error:
            _fail([work], error)
        else:
            self._enter(work)
        return waiting

    def _expire(self, work: Work) -> None:
        if not work.future.done():
            work.future.set_exception(
                Refusal(
                    503,
                    "deadline_exceeded",
                    f"no answer within {self._settings.deadline_s:g} s (--deadline-s); the service is overloaded, or the"
                    " request is large: come again later, or ask for less at a time",
                    retry_after_s=RETRY_AFTER_S,
                )
            )

    def _encode(self, waiting: deque[Work]) -> deque[Work]:
        """Encode a slice of what waits; what is left. In the encoding thread."""
        first = waiting[0].version.encoder
        batch: list[tuple[Work, int, int]] = []
        rest: deque[Work] = deque()
        texts: list[str] = []
        for work in waiting:
            room = ENCODED_AT_ONCE - len(texts)
            if work.version.encoder is not first or room <= 0:
                rest.append(work)
                continue
            assert work.texts is not None
            end = min(len(work.texts), work.num_encoded + min(room, ENCODED_OF_ONE))
            batch.append((work, work.num_encoded, end))
            texts += work.texts[work.num_encoded : end]
        started = time.perf_counter()
        try:
            vectors: Any = first.encode_queries(texts)
        except Exception:  # one text's fault must not be the others'
            vectors = [_encoded_alone(first, text) for text in texts]
        seconds = time.perf_counter() - started
        self._metrics.batch["encode"].observe(len(texts))
        place = 0
        for work, begin, end in batch:
            assert work.texts is not None and work.vectors_Qd is not None
            found = vectors[place : place + end - begin]
            place += end - begin
            failed = [at for at, vector in enumerate(found) if isinstance(vector, Exception)]
            if failed:
                _fail([work], _refused_text(found[failed[0]], work.texts, begin + failed[0]))
                continue
            work.vectors_Qd[begin:end] = found
            work.num_encoded = end
            work.add("encode", seconds)
            if end == len(work.texts):
                self._searching.put(work)
            else:
                rest.append(work)
        return rest

    def _search(self, waiting: deque[Work]) -> deque[Work]:
        """Search a slice of what waits with the same settings; what is left. In the search thread."""
        head = waiting[0]
        key, k = head.key, head.request.k
        try:
            terms = head.version.terms(k, head.point, head.request.prefix)
        except Exception as error:
            waiting.popleft()
            _fail([head], error)
            return waiting
        most = max(1, min(SEARCHED_AT_ONCE, STEP_TERMS // terms))
        batch: list[tuple[Work, int]] = []
        rest: deque[Work] = deque()
        parts: list[npt.NDArray[np.float32]] = []
        room = most
        for work in waiting:
            if room <= 0 or work.key != key:
                rest.append(work)
                continue
            assert work.vectors_Qd is not None
            begin = len(work.results)
            part = work.vectors_Qd[begin : begin + min(room, SEARCHED_OF_ONE)]
            batch.append((work, len(part)))
            parts.append(part)
            room -= len(part)
        started = time.perf_counter()
        try:
            vectors = parts[0] if len(parts) == 1 else np.concatenate(parts)
            scores, entries = head.version.search(vectors, k, head.point, head.request.prefix)
            found = time.perf_counter()
            results = head.version.hits(scores, entries, head.request.with_text)
        except Exception as error:
            _fail([work for work, _ in batch], error)
            return rest
        ended = time.perf_counter()
        self._metrics.batch["search"].observe(len(vectors))
        self._metrics.read_rows(head.version.index.row_groups)
        place = 0
        finished = []
        for work, count in batch:
            work.results += results[place : place + count]
            place += count
            work.add("search", found - started)
            work.add("rows", ended - found)
            if len(work.results) == work.request.num_queries:
                finished.append(work)
            else:
                rest.append(work)
        _in_loop(finished, _succeed)
        return rest


class _Line:
    """A queue and the thread that serves it. `step` gets what waits, and gives back what is left of it."""

    def __init__(self, name: str, step: Callable[[deque[Work]], deque[Work]], threads: int) -> None:
        self._step = step
        self._threads = threads
        self._arrived: deque[Work] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, work: Work) -> None:
        with self._wake:
            self._arrived.append(work)
            self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(5)

    def _run(self) -> None:
        import faiss
        import torch

        torch.set_num_threads(self._threads)  # of this thread, as is faiss's
        faiss.omp_set_num_threads(self._threads)
        waiting: deque[Work] = deque()
        while True:
            with self._wake:
                while not waiting and not self._arrived and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                waiting.extend(self._arrived)
                self._arrived.clear()
            waiting = deque(work for work in waiting if not work.cancelled)
            if not waiting:
                continue
            before = list(waiting)
            try:
                waiting = self._step(waiting)
            except Exception as error:  # a bug of ours: the thread must go on
                _fail(before, error)
                waiting = deque()
            before = []  # an idle line holds no version


def _in_loop(works: list[Work], function: Callable[[list[Work]], None]) -> None:
    """Call the function in the works' event loop, once for all."""
    if works:
        try:
            works[0].future.get_loop().call_soon_threadsafe(function, works)
        except RuntimeError:  # the loop was closed: nobody waits
            log.debug("%d requests were not answered, the service has ended", len(works))


def _succeed(works: list[Work]) -> None:
    for work in works:
        if not work.future.done():
            work.future.set_result(work.results)


def _encoded_alone(encoder: TextEncoder, text: str) -> npt.NDArray[np.float32] | Exception:
    try:
        vector: npt.NDArray[np.float32] = encoder.encode_queries([text])[0]
        return vector
    except Exception as error:
        return error


def _refused_text(error: Exception, texts: list[str], place: int) -> Exception:
    """422 for a text of which the tokenizer leaves nothing, which a model without special tokens cannot take."""
    if not isinstance(error, ValueError) or isinstance(error, NonFiniteVectorError):
        return error
    log.info("a query was not taken by the model: %s", error)
    return invalid("a query must have at least one token of the model", f"queries[{place}]", texts[place])


def _fail(works: list[Work], error: Exception) -> None:
    """Answer with a refusal: an object that cannot be read is storage's fault, all else is a bug of ours."""
    if isinstance(error, Refusal):
        _in_loop(works, lambda works: _refuse(works, error))
        return
    known = isinstance(error, VectormillError | OSError)
    log.error("%d requests failed: %s: %s", len(works), type(error).__name__, error, exc_info=error)

    _in_loop(works, lambda works: _refuse(works, _cannot_read() if known else _fault()))


def _refuse(works: list[Work], refusal: Refusal) -> None:
    for work in works:
        if not work.future.done():
            work.future.set_exception(refusal)


def _cannot_read() -> Refusal:
    message = "the index cannot be read at the moment; the service's log says why"
    return Refusal(503, "unavailable", message, retry_after_s=RETRY_AFTER_S)


def _fault() -> Refusal:
    return Refusal(500, "internal_error", "a fault of the service; its log says more")
