"""Loads a service over HTTP from a process of its own: closed (so many connections, each asks again at once) or open.

Open: requests arrive as a Poisson process, whether or not the service keeps up, and latency counts from the moment at which
a request should have been sent. Connections are kept open, as many as are needed at once. Requests are made before the
clock starts, answers are looked at by status and length only, but for the first, which is checked by the caller.

    python -m benchmarks.load_generator < SPEC.json > RESULT.json
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from typing import Any, cast

import numpy as np
import uvloop

MAX_CONNECTIONS = 2000


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request in flight."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._expected = 0
        self._head = 0
        self.done: asyncio.Future[tuple[int, bool]] | None = None
        self.transport: asyncio.Transport | None = None
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bool]]:
        """Resolves to (status, whether the connection can be used again); status 0: no answer."""
        assert self.transport is not None
        self._data.clear()
        self._expected = 0
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._expected:
            self._head = self._data.find(b"\r\n\r\n")
            if self._head < 0:
                return
            head = bytes(self._data[: self._head]).lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            self._expected = self._head + 4 + length
        if len(self._data) >= self._expected and self.done is not None and not self.done.done():
            head = bytes(self._data[: self._head]).lower()
            self.done.set_result((int(self._data[9:12]), b"connection: close" not in head))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        if self.done is not None and not self.done.done():
            self.done.set_result((0, False))


class Load:
    """The requests, the idle connections, and what was seen."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.host, self.port = spec["host"], spec["port"]
        self.requests = [_request(spec, body) for body in spec["bodies"]]
        self.idle: deque[Connection] = deque()
        self.num_connections = 0
        self.seen: list[tuple[float, float, int]] = []  # intended start, latency, status

    async def ask(self, number: int, intended: float) -> int:
        """Send one request and note what came of it. A lost connection counts as status 0."""
        connection = None
        while self.idle and (connection is None or connection.is_closed):  # the server may have closed some meanwhile
            connection = self.idle.pop()
        if connection is None or connection.is_closed:
            connection = await self._connect()
        status, again = await connection.ask(self.requests[number % len(self.requests)])
        self.seen.append((intended, time.perf_counter() - intended, status))
        if again:
            self.idle.append(connection)
        elif connection.transport is not None:
            connection.transport.close()
        return status

    async def _connect(self) -> Connection:
        self.num_connections += 1
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(Connection, self.host, self.port))[1]


def _request(spec: dict[str, Any], body: str) -> bytes:
    data = body.encode()
    head = f"POST {spec['path']} HTTP/1.1\r\nHost: {spec['host']}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def closed(load: Load, connections: int, seconds: float) -> None:
    """Each of the connections asks again as soon as it was answered."""
    until = time.perf_counter() + seconds

    async def client(number: int) -> None:
        while (now := time.perf_counter()) < until:
            await load.ask(number, now)
            number += connections

    await asyncio.gather(*(client(number) for number in range(connections)))


async def opened(load: Load, rate: float, seconds: float, seed: int) -> None:
    """Poisson arrivals of `rate` requests a second."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds))
    begin = time.perf_counter()
    tasks: set[asyncio.Task[int]] = set()
    for number, at in enumerate(np.cumsum(gaps).tolist()):
        wait = begin + at - time.perf_counter()
        # Below the loop's resolution waiting would only send late; the intended time is what counts anyway.
        await asyncio.sleep(wait if wait > 0.0005 else 0)
        if len(tasks) >= MAX_CONNECTIONS:
            load.seen.append((begin + at, 0.0, -1))  # the generator itself is full: reported, never hidden
            continue
        task = asyncio.create_task(load.ask(number, begin + at))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


def summary(seen: list[tuple[float, float, int]], began: float, cpu_s: float, wall_s: float) -> dict[str, Any]:
    """Counts by status, rate of answers 200, and latencies in ms of those, and of refusals."""
    statuses = sorted({status for _, _, status in seen})
    out: dict[str, Any] = {
        "requests": len(seen),
        "by_status": {str(status): sum(1 for s in seen if s[2] == status) for status in statuses},
        "ok_per_s": sum(1 for s in seen if s[2] == 200) / wall_s,
        "seconds": wall_s,
        "generator_cpu": cpu_s / wall_s,
    }
    for name, wanted in (("ok_ms", (200,)), ("refused_ms", (429, 503))):
        latencies = [1000 * latency for _, latency, status in seen if status in wanted]
        if latencies:
            points = np.percentile(latencies, [50, 90, 99, 100])
            out[name] = dict(zip(("p50", "p90", "p99", "max"), np.round(points, 2).tolist(), strict=True))
    return out


async def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Warm up, load, and sum up."""
    load = Load(spec)
    await closed(load, min(4, spec.get("connections", 4)), spec.get("warm_s", 0.5))
    load.seen.clear()
    began, cpu = time.perf_counter(), time.process_time()
    if spec["kind"] == "closed":
        await closed(load, spec["connections"], spec["seconds"])
    else:
        await opened(load, spec["rate"], spec["seconds"], spec.get("seed", 0))
    return summary(load.seen, began, time.process_time() - cpu, time.perf_counter() - began)


if __name__ == "__main__":
    print(json.dumps(uvloop.run(run(json.load(sys.stdin)))))
