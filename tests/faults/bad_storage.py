"""`python -m tests.faults.bad_storage --rate 0.1`: builds, updates, rolls back, collects and compacts through bad storage.

Corpus and index lie on a local S3 server behind the fault-injecting proxy of faulty_s3.py. Every command runs twice: without
faults on a root on the local disk, and with `--rate` of all requests failing in a way drawn by `--seed`. Each must exit
with 0 and leave the version with the same content_digest, and the disturbed root must pass `verify` at the end. With
`--down` the storage fails altogether, from the first request and from the middle of a build: the command must end with
a clear error in bounded time, and the next one must finish the work.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import s3fs

from operators.artifact.manifest import open_current
from operators.errors import SourceError
from operators.storage import retrying_s3
from operators.storage.store import open_store
from pipelines import cli
from pipelines.demo_corpus import collect_documents
from tests.faults.faulty_s3 import FaultyS3, Request, faulty_s3
from tests.pipelines.build_corpus import IN_PROCESS, SMALL_UNITS

STEPS = ("build", "update", "rollback", "gc", "forward", "compact")
DOCUMENTS = 60
# An index that cannot be reached, a corpus that cannot be listed or read.
DOWN_CODES = (cli.STORAGE_EXIT_CODE, SourceError.exit_code)
BUCKET = "bad-storage"


@dataclass
class Outcome:
    """What a command did: exit code, output and how long it took."""

    code: int
    out: str
    err: str
    seconds: float
    done: dict[str, int] = field(default_factory=dict)  # requests by fault, and "passed"

    @property
    def facts(self) -> dict[str, Any]:
        """What the command printed with --json."""
        return dict(json.loads(self.out))


def run_command(*arguments: str) -> Outcome:
    """A command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    started = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([*arguments, "--json"])
    return Outcome(code, out.getvalue(), err.getvalue(), time.monotonic() - started)


class BadStorage:
    """The corpus in two states below `place` (s3://bucket/prefix), and the commands on a root."""

    def __init__(self, place: str, upstream: str, proxy: FaultyS3, documents: int = DOCUMENTS) -> None:
        self.place, self.proxy = place, proxy
        self.root = f"{place}/root"
        self._fs = s3fs.S3FileSystem(endpoint_url=upstream)  # writes the corpus without faults
        self._documents = [(d.name, d.text[:200]) for d in collect_documents(documents)]

    def write_state(self, state: int) -> None:
        """State 2: one object as it was, one edited and cut, one gone, one new."""
        third = len(self._documents) // 3
        a, b, c = (self._documents[third * n : third * (n + 1)] for n in range(3))
        files = {"a.jsonl": a, "b.jsonl": b, "c.jsonl": c[: third // 2]}
        if state == 2:
            edited = [(name, text + " Edited.") for name, text in b[:4]]
            files = {"b.jsonl": edited + b[7:], "d.jsonl": c[third // 2 :]}
            self._fs.rm_file(f"{self.place}/corpus/c.jsonl")
        for name, documents in files.items():
            lines = [json.dumps({"id": doc_id, "text": text}) + "\n" for doc_id, text in documents]
            self._fs.pipe_file(f"{self.place}/corpus/{name}", "".join(lines).encode())

    def run(self, step: str, where: str, rate: float = 0.0) -> Outcome:
        """One command on the root `where` while `rate` of the requests fail."""
        settings = [word for setting in (*SMALL_UNITS, IN_PROCESS) for word in ("--set", setting)]
        arguments = {
            "build": ["build", f"{self.place}/corpus", "--out", where, "--quiet", *settings],
            "update": ["update", f"{self.place}/corpus", "--index", where, "--quiet", "--set", IN_PROCESS],
            "compact": ["compact", where, "--quiet", "--set", IN_PROCESS],
            "rollback": ["rollback", where],
            "forward": ["rollback", where, newest_version(where)] if step == "forward" else [],
            "gc": ["gc", where, "--keep", "5", "--min-age", "0s", "--delete"],
            "verify": ["verify", where],
        }[step]
        before = dict(self.proxy.done)
        self.proxy.rate = rate
        try:
            outcome = run_command(*arguments)
        finally:
            self.proxy.rate = 0.0
        outcome.done = {kind: count - before.get(kind, 0) for kind, count in self.proxy.done.items()}
        return outcome


def newest_version(root: str) -> str:
    """The last version that a run made there."""
    return max((key.split("/")[1] for key in open_store(root).list_keys("versions")), default="")


def content_digest(root: str) -> str:
    """Of the published version."""
    return open_current(open_store(root)).content_digest


def disturb(
    storage: BadStorage, clean_root: str, rate: float, steps: Sequence[str] = STEPS
) -> Iterator[tuple[str, Outcome, bool]]:
    """Runs the steps on two roots, undisturbed on `clean_root` and with faults on a root of the storage.

    Yields step, the disturbed outcome, and whether it succeeded and published what the other did.
    """
    storage.write_state(1)
    for step in steps:
        if step == "update":
            storage.write_state(2)
        clean = storage.run(step, clean_root)
        assert clean.code == 0, f"the undisturbed {step} failed: {clean.err}"
        bad = storage.run(step, storage.root, rate)
        yield step, bad, bad.code == 0 and content_digest(clean_root) == content_digest(storage.root)
    checked = storage.run("verify", storage.root)
    yield "verify", checked, checked.code == 0


def down_from(proxy: FaultyS3, first: int) -> Callable[[], float]:
    """After `first` more requests every one fails, until `up_again`. Returns what tells the seconds since the first did."""
    seen, began = 0, 0.0

    def after(request: Request) -> bool:
        nonlocal seen, began
        seen += 1
        if seen == first + 1:
            began = time.monotonic()
        return seen > first

    proxy.plan("internal_error", after, times=1_000_000)
    return lambda: time.monotonic() - began


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Endpoint of a local S3 server with an empty bucket, for runs outside pytest."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # one line per request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")
    os.environ.update(AWS_EC2_METADATA_DISABLED="true", AWS_CONFIG_FILE=os.devnull, HF_HUB_OFFLINE="1")
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def main() -> int:
    """0 when every command ended as it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.1, help="share of requests that fail")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each round takes the next")
    parser.add_argument("--rounds", type=int, default=1, help="times to go through all commands")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="in the corpus")
    parser.add_argument("--steps", default=",".join(STEPS), help="commands, in order")
    parser.add_argument("--down", action="store_true", help="the storage is down altogether, instead of --rate")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    options = parser.parse_args()
    logs = [retrying_s3.REQUEST_DEADLINE_S, retrying_s3.ATTEMPT_TIMEOUT_S]
    failed = 0
    with s3_server() as upstream, tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            seed = options.seed + number
            with faulty_s3(upstream, seed=seed) as proxy:
                os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
                place = f"s3://{BUCKET}-{seed}/run"
                s3fs.S3FileSystem(endpoint_url=upstream).mkdir(f"{BUCKET}-{seed}")
                storage = BadStorage(place, upstream, proxy, options.documents)
                found = (
                    _down(storage)
                    if options.down
                    else disturb(storage, f"{folder}/{seed}", options.rate, options.steps.split(","))
                )
                for step, outcome, good in found:
                    failed += not good
                    _show(options.json, seed, step, outcome, good)
    print(f"deadline of a request {logs[0]:.0f} s, of an attempt {logs[1]:.0f} s; {failed} failed", file=sys.stderr)
    return 1 if failed else 0


def _down(storage: BadStorage) -> Iterator[tuple[str, Outcome, bool]]:
    storage.write_state(1)
    for first in (0, 40):
        since = down_from(storage.proxy, first)
        outcome = storage.run("build", storage.root)
        outcome.seconds = since()
        storage.proxy.up_again()
        in_time = outcome.seconds < 2 * (retrying_s3.REQUEST_DEADLINE_S + retrying_s3.ATTEMPT_TIMEOUT_S)
        yield f"build, down from request {first}", outcome, outcome.code in DOWN_CODES and in_time
    outcome = storage.run("build", storage.root)
    yield "build, up again", outcome, outcome.code == 0


def _show(as_json: bool, seed: int, step: str, outcome: Outcome, good: bool) -> None:
    faults = sum(count for kind, count in outcome.done.items() if kind != "passed")
    line = {
        "seed": seed,
        "step": step,
        "good": good,
        "exit_code": outcome.code,
        "seconds": round(outcome.seconds, 1),
        "requests": sum(outcome.done.values()),
        "faults": faults,
        "by_fault": {kind: count for kind, count in outcome.done.items() if kind != "passed" and count},
        "message": outcome.err.strip().splitlines()[-1:] if outcome.code else [],
    }
    print(json.dumps(line) if as_json else "  ".join(f"{name}={value}" for name, value in line.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
