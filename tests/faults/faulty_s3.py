"""A proxy on loopback before the local S3 server that does to requests what bad storage does. Seeded.

    client --HTTP/1.1 keep-alive--> FaultyS3 --HTTP/1.1--> the server

Faults by rate hit requests at random; `FaultyS3.plan` hits chosen ones. What was asked of it and what it did is counted.
The Host header passes through unchanged, so that signatures stay valid.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

Fault = Literal[
    "slow_down",  # 503 SlowDown, not forwarded
    "internal_error",  # 500 InternalError, not forwarded
    "reset_before",  # the connection is reset, nothing was forwarded
    "lost_answer",  # forwarded and done; the connection is reset instead of the answer
    "slow",  # the answer takes seconds
    "truncated",  # the answer's body breaks off in the middle (objects and listings)
    "shortened",  # half of a ranged body or of a listing, with a length that hides it
]
FAULTS: tuple[Fault, ...] = (
    "slow_down",
    "internal_error",
    "reset_before",
    "lost_answer",
    "slow",
    "truncated",
    "shortened",
)
# Requests whose answers have no body to speak of.
WITHOUT_BODY = tuple(fault for fault in FAULTS if fault not in ("truncated", "shortened"))
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "expect"}


@dataclass(frozen=True)
class Request:
    """What a request asks for."""

    method: str
    path: str  # /bucket/key, decoded
    query: str


@dataclass
class _Plan:
    fault: Fault
    when: Callable[[Request], bool]
    left: int


class FaultyS3:
    """The proxy: `endpoint` to talk to, `rate` of requests that fail (may be changed while it runs)."""

    def __init__(self, upstream: str, *, rate: float = 0.0, seed: int = 0, slow_s: float = 1.0) -> None:
        self.rate, self.slow_s = rate, slow_s
        self.done: Counter[str] = Counter()  # by fault, and "passed"
        self._upstream = urlsplit(upstream).netloc
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._plans: list[_Plan] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def plan(self, fault: Fault, when: Callable[[Request], bool], times: int = 1) -> None:
        """Do this to the next `times` requests for which `when` holds."""
        with self._lock:
            self._plans.append(_Plan(fault, when, times))

    def up_again(self) -> None:
        """Forget all plans."""
        with self._lock:
            self._plans.clear()

    def stop(self) -> None:
        """End the proxy."""
        self._server.shutdown()
        self._server.server_close()

    def choose(self, request: Request) -> Fault | None:
        """What happens to the request."""
        with self._lock:
            for plan in self._plans:
                if plan.left and plan.when(request):
                    plan.left -= 1
                    return plan.fault
            if self._random.random() >= self.rate:
                return None
            return self._random.choice(FAULTS if request.method == "GET" else WITHOUT_BODY)

    def count(self, what: str) -> None:
        """One more of these."""
        with self._lock:
            self.done[what] += 1

    def forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and body of the server's answer."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in handler.headers.items():
                if name.lower() not in _HOP_HEADERS | {"content-length"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_HEADERS]
            if answer.getheader("Content-Length") is None and handler.command != "HEAD":
                headers.append(("Content-Length", str(len(data))))
            return answer.status, headers, data
        finally:
            connection.close()


@contextlib.contextmanager
def faulty_s3(upstream: str, *, rate: float = 0.0, seed: int = 0, slow_s: float = 1.0) -> Iterator[FaultyS3]:
    """A running proxy."""
    proxy = FaultyS3(upstream, rate=rate, seed=seed, slow_s=slow_s)
    try:
        yield proxy
    finally:
        proxy.stop()


def _handler_of(proxy: FaultyS3) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        faulty = proxy

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: FaultyS3

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is written to the terminal."""

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client went away
            self._serve()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _serve(self) -> None:
        body = self._request_body()
        parts = urlsplit(self.path)
        fault = self.faulty.choose(Request(self.command, unquote(parts.path), parts.query))
        if fault == "slow_down":
            return self._refuse(fault, 503, "SlowDown", "Please reduce your request rate.")
        if fault == "internal_error":
            return self._refuse(fault, 500, "InternalError", "We encountered an internal error. Please try again.")
        if fault == "reset_before":
            return self._reset(fault)
        status, headers, data = self.faulty.forward(self, body)
        may_shorten = status == 206 or "list-type=2" in parts.query
        if fault == "lost_answer":
            return self._reset(fault)
        if fault in ("truncated", "shortened") and (self.command != "GET" or len(data) < 2):
            fault = "slow"
        if fault == "shortened" and not may_shorten:
            fault = "truncated"
        if fault == "slow":
            time.sleep(self.faulty.slow_s)
        self.faulty.count(fault or "passed")
        if fault == "shortened":
            data = data[: len(data) // 2]
            headers = [(n, v) for n, v in headers if n.lower() != "content-length"]
            headers.append(("Content-Length", str(len(data))))
        self._answer(status, headers, data[: len(data) // 2] if fault == "truncated" else data)
        if fault == "truncated":
            self.close_connection = True

    def _request_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _refuse(self, fault: str, status: int, code: str, message: str) -> None:
        self.faulty.count(fault)
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        self._answer(status, headers, body if self.command != "HEAD" else b"")

    def _reset(self, fault: str) -> None:
        self.faulty.count(fault)
        self.close_connection = True
        # Lingering for no time makes the close send a reset; it comes when the handler's files are closed.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
