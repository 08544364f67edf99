"""Kills a random process at a random moment, runs the command again, and wants the bytes of the undisturbed run.

    python -m tests.faults.kill_anything --kills 100 --seed 1 [--kinds build,update,compact] [--json]

A case is one command (build on an empty root, build over a published version, update, compact) brought to its end, on a
Ray of its own on this machine; update and compact in turns also in one process, as they run when there is little to do.
Until its share of kills is spent, random processes get SIGKILL: the driver, a worker, the raylet, the GCS, one of Ray's
helpers. A command that then does not end with success is run again. What must hold:

- the command ends within a bound, whatever was killed; the bytes (content_digest) are those of the undisturbed run in
  one process; `verify` finds nothing; no work is left at the root;
- a reader in a process of its own finds CURRENT naming a whole version in every round, reads all of every new one, and
  its open indices answer as they first did;
- a command that does not succeed says so in one line, without a traceback.

`lingering` counts the processes that Ray left behind for longer than GRACE_S. `untidy` lists commands that ended with an exit
code that is not documented: when the GCS dies while Ray starts, Ray 2.60 itself ends the driver after 60 s, without a word.

Exit codes: 0 all held, 1 something did not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from operators.artifact.manifest import open_current
from operators.storage.fencing import EPOCH_KEY
from operators.storage.store import open_store
from pipelines.verify import verify
from tests.faults.kill_corpus import KINDS, WHERE, KillCorpus, Plan
from tests.faults.reader import Reader
from tests.faults.running import Process, Running

WEIGHTS = {"driver": 3, "worker": 5, "raylet": 2, "gcs_server": 1, "other": 1}  # of a command on Ray
EARLY_SHARE = 0.1  # of the attempts: killed while Python starts; the others once they have taken the root
MAX_KILLS_OF_A_CASE = 5
START_TIMEOUT_S = 90.0
END_TIMEOUT_S = 180.0  # from the last kill to the end of the command
GRACE_S = 5.0  # from the end of the command to that of all its processes; what is left then counts as `lingering`
FIRST_HORIZON_S = {"ray": 20.0, "process": 3.0}  # from there to the end of the command, until one was seen
START_S = 6.0  # of Python, until the command takes the root
# Killed drivers, and clean endings: the cluster stopped answering (8: ResourceError, 3: pieces that failed with it).
EXPECTED_CODES = (-9, 3, 8)


@dataclass(frozen=True)
class Kill:
    """One SIGKILL, and what became of the command."""

    kind: str
    where: str
    role: str
    name: str
    at_s: float  # after the command's start
    exit_code: int | None = None  # of the attempt; None: it hung
    to_end_s: float = 0.0


@dataclass
class Outcome:
    """What a run of the harness saw."""

    kills: list[Kill] = field(default_factory=list)
    cases: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    failures: list[str] = field(default_factory=list)
    lingering: Counter[str] = field(default_factory=Counter)
    untidy: list[str] = field(default_factory=list)  # other exit codes: see the module's docstring
    longest_clear_s: float = 0.0
    reader: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the kills counted."""
        by = {
            "by_kind": Counter(kill.kind for kill in self.kills),
            "by_role": Counter(f"{kill.role} ({kill.where})" for kill in self.kills),
            "exit_codes": Counter(f"{kill.role} ({kill.where}): {kill.exit_code}" for kill in self.kills),
        }
        longest = max((kill.to_end_s for kill in self.kills), default=0.0)
        plain = {f.name: getattr(self, f.name) for f in fields(self)} | {"kills": [asdict(kill) for kill in self.kills]}
        return {"num_kills": len(self.kills), **by, "longest_to_end_s": longest, **plain}


class Harness:
    """Brings commands to their end while killing. `seed` decides who is killed when, as far as a clock can."""

    def __init__(self, corpus: KillCorpus, plans: Sequence[Plan], seed: int) -> None:
        self._corpus = corpus
        self._plans = list(plans)
        self._rng = random.Random(seed)
        self._to_end_s: dict[tuple[str, str], list[float]] = {}  # of undisturbed ends, by kind and where
        self._environment: dict[str, str] = {}
        self.outcome = Outcome()

    def run(self, num_kills: int, max_seconds: float) -> Outcome:
        """Cases until `num_kills` have happened (or the time is over, which is no failure)."""
        started = time.monotonic()
        turn = 0
        with Reader() as reader, tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as short:
            # Short: the path of a unix socket has about 100 bytes. Ray's niceness would let whatever else runs here go first.
            self._environment = {**os.environ, "RAY_TMPDIR": short, "RAY_worker_niceness": "0"}
            self._environment.pop("RAY_ADDRESS", None)
            while len(self.outcome.kills) < num_kills and time.monotonic() - started < max_seconds:
                plan = self._plans[turn % len(self._plans)]
                wanted = min(self._rng.randint(1, MAX_KILLS_OF_A_CASE), num_kills - len(self.outcome.kills))
                root = Path(tempfile.mkdtemp(dir=self._corpus.folder)) / "root"
                if plan.before is not None:
                    shutil.copytree(plan.before, root)
                turn += 1
                reader.watch(str(root))
                self._case(plan, root, wanted)
                self._close(plan, root, reader.leave())
                self.outcome.seconds = time.monotonic() - started
                print(
                    f"case {turn} {plan.kind} ({plan.where}): {len(self.outcome.kills)} kills, {len(self.outcome.failures)} failures,"
                    f" {self.outcome.seconds:.0f} s",
                    file=sys.stderr,
                )
        return self.outcome

    def _case(self, plan: Plan, root: Path, wanted: int) -> None:
        """Run the command until it succeeds; `wanted` kills on the way, fewer if it succeeds before."""
        while True:
            with Running(self._corpus.command(plan.kind, root, *WHERE[plan.where]), self._environment) as running:
                self.outcome.attempts += 1
                killed, began_s = self._disturb(running, plan, root, wanted)
                last = time.monotonic()
                if not running.wait(END_TIMEOUT_S):
                    bound = f"did not end within {END_TIMEOUT_S:.0f} s after {_named(killed)}"
                    self._fail(plan, f"{bound}: {running.dump()}")
                    self._note(plan, killed, None, time.monotonic() - last)
                    return
                code, stdout, stderr = running.returncode, running.stdout, running.stderr
                self._note(plan, killed, code, time.monotonic() - last)
                if code == 0 and began_s:
                    self._to_end_s.setdefault((plan.kind, plan.where), []).append(running.seconds - began_s)
                ended = time.monotonic()
                self.outcome.lingering.update(running.clear(GRACE_S))
                self.outcome.longest_clear_s = max(self.outcome.longest_clear_s, time.monotonic() - ended)
            wanted -= len(killed)
            if code == 0:
                digest = json.loads(stdout)["content_digest"]
                if digest != plan.content_digest:
                    self._fail(plan, f"content_digest {digest}, undisturbed {plan.content_digest}")
                return
            if "Traceback" in stderr:
                self._fail(plan, f"a traceback, exit code {code} after {_named(killed)}: {stderr[-3000:]}")
            elif code not in EXPECTED_CODES:
                self.outcome.untidy.append(f"{plan.kind}, exit code {code} after {_named(killed)}: {stderr[-1500:]}")
            if not killed:
                self._fail(plan, f"exit code {code} although nothing was killed: {stderr[-3000:]}")
                return

    def _disturb(
        self, running: Running, plan: Plan, root: Path, wanted: int
    ) -> tuple[list[tuple[Process, float]], float]:
        """Kill up to `wanted` processes at random moments; no more after one without which the command cannot go on.

        Second: when the command had taken the root, in seconds after its start; 0.0 when nobody has looked.
        """
        killed: list[tuple[Process, float]] = []
        if wanted and self._rng.random() < EARLY_SHARE:
            began_s, longest_s = 0.0, START_S
        else:
            began_s = self._wait_for_work(running, root)
            seen = self._to_end_s.get((plan.kind, plan.where), [FIRST_HORIZON_S[plan.where]])
            longest_s = sum(seen) / len(seen)
        while len(killed) < wanted:
            # The role first: workers come late and would seldom be drawn among what is there.
            role = self._rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0] if plan.where == "ray" else "driver"
            if not self._wait_for(running, role) or running.wait(self._rng.uniform(0.0, longest_s)):
                break
            there = sorted((p for p in running.processes() if p.role == role), key=lambda process: process.pid)
            if not there or not running.kill(victim := self._rng.choice(there)):
                continue
            killed.append((victim, running.seconds))
            longest_s /= 2
            if role != "worker":
                break
        return killed, began_s

    def _wait_for(self, running: Running, role: str) -> bool:
        """Whether a process of the role was there before the command ended."""
        while running.seconds < START_TIMEOUT_S and not running.wait(0.1):
            if any(process.role == role for process in running.processes()):
                return True
        return False

    def _wait_for_work(self, running: Running, root: Path) -> float:
        """When the command took the root, in seconds after its start; 0.0 when it ended without."""
        epoch = root / EPOCH_KEY
        before = epoch.read_bytes() if epoch.exists() else b""
        while running.seconds < START_TIMEOUT_S and not running.wait(0.05):
            if epoch.exists() and epoch.read_bytes() != before:
                return running.seconds
        return 0.0

    def _note(self, plan: Plan, killed: list[tuple[Process, float]], code: int | None, to_end_s: float) -> None:
        for process, at_s in killed:
            self.outcome.kills.append(Kill(plan.kind, plan.where, process.role, process.name, at_s, code, to_end_s))

    def _close(self, plan: Plan, root: Path, seen: dict[str, Any]) -> None:
        """The end of a case: what lies at the root, and what the reader saw there."""
        self.outcome.cases[f"{plan.kind} ({plan.where})"] += 1
        store = open_store(str(root))
        problems = verify(str(root))["problems"]
        if problems:
            self._fail(plan, f"does not verify at the end: {problems}")
        elif open_current(store).content_digest != plan.content_digest:
            self._fail(plan, "CURRENT names other bytes than the command printed")
        if left := store.list_keys("runs"):
            self._fail(plan, f"work is left at the root: {left[:5]}")
        for failure in seen["failures"]:
            self._fail(plan, f"the reader: {failure}")
        self.outcome.reader.update({name: seen[name] for name in ("rounds", "searches")})
        self.outcome.reader["versions"] += len(seen["versions"])
        shutil.rmtree(root.parent)

    def _fail(self, plan: Plan, text: str) -> None:
        before = "" if plan.before is None else " over a published version"
        self.outcome.failures.append(f"{plan.kind} ({plan.where}){before}: {text}")


def _named(killed: list[tuple[Process, float]]) -> str:
    return ", ".join(f"{process.name} at {at_s:.1f} s" for process, at_s in killed) or "no kill"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS), help="commands to disturb")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="begin no further case after this time")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    given = parser.parse_args(arguments)
    importlib.import_module("tests.conftest")  # the environment of all tests: offline, quiet, a Ray token of its own
    with tempfile.TemporaryDirectory(prefix="vm-kill-") as folder:
        corpus = KillCorpus(Path(folder, "corpus"))
        plans = corpus.plans(given.kinds.split(","))
        outcome = Harness(corpus, plans, given.seed).run(given.kills, given.max_seconds)
    facts = outcome.to_json()
    if given.json:
        print(json.dumps(facts, indent=1))
    else:
        counts = ", ".join(f"{count} {role}" for role, count in sorted(facts["by_role"].items()))
        print(
            f"{facts['num_kills']} kills ({counts}) in {sum(outcome.cases.values())} cases and {outcome.attempts} attempts"
        )
        for failure in outcome.failures:
            print(f"FAILED {failure}")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
