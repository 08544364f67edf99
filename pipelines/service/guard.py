"""What stands before every route: the bearer token, names that the service answers to, sizes, and headers of each answer.

Plain ASGI, around the application: it sees every request, also those for which there is no route.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from pipelines.service.metrics import Metrics
from pipelines.service.refusals import Refusal
from pipelines.service.settings import ServiceSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_ROUTES = ("/", "/healthz", "/readyz")  # answered without a token; the page asks for it by itself
ROUTES = (*OPEN_ROUTES, "/v1/search", "/v1/index", "/metrics", "/openapi.json")
BODY_TIMEOUT_S = 10.0
LARGE_BODIES = 8  # so many of the largest size may be read at one time
SMALL_BODY_BYTES = 1 << 16  # of each body, as much as a server buffers of a connection anyway: not counted
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

log = logging.getLogger("vectormill.service")

# Beside what a route sets itself. An answer is data: nothing may frame it, run it or guess its type.
SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}


class Guard:
    """The application behind its checks. A refusal has the JSON of `Refusal`, whatever went wrong."""

    def __init__(
        self, app: App, settings: ServiceSettings, metrics: Metrics, token: str | None, hosts: Sequence[str] = ()
    ) -> None:
        """hosts: names in the Host header that are answered, without a port; empty: all."""
        self._app = app
        self._max_body_bytes = settings.max_body_bytes
        self._metrics = metrics
        self._expected = None if token is None else token.encode()
        self._hosts = frozenset(host.encode() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        path = scope["path"]
        route = path if path in ROUTES else "other"
        if scope["method"] == "HEAD":  # as a GET; the server leaves the body out
            scope = {**scope, "method": "GET"}
        status = 0
        ends = _ends_connection(scope["headers"])

        async def send_safely(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                names = {name for name, _ in headers}
                headers += [pair for pair in SECURITY_HEADERS.items() if pair[0] not in names]
                if (ends and status >= 400) or status == 408:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        try:
            try:
                self._check(scope, path)
                await self._app(scope, receive, send_safely)
            except Refusal as refusal:
                await self._refuse(refusal, send_safely)
            except ClientGone:
                pass  # nobody is left to be answered
            except Exception as error:
                log.error("%s %s failed: %r", scope["method"], route, error, exc_info=error)
                if not status:
                    fault = Refusal(500, "internal_error", "a fault of the service; its log says more")
                    await self._refuse(fault, send_safely)
        finally:
            self._metrics.answered(route, status, time.perf_counter() - started)

    def _check(self, scope: Scope, path: str) -> None:
        headers = scope["headers"]
        given: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in (b"authorization", b"content-length", b"host"):
                given[name] = value
        if self._hosts and _host_of(given.get(b"host", b"")) not in self._hosts:
            raise Refusal(
                421,
                "misdirected_request",
                "the service listens on loopback and answers to localhost only; start it with --host and a token to"
                " answer to other names",
                where="header Host",
                got=given.get(b"host", b"").decode("latin-1"),
            )
        if self._expected is not None and path not in OPEN_ROUTES:
            sent = given.get(b"authorization")
            if sent is None or not hmac.compare_digest(_bearer_token(sent), self._expected):
                what = "is missing" if sent is None else "is not the service's"
                raise Refusal(
                    401,
                    "unauthorized",
                    f"the bearer token {what}; send the header `Authorization: Bearer TOKEN`",
                    where="header Authorization",
                )
        length = given.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._max_body_bytes:
            raise too_large(self._max_body_bytes, length.decode("latin-1"))

    async def _refuse(self, refusal: Refusal, send: Send) -> None:
        self._metrics.refused.labels(refusal.code).inc()
        body = refusal.body()
        headers = [(name.encode(), value.encode()) for name, value in refusal.headers().items()]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def too_large(max_body_bytes: int, got: str | int) -> Refusal:
    """413."""
    return Refusal(
        413,
        "body_too_large",
        f"a body must have at most {max_body_bytes} bytes (--max-body-bytes of the service); split the request, or send"
        " vectors as vectors_b64",
        where="body",
        got=got,
    )


class BodyReader:
    """Reads bodies. Those that are not whole yet hold together so much memory at most, however many connections there are."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._room = LARGE_BODIES * max_body_bytes

    async def read(self, receive: Receive) -> bytes:
        """The whole body. Raises Refusal once it is longer, or when it does not come; ClientGone when the client has gone."""
        message = await _next_message(receive, BODY_TIMEOUT_S)
        if not message.get("more_body", False) and len(message.get("body", b"")) <= self._max_body_bytes:
            return bytes(message.get("body", b""))
        chunks, size, taken, until = [], 0, 0, time.monotonic() + BODY_TIMEOUT_S
        try:
            while True:
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > self._max_body_bytes:
                    raise too_large(self._max_body_bytes, f"more than {self._max_body_bytes}")
                more = max(0, size - SMALL_BODY_BYTES) - taken
                if more > self._room:
                    raise Refusal(
                        429,
                        "too_many_requests",
                        f"the service reads {LARGE_BODIES} bodies of the largest size at one time (--max-body-bytes) and has no"
                        " room for more; come again later, or send smaller requests",
                        where="body",
                        retry_after_s=1,
                    )
                self._room -= more
                taken += more
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
                message = await _next_message(receive, until - time.monotonic())
        finally:
            self._room += taken


async def _next_message(receive: Receive, timeout_s: float) -> Message:
    try:
        async with asyncio.timeout(timeout_s):
            message = await receive()
    except TimeoutError:
        raise Refusal(
            408, "request_timeout", f"the body must be sent within {BODY_TIMEOUT_S:g} s; send it faster", where="body"
        ) from None
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message


class ClientGone(Exception):
    """The client closed the connection before its request was whole."""


def _ends_connection(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether a refusal ends the connection: else the server would read to its end a body that nobody wants."""
    for name, value in headers:
        if name == b"transfer-encoding":
            return True
        if name == b"content-length":
            return not value.isdigit() or len(value) > 5
    return False


def _bearer_token(header: bytes) -> bytes:
    """`Bearer x` -> `x`, the scheme in any case; of anything else what no token equals."""
    scheme, _, token = header.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _host_of(header: bytes) -> bytes:
    """`localhost:8000` -> `localhost`, `[::1]:8000` -> `[::1]`."""
    if header.startswith(b"["):
        return header[: header.find(b"]") + 1].lower()
    return header.split(b":", 1)[0].lower()
