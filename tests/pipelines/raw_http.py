"""Requests as bytes, for what HTTP libraries are too polite to send, and the answers to them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pipelines.running_service import Served

SOON_S = 5.0  # a refusal takes milliseconds; the machine may be busy


@dataclass(frozen=True)
class Answer:
    """What came back. status 0: the connection was closed, or reset, without an answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    took_s: float


@dataclass(frozen=True)
class Target:
    """The service under test, and its process."""

    served: Served
    pid: int

    def ask(self, *parts: bytes, timeout_s: float = 30.0) -> Answer:
        """Send the bytes as they are on a connection of their own; the first answer. TimeoutError if there is none."""
        with socket.create_connection(("127.0.0.1", self.served.port), timeout_s) as connection:
            started = time.monotonic()
            with contextlib.suppress(ConnectionError):  # it may refuse, and close, before it has read all
                for part in parts:
                    connection.sendall(part)
            status, headers, body = read_answer(connection, parts[:1] == (b"HEAD",))
            return Answer(status, headers, body, time.monotonic() - started)

    def post(self, body: bytes, content_type: bytes = b"application/json", path: bytes = b"/v1/search") -> Answer:
        return self.ask(post_head(len(body), content_type, path) + body)

    def resident_bytes(self) -> int:
        fields = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def post_head(
    size: int | str | None, content_type: bytes = b"application/json", path: bytes = b"/v1/search", more: bytes = b""
) -> bytes:
    """Head of a POST with this Content-Length, None: without one."""
    length = b"" if size is None else b"content-length: %s\r\n" % str(size).encode()
    return b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: %s\r\n%s%s\r\n" % (path, content_type, length, more)


def read_answer(connection: socket.socket, head_only: bool = False) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body (unless head_only) of the next answer; (0, {}, b"") when the connection was closed."""
    try:
        data = b""
        while b"\r\n\r\n" not in data:
            got = connection.recv(65536)
            if not got:
                return 0, {}, b""
            data += got
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        while len(body) < (0 if head_only else int(headers.get("content-length", 0))):
            got = connection.recv(65536)
            if not got:
                break
            body += got
        return int(lines[0].split()[1]), headers, body
    except ConnectionError:
        return 0, {}, b""


def check_refusal(answer: Answer, *statuses: int) -> dict[str, Any]:
    """The error of an answer that must be one of these refusals, and soon."""
    assert answer.status in statuses, (answer.status, answer.body[:300])
    assert answer.took_s < SOON_S, answer
    if not answer.body:
        return {}
    assert answer.headers["content-type"] == "application/json", answer
    error = json.loads(answer.body)["error"]
    assert error["message"] and error["code"]
    assert len(answer.body) < 2000, "a refusal repeats what it was sent"
    return dict(error)
