"""A small index with hostile, long and non-Latin documents, and the service of it on a port of this machine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import uvicorn

from pipelines.operating_points import measure_operating_points
from pipelines.service.api import create_app
from pipelines.service.protocol import LimitedProtocol
from pipelines.service.settings import ServiceSettings
from tests.pipelines.nightly_site import Site

START_TIMEOUT_S = 60.0

HOSTILE = '<script>window.owned = 1</script><img src=x onerror="window.owned = 1"> &amp; <b>bold</b>'
HOSTILE_ID = "<img src=x onerror=window.owned=1>"
ARABIC = "السلام عليكم ورحمة الله وبركاته (m × n) في الجبر"
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 3
LONG_WORD = "w" * 700
LINES = "first line\n    indented line\n\nlast line " + "and more of it " * 12
DOCS = [
    (HOSTILE_ID, HOSTILE),
    ("javascript:alert(1)//" + "x" * 200, "javascript: in an id that is long"),
    ("ar-1", ARABIC),
    ("ja-1", JAPANESE),
    ("long-1", LONG_WORD),
    ("lines-1", LINES),
    *[(f"plain-{number}", f"the wing of plane {number} and its flow") for number in range(14)],
]


def make_site(folder: Path, model: Path) -> Site:
    """An index of DOCS with operating points; each document is one chunk."""
    site = Site(folder, model)
    site.put("docs.jsonl", DOCS)
    site.build("chunk.mode=truncate", "index.M=48")
    measure_operating_points(site.root, (0.9, 0.99))
    return site


@dataclass(frozen=True)
class Served:
    """Where a service answers."""

    port: int
    token: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        """Parsed JSON of a GET; the JSON of the error for what is refused."""
        return self._ask(urllib.request.Request(self.url + path))

    def search(self, **fields: Any) -> Any:
        """Parsed JSON of a search; the JSON of the error for what is refused."""
        body = json.dumps(fields).encode()
        return self._ask(
            urllib.request.Request(self.url + "/v1/search", body, {"content-type": "application/json"}, method="POST")
        )

    def _ask(self, request: urllib.request.Request) -> Any:
        if self.token is not None:
            request.add_header("authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return json.load(error)


@contextlib.contextmanager
def serving(settings: ServiceSettings) -> Iterator[Served]:
    """The service in a thread of this process, on a free port of loopback."""
    config = uvicorn.Config(
        create_app(settings), "127.0.0.1", 0, http=LimitedProtocol, log_level="error", lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="service")
    thread.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the service did not start"
            time.sleep(0.02)
        yield Served(server.servers[0].sockets[0].getsockname()[1], settings.token())
    finally:
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def serving_process(*arguments: str) -> Iterator[tuple[Served, int]]:
    """`vectormill serve ...` in a process of its own, and the process's id. AssertionError if it logged a fault."""
    command = [sys.executable, "-m", "pipelines.cli", "serve", *arguments, "--json"]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8")
        assert process.stdout is not None
        try:
            said = ""
            while not said.rstrip().endswith("}"):
                line = process.stdout.readline()
                assert line, f"the service ended before it was ready:\n{_content(log)}"
                said += line
            url = json.loads(said)["url"]
            yield Served(int(url.rpartition(":")[2])), process.pid
        finally:
            process.terminate()
            process.wait(60)
            process.stdout.close()
        assert "Traceback" not in _content(log), _content(log)


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
