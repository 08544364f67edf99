"""A reader that never stops looking: CURRENT, its version, a search; for the fault tests, in a process of its own.

Lines on standard input: `watch ROOT` begins, `tell` prints what was seen after one more round as a line of JSON ({"root",
"rounds", "searches", "versions", "failures"}), `leave` does so and ends. Every round: CURRENT is read, its version must be
whole (checksums of manifest and part records, all objects there), and every index that was opened so far at this root must
answer a search as it first did. The reader moves to a version that is new (`Index.reopened`), and reads and checks all of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import numpy as np

from operators.artifact.index import Index
from operators.artifact.manifest import read_current
from operators.storage.store import open_store
from pipelines.verify import verify
from pipelines.versions import check_whole
from tests.faults.running import REPO_ROOT

ROUND_S = 0.1  # between rounds: the reader shares the machine with what it watches
REPLY_TIMEOUT_S = 60.0
MAX_FAILURES = 5
NUM_QUERIES = 4
K = 5


class Watch:
    """What was seen at one root."""

    def __init__(self, root: str) -> None:
        self.store = open_store(root)
        self.facts: dict[str, Any] = {"root": root, "rounds": 0, "searches": 0, "versions": [], "failures": []}
        self._index: Index | None = None  # of the version that was last seen to be published
        self._open: dict[str, tuple[Index, list[Any]]] = {}

    def look(self) -> None:
        """One round. What is wrong is written down, not raised."""
        try:
            self._look()
        except Exception:
            self._fail(traceback.format_exc(limit=-4))
        self.facts["rounds"] += 1

    def _fail(self, text: str) -> None:
        if len(self.facts["failures"]) < MAX_FAILURES:
            self.facts["failures"].append(f"round {self.facts['rounds']}: {text}")

    def _look(self) -> None:
        found = read_current(self.store)
        if found is None:
            if self.facts["versions"]:
                self._fail("CURRENT is gone")
            return
        held = check_whole(self.store, found[0]["version"])
        if held.digest != found[0]["manifest"]:
            self._fail(f"the manifest of {held.version} is not the one that CURRENT names")
        index = Index.open(self.store) if self._index is None else self._index.reopened()
        if index is not self._index:
            self._index = index
            self._move(index)
        for name, (opened, first) in self._open.items():
            if self._answers(opened) != first:
                self._fail(f"{name} does not answer as it first did")

    def _move(self, index: Index) -> None:
        version = index.manifest.version
        if version not in self.facts["versions"]:
            self.facts["versions"].append(version)
        problems = verify(self.store.url, version)["problems"]
        if problems:
            self._fail(f"{version} does not verify: {problems}")
        self._open[version] = index, self._answers(index)

    def _answers(self, index: Index) -> list[Any]:
        """Scores and row ids of the hits, and the stored rows of the best ones."""
        queries_Qd = np.random.default_rng(7).standard_normal((NUM_QUERIES, index.manifest.d)).astype(np.float32)
        found = index.search(queries_Qd, K)
        best = found.entries_Qk[:, 0]
        self.facts["searches"] += 1
        return [found.scores_Qk.tolist(), found.row_ids_Qk.tolist(), index.rows_of(best[best >= 0])]


class Reader:
    """The reader's process, seen from the test. A context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.reader"],
            cwd=REPO_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def watch(self, root: str) -> None:
        """Look at this root from now on."""
        self._say(f"watch {root}")

    def leave(self) -> dict[str, Any]:
        """What was seen at the root, after one more round; the reader lets go of it. AssertionError without an answer."""
        return self.tell("leave")

    def tell(self, order: str = "tell") -> dict[str, Any]:
        """What was seen at the root, after one more round. AssertionError when the reader does not answer."""
        lines: list[str] = []
        assert self._process.stdout is not None
        self._say(order)
        asking = threading.Thread(target=lambda: lines.append(self._process.stdout.readline()), daemon=True)  # type: ignore[union-attr]
        asking.start()
        asking.join(REPLY_TIMEOUT_S)
        assert lines and lines[0], f"the reader has not answered for {REPLY_TIMEOUT_S:.0f} s"
        return dict(json.loads(lines[0]))

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()


def main() -> None:
    """Follow the lines of standard input until it ends."""
    orders: list[str] = []
    ended = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            orders.append(line.strip())
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    watch: Watch | None = None
    while not ended.is_set() or orders:
        order, _, root = orders.pop(0).partition(" ") if orders else ("", "", "")
        if order == "watch":
            watch = Watch(root)
        if watch is not None:
            watch.look()
        if order in ("tell", "leave") and watch is not None:
            print(json.dumps(watch.facts), flush=True)
            watch = None if order == "leave" else watch
        time.sleep(ROUND_S)


if __name__ == "__main__":
    main()
