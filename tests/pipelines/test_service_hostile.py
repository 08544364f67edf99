"""Requests that no library would send: each gets a clear 4xx or a closed connection soon, and no fault, file or memory."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.service.settings import ServiceSettings
from tests.pipelines.hostile_bodies import BREAKS_A_RULE, NOT_JSON, QUERY, VECTOR, encoded
from tests.pipelines.nightly_site import Site
from tests.pipelines.raw_http import SOON_S, Answer, Target, check_refusal, post_head, read_answer
from tests.pipelines.running_service import serving, serving_process

TOKEN = "a-token-of-some-length"
MAX_BODY_BYTES = 2 << 20  # of the service under test
MEMORY_GROWTH_BYTES = 150 << 20  # what hostile requests may leave the service larger by, with what the allocator keeps


@pytest.fixture(scope="module", params=["one process", pytest.param("ray serve", marks=pytest.mark.slow)])
def target(served_site: Site, request: pytest.FixtureRequest) -> Iterator[Target]:
    how = ["--no-ray", "--port", "0"] if request.param == "one process" else ["--port", str(free_port())]
    with serving_process(served_site.root, "--max-body-bytes", str(MAX_BODY_BYTES), *how) as (served, pid):
        assert served.search(queries=["wing"])["results"][0]["hits"]
        yield Target(served, pid)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture(autouse=True)
def _the_service_goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the same service answers as before."""
    yield
    if "target" in request.fixturenames:
        served = request.getfixturevalue("target").served
        assert served.search(queries=["wing"], k=1)["results"][0]["hits"][0]["rank"] == 1


@pytest.mark.parametrize("name", NOT_JSON)
def test_a_body_that_is_not_json_is_a_400(target: Target, name: str) -> None:
    error = check_refusal(target.post(NOT_JSON[name]), 400)
    assert error["code"] == "bad_json"


@pytest.mark.parametrize("name", BREAKS_A_RULE)
def test_a_body_that_breaks_a_rule_is_a_422_that_names_the_place(target: Target, name: str) -> None:
    error = check_refusal(
        target.post(BREAKS_A_RULE[name]), 422, *([400] if "digits" in name or "1e400" in name else [])
    )
    assert error["where"]


@pytest.mark.parametrize(
    "text", ["\x00", "a\x00b", "\u202e\u2066", "\U0001f600" * 50, "́" * 200, "\ufffe\uffff", "%s%n{}{0}"]
)
def test_any_text_is_a_question(target: Target, text: str) -> None:
    answer = target.post(encoded(queries=["wing", text]))
    assert answer.status in (200, 422), answer.body[:300]  # 422: nothing is left of it after cleaning
    assert answer.took_s < SOON_S


@pytest.mark.parametrize(
    "prefix", ["../../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "..\\..", "\x00", "%2e%2e/", "${HOME}"]
)
def test_a_prefix_is_compared_and_never_opened(target: Target, prefix: str) -> None:
    answer = target.post(encoded(queries=["wing"], doc_id_prefix=prefix))
    assert answer.status == 200, answer.body[:300]
    assert json.loads(answer.body)["results"] == [{"hits": []}]


def test_names_that_come_twice_do_not_confuse(target: Target) -> None:
    answer = target.post(QUERY + b'"k": 2, "k": 1000000}')
    check_refusal(answer, 400, 422)


@pytest.mark.parametrize(
    "content_type", [b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x", b"", b"application/jsonx", b"\xff"]
)  # fmt: skip
def test_another_content_type_is_a_415(target: Target, content_type: bytes) -> None:
    check_refusal(target.post(encoded(queries=["wing"]), content_type), 415)


@pytest.mark.parametrize("content_type", [b"application/json", b"Application/JSON; charset=utf-8"])
def test_json_is_taken_however_it_is_spelled(target: Target, content_type: bytes) -> None:
    assert target.post(encoded(queries=["wing"]), content_type).status == 200


PATHS = [
    b"/../../../../etc/passwd", b"/%2e%2e/%2e%2e/%2e%2e/etc/passwd", b"/..%2f..%2f..%2fetc%2fpasswd", b"//etc/passwd",
    b"/v1/../../../etc/passwd", b"/v1/index/../../../etc/passwd", b"/..%5c..%5cetc%5cpasswd", b"/etc/passwd%00.html",
    b"/%00", b"/%ff%fe", b"/static/page.html", b"/page.html", b"/page.py", b"/CURRENT", b"/.git/config", b"/docs", b"/redoc",
    b"/v1/search/", b"/v1/index/", b"/V1/INDEX", b"file:///etc/passwd", b"/" + b"a" * 20_000,
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40].decode())
def test_no_path_leads_to_a_file(target: Target, path: bytes) -> None:
    answer = target.ask(b"GET %s HTTP/1.1\r\nhost: localhost\r\n\r\n" % path)
    assert b"root:" not in answer.body and "location" not in answer.headers
    assert answer.status in (400, 404, 414), (answer.status, answer.body[:200])
    assert answer.took_s < SOON_S


@pytest.mark.parametrize(
    "method", ["HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "CONNECT", "PROPFIND", "FOO", "get"]
)
def test_other_methods_are_refused_and_say_which_are_not(target: Target, method: str) -> None:
    for path in ("/v1/search", "/v1/index", "/"):
        answer = target.ask(method.encode(), f" {path} HTTP/1.1\r\nhost: localhost\r\nx-secret: 1\r\n\r\n".encode())
        if method == "HEAD" and path != "/v1/search":
            assert answer.status == 200
            continue
        assert answer.status in (400, 404, 405, 501), (method, path, answer)
        assert b"x-secret" not in answer.body  # TRACE gives nothing back
        assert answer.status != 405 or answer.headers["allow"]


def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent(target: Target) -> None:
    for size in (MAX_BODY_BYTES + 1, 10**12, 10**30):
        error = check_refusal(target.ask(post_head(size)), 400, 413)
        assert error["code"] == ("body_too_large" if size < 2**64 else "bad_http")


def test_the_largest_body_is_taken_and_one_byte_more_is_not(target: Target) -> None:
    body = encoded(queries=["wing"], k=1)
    assert target.post(body + b" " * (MAX_BODY_BYTES - len(body))).status == 200
    check_refusal(target.post(body + b" " * (MAX_BODY_BYTES - len(body) + 1)), 413)


def test_a_chunked_body_without_an_end_is_cut(target: Target) -> None:
    before = target.resident_bytes()
    with socket.create_connection(("127.0.0.1", target.served.port), 30) as connection:
        connection.sendall(post_head(None, more=b"transfer-encoding: chunked\r\n"))
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 50 * MAX_BODY_BYTES:
                connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
                sent += 65536
        assert sent < 20 * MAX_BODY_BYTES  # what lay in the sockets' buffers
    assert target.resident_bytes() - before < MEMORY_GROWTH_BYTES


@pytest.mark.parametrize(
    "more",
    [
        b"content-length: -1\r\n", b"content-length: 2x\r\n", b"content-length: 0x10\r\n", b"content-length: 4, 5\r\n",
        b"content-length: 4\r\ncontent-length: 5\r\n", b"content-length: \xb2\r\n",
        b"content-length: 4\r\ntransfer-encoding: chunked\r\n", b"transfer-encoding: gzip\r\n",
        b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n", b"bad header\r\n", b"x: a\x00b\r\n", b": empty\r\n",
    ],
)  # fmt: skip
def test_a_head_that_can_be_read_in_two_ways_is_refused(target: Target, more: bytes) -> None:
    answer = target.ask(post_head(None, more=more) + b"5\r\nhello\r\n0\r\n\r\n")
    assert answer.status in (0, 400, 413, 415, 501), answer
    assert answer.took_s < SOON_S


@pytest.mark.parametrize(
    "chunk", [b"zz\r\nhello\r\n", b"-5\r\nhello\r\n", b"F" * 17 + b"\r\nhello\r\n", b"5\r\nhelloX\r\n0\r\n\r\n"]
)
def test_chunks_that_are_none_are_refused(target: Target, chunk: bytes) -> None:
    answer = target.ask(post_head(None, more=b"transfer-encoding: chunked\r\n") + chunk)
    assert answer.status in (0, 400, 413), answer
    assert answer.took_s < SOON_S


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\r\n\r\n",
        b"\r\n" * 100 + b"x\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1 HTTP/1.1\r\nhost: a\r\n\r\n", os.urandom(4096),
        b"GET  HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nhost: localhost\nx: y\r\r\n\r\n",
    ],
    ids=["TLS", "HTTP/2", "HTTP/0.9", "empty lines", "HTTP/9.9", "version twice", "random", "no path", "line ends"],
)  # fmt: skip
def test_what_is_not_http_is_closed_or_refused(target: Target, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", target.served.port), SOON_S) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        status, _, _ = read_answer(connection)
    assert status == 0 or 400 <= status < 500 or data.startswith((b"GET / HTTP/1.1", b"GET / HTTP/9.9"))


def test_a_websocket_is_refused(target: Target) -> None:
    upgrade = b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
    for path in (b"/", b"/v1/search"):
        answer = target.ask(b"GET %s HTTP/1.1\r\nhost: localhost\r\n%s\r\n" % (path, upgrade))
        assert answer.status in (400, 403, 404, 405, 426) or (path == b"/" and answer.status == 200), answer


@pytest.mark.parametrize(
    "host", [b"evil.example", b"localhost.evil.example", b"127.0.0.1.evil.example:80", b"", b"[::1", b"a" * 5000]
)
def test_a_name_that_leads_here_from_elsewhere_is_not_answered(target: Target, host: bytes) -> None:
    answer = target.ask(b"GET /v1/index HTTP/1.1\r\nhost: %s\r\n\r\n" % host)
    check_refusal(answer, 400, 421)


def test_requests_sent_at_once_are_answered_in_their_order(target: Target) -> None:
    ks = [1, 2, 0, 3, 4]
    requests = [post_head(len(body)) + body for k in ks for body in [encoded(queries=["wing"], k=k)]]
    with socket.create_connection(("127.0.0.1", target.served.port), 30) as connection:
        connection.sendall(b"".join(requests))
        data = b""
        while data.count(b"HTTP/1.1 ") < len(ks) or not data.endswith(b"}"):
            got = connection.recv(65536)
            assert got, data
            data += got
    answers = data.split(b"HTTP/1.1 ")[1:]
    assert [int(answer[:3]) for answer in answers] == [200, 200, 422, 200, 200]
    assert [answer.count(b'"rank"') for answer in answers] == ks


def test_a_flood_of_headers_is_refused_in_bounded_memory(target: Target) -> None:
    before = target.resident_bytes()
    for line in (b"x-%07d: " + b"y" * 100 + b"\r\n", b"x-%07d: " + b"y" * 1_000_000 + b"\r\n"):
        with socket.create_connection(("127.0.0.1", target.served.port), 30) as connection:
            connection.sendall(b"GET /v1/index HTTP/1.1\r\nhost: localhost\r\n")
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 64 << 20:
                    block = b"".join(line % (sent + i) for i in range(1 + 60_000 // len(line)))
                    connection.sendall(block)
                    sent += len(block)
            assert sent < 32 << 20, "it took all of them"
    assert target.resident_bytes() - before < MEMORY_GROWTH_BYTES


def test_a_head_of_an_ordinary_size_is_taken(target: Target) -> None:
    more = b"".join(b"x-%03d: %s\r\n" % (number, b"y" * 100) for number in range(60))
    assert target.ask(b"GET /v1/index HTTP/1.1\r\nhost: localhost\r\n%s\r\n" % more).status == 200


def test_many_large_bodies_at_once_leave_no_memory_behind(target: Target) -> None:
    before = target.resident_bytes()
    heavy = [
        encoded(queries=["a" * 8000] * 240),
        encoded(queries=[""] * 500_000),
        encoded(vectors=[VECTOR] * 900),
        b"[" + b"{}," * 600_000 + b"{}]",
    ]
    assert all(len(body) < MAX_BODY_BYTES for body in heavy)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(target.post, heavy[1:] * 8))
    assert {answer.status for answer in answers} <= {422, 429}
    assert target.resident_bytes() - before < MEMORY_GROWTH_BYTES


SLOW = {
    "a body that does not come": [post_head(1000)],
    "half of a body": [post_head(1000), b'{"queries": ["wing"'],
    "a chunked body that stops": [post_head(None, more=b"transfer-encoding: chunked\r\n"), b"5\r\n{    \r\n"],
    "half of a head": [b"GET /v1/index HTTP/1.1\r\nhost: loc"],
    "nothing at all": [],
}


def test_who_sends_too_slowly_is_let_go(target: Target) -> None:
    with ThreadPoolExecutor(len(SLOW) + 2) as pool:
        waiting = {name: pool.submit(target.ask, *parts, timeout_s=30) for name, parts in SLOW.items()}
        waiting["a drip of a body"] = pool.submit(drip, target, post_head(1_000_000))
        waiting["a drip of a head"] = pool.submit(drip, target, b"GET /v1/index HTTP/1.1\r\nx: ")
        answers = {name: answer.result() for name, answer in waiting.items()}
    assert {name: answer.status for name, answer in answers.items() if answer.status not in (0, 408)} == {}
    assert answers["half of a body"].headers["connection"] == "close"


def drip(target: Target, head: bytes) -> Answer:
    """The answer to a request that goes on by a byte every half a second. TimeoutError if there is none in 30 s."""
    with socket.create_connection(("127.0.0.1", target.served.port), 0.5) as connection:
        connection.sendall(head)
        started = time.monotonic()
        while time.monotonic() < started + 30:
            try:
                connection.sendall(b" ")
                return Answer(*read_answer(connection), time.monotonic() - started)
            except TimeoutError:
                continue
            except ConnectionError:
                return Answer(0, {}, b"", time.monotonic() - started)
    raise TimeoutError(f"{head[:30]!r} is still open")


def test_clients_that_go_away_leave_nothing_behind(target: Target) -> None:
    body = encoded(queries=["wing"] * 200)
    for cut in (10, len(body)):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", target.served.port), 30) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                connection.sendall(post_head(len(body)) + body[:cut])
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        lines = target.ask(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n").body.decode().splitlines()
        waiting = next(float(line.split()[1]) for line in lines if line.startswith("vectormill_queue_queries "))
        if not waiting:
            return
        time.sleep(0.1)
    raise AssertionError(f"{waiting:.0f} queries are still waiting for clients that went away")


@pytest.fixture(scope="module")
def closed(served_site: Site) -> Iterator[Target]:
    """A service that asks for TOKEN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOSTILE_TOKEN", TOKEN)
        with serving(ServiceSettings(served_site.root, token_env="HOSTILE_TOKEN")) as served:
            yield Target(served, os.getpid())


def _authorised(target: Target, *headers: bytes) -> Answer:
    sent = b"".join(b"authorization: %s\r\n" % header for header in headers)
    return target.ask(b"GET /v1/index HTTP/1.1\r\nhost: any.example\r\n%s\r\n" % sent)


@pytest.mark.parametrize(
    "header",
    [
        b"", b"Bearer", b"Bearer ", f"Bearer {TOKEN[:-1]}".encode(), f"Bearer {TOKEN}x".encode(), f"Bearer {TOKEN.upper()}".encode(),
        f"Basic {TOKEN}".encode(), TOKEN.encode(), b"Bearer \xc3\xa9\xff", b"Bearer " + b"a" * 30_000, f"Bearer {TOKEN},x".encode(),
    ],
)  # fmt: skip
def test_only_the_token_itself_opens(closed: Target, header: bytes) -> None:
    error = check_refusal(_authorised(closed, header), 400, 401)
    assert TOKEN not in str(error)
    for path in (b"/metrics", b"/openapi.json", b"/v1/search", b"/nowhere"):
        answer = closed.ask(b"GET %s HTTP/1.1\r\nhost: a\r\nauthorization: %s\r\n\r\n" % (path, header))
        assert answer.status in (400, 401), (path, answer)


def test_the_token_opens_and_a_refusal_says_how(closed: Target) -> None:
    assert _authorised(closed, f"Bearer {TOKEN}".encode()).status == 200
    assert _authorised(closed, f"bearer {TOKEN}".encode()).status == 200
    refused = _authorised(closed)
    check_refusal(refused, 401)
    assert refused.headers["www-authenticate"].startswith("Bearer")
    for path in (b"/", b"/healthz", b"/readyz"):
        assert closed.ask(b"GET %s HTTP/1.1\r\nhost: a\r\n\r\n" % path).status == 200
