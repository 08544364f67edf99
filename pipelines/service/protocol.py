"""HTTP/1.1 as uvicorn speaks it, with bounds on the head of a request that uvicorn has no settings for: its size, and its time."""

from __future__ import annotations

import asyncio

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pipelines.service.refusals import Refusal

MAX_HEAD_BYTES = 64 << 10  # request line and headers
HEAD_TIMEOUT_S = 10.0  # from the connection, or from the first byte of a further request


class LimitedProtocol(HttpToolsProtocol):
    """A connection. What is too slow, too large or no HTTP gets an error in JSON, and is closed."""

    _in_head = True
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_over()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # The head of nearly every request comes in one piece: then nothing is counted and no timer set.
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            self._expect_head()
            if self._head_bytes > MAX_HEAD_BYTES:
                self._close_with(
                    Refusal(431, "head_too_large", f"request line and headers must have at most {MAX_HEAD_BYTES} bytes")
                )
        elif self._head_timer is not None or self._head_bytes:
            self._head_is_over()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers to what it cannot parse, in the shape of all refusals."""
        self._close_with(Refusal(400, "bad_http", f"this is not a request in HTTP/1.1: {msg}"))

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _head_is_over(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if not self._head_bytes:  # connected and said nothing: a browser does so to be ahead, and wants no answer
            self.transport.close()
            return
        self._close_with(
            Refusal(408, "request_timeout", f"request line and headers must come within {HEAD_TIMEOUT_S:g} s")
        )

    def _close_with(self, refusal: Refusal) -> None:
        self._head_is_over()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # an answer to an earlier request is under way: no other may stand in its place
            return
        body = refusal.body()
        headers = {**refusal.headers(), "content-length": str(len(body)), "connection": "close"}
        lines = [f"{name}: {value}\r\n".encode() for name, value in headers.items()]
        self.transport.write(b"".join([STATUS_LINE[refusal.status], *lines, b"\r\n", body]))
        self.transport.close()


def limit_serve_proxy() -> list[object]:
    """Make the uvicorn of this process speak LimitedProtocol; no further middleware.

    For Ray Serve's proxy, which takes no protocol as a setting but calls what RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names before
    it starts its uvicorn (Ray 2.60).
    """
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{LimitedProtocol.__name__}"
    return []
