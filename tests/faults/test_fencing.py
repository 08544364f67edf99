"""Two commands at one root: one publishes, the other ends with exit code 7 and names it, and nothing is lost.

The first is suspended (SIGSTOP, at a crash point) as a machine may be at any moment; the second starts meanwhile and
ends; then the first is revived.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from operators import crash_points
from operators.artifact.index import Index
from operators.artifact.manifest import open_current
from operators.errors import FencedError, IntegrityError
from operators.storage.fencing import take_epoch
from operators.storage.store import open_store
from pipelines.compact import compact
from pipelines.garbage import collect_garbage
from pipelines.rollback import rollback
from pipelines.runs import begin_or_resume, check_run_kept, discard_unpublished, told_as_lost
from pipelines.update import UpdateOptions, update
from pipelines.verify import verify
from pipelines.versions import check_whole, history
from tests.faults.kill_corpus import KillCorpus, in_process
from tests.faults.running import Running
from tests.pipelines.build_corpus import IN_PROCESS

STOP_TIMEOUT_S = 120.0
END_TIMEOUT_S = 120.0
NUM_DELETED = 3

# The command that is suspended, where, and the one that starts meanwhile.
CASES = [
    ("update", "manifest.before:1", "update"),  # goes on with the run of the first, and tidies it up
    ("update", "publish.before:1", "compact"),  # the epoch was still the first one's when it looked
    ("compact", "publish.before:1", "update"),
    # What it wants to go on with is gone.
    pytest.param("compact", "part.before_record:1", "compact", marks=pytest.mark.slow),
    pytest.param("update", "manifest.before:1", "rollback", marks=pytest.mark.slow),
]


class Root:
    """A root with a base, a delta and deleted rows; `update` deletes some documents more."""

    def __init__(self, kill_corpus: KillCorpus, folder: Path) -> None:
        self.url = str(folder / "root")
        shutil.copytree(kill_corpus.updated, self.url)
        self.before = self.texts()
        self.deletes = sorted({doc_id for doc_id, *_ in self.before})[:NUM_DELETED]
        self._file = folder / "deletes.txt"

    def start(self, kind: str, variable: str, point: str, ids: Sequence[str] = ()) -> Running:
        """The command in a process of its own, which is stopped or killed there. ids: to delete, by default all."""
        self._file.write_text("\n".join(ids or self.deletes))
        words = {
            "update": ["update", "--index", self.url, "--append", "--deletes", str(self._file)],
            "compact": ["compact", self.url],
        }[kind]
        command = KillCorpus.vectormill(*words, "--set", IN_PROCESS)
        return Running(command, {**os.environ, variable: point})

    def run(self, kind: str) -> str:
        """The command in this process; the version that is published then."""
        if kind == "update":
            update([], self.url, in_process, UpdateOptions(append=True, deletes=self.deletes))
        elif kind == "compact":
            compact(self.url, in_process)
        else:
            rollback(self.url)
        return open_current(open_store(self.url)).version

    def texts(self) -> set[tuple[str, int, str]]:
        """(doc_id, chunk_no, text) of every live row, read through the index."""
        store = open_store(self.url)
        index = Index(store, open_current(store))
        found = index.exact_search(np.ones((1, index.manifest.d), np.float32), index.manifest.ntotal)
        return {(row["doc_id"], row["chunk_no"], row["text"]) for row in index.rows_of(found.entries_Qk[0])}

    def without_deleted(self) -> set[tuple[str, int, str]]:
        return {row for row in self.before if row[0] not in self.deletes}


@pytest.mark.parametrize(("first", "point", "second"), CASES)
def test_of_two_at_once_one_publishes_and_the_revived_other_names_it_and_changes_nothing(
    first: str, point: str, second: str, kill_corpus: KillCorpus, tmp_path: Path
) -> None:
    root = Root(kill_corpus, tmp_path)
    with root.start(first, crash_points.STOP_VARIABLE, point) as suspended:
        assert suspended.wait_stopped(STOP_TIMEOUT_S), f"{point} was never passed: {suspended.stderr}"
        winner = root.run(second)
        published = (Path(root.url) / "CURRENT").read_bytes()
        suspended.resume()
        assert suspended.wait(END_TIMEOUT_S)
        assert suspended.returncode == FencedError.exit_code, suspended.stderr
        run_of_winner = open_current(open_store(root.url)).run_id
        assert (
            winner in suspended.stderr or run_of_winner in suspended.stderr or f"pid {os.getpid()}" in suspended.stderr
        )
        assert "Traceback" not in suspended.stderr
    assert (Path(root.url) / "CURRENT").read_bytes() == published
    assert_all_whole(root.url)
    # Nothing is lost: the loser's work can be done again, and what it had begun does not stay.
    if second == "rollback":
        rollback(root.url, "v000002")
    root.run(first)
    deleted = "update" in (first, second)
    assert root.texts() == (root.without_deleted() if deleted else root.before)
    assert_all_whole(root.url)
    collect_garbage(root.url, 1, 0.0, delete=True)
    store = open_store(root.url)
    held = check_whole(store, open_current(store).version)
    assert set(store.list_keys("segments") + store.list_keys("quantizers")) == set(held.objects)
    assert store.list_keys("runs") == []


def test_a_suspended_run_cannot_publish_even_when_the_later_one_published_nothing(
    kill_corpus: KillCorpus, tmp_path: Path
) -> None:
    # The later one goes on with the run of the first, finds nothing to do, and discards what the first is about to publish.
    root = Root(kill_corpus, tmp_path)
    before = open_current(open_store(root.url)).version
    with root.start("update", crash_points.STOP_VARIABLE, "publish.before:1") as suspended:
        assert suspended.wait_stopped(STOP_TIMEOUT_S), suspended.stderr
        done = update([], root.url, in_process, UpdateOptions(append=True, deletes=["no such document"]))
        assert not done.published
        suspended.resume()
        assert suspended.wait(END_TIMEOUT_S)
        assert suspended.returncode == FencedError.exit_code, suspended.stderr
    assert open_current(open_store(root.url)).version == before
    assert verify(root.url)["problems"] == []
    assert root.texts() == root.before
    root.run("update")
    assert root.texts() == root.without_deleted()


def assert_all_whole(root: str) -> None:
    """Every version that the root holds is complete, and the published one verifies."""
    assert {version["state"] for version in history(root)["versions"]} == {"whole"}
    assert verify(root)["problems"] == []


def test_a_command_killed_after_it_published_does_not_harm_later_versions(
    kill_corpus: KillCorpus, tmp_path: Path
) -> None:
    # Its run lies there as if unfinished; were it gone on with, its folder would be tidied up for the next version's needs.
    root = Root(kill_corpus, tmp_path)
    for ids in (root.deletes[:1], root.deletes[1:2]):
        with root.start("update", crash_points.VARIABLE, "publish.after:1", ids) as killed:
            assert killed.wait(END_TIMEOUT_S)
            assert killed.returncode == -signal.SIGKILL, killed.stderr
    root.run("update")
    assert len(history(root.url)["versions"]) == 5
    assert_all_whole(root.url)
    assert root.texts() == root.without_deleted()
    rollback(root.url, "v000003")
    assert_all_whole(root.url)


def test_a_run_that_misses_what_the_winner_removed_says_who_won(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "root"))
    epoch = take_epoch(store, "slow")
    with pytest.raises(IntegrityError, match="piece is missing"), told_as_lost(store, epoch, None):
        raise IntegrityError("piece is missing")
    take_epoch(store, "quick")
    with pytest.raises(FencedError, match="run quick .* took it over"), told_as_lost(store, epoch, None):
        raise FileNotFoundError("runs/slow/pieces/0001.json")


def test_a_run_without_a_result_leaves_its_work_to_whoever_goes_on_with_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "root"))
    run = begin_or_resume(store, {}, [], set(), "update")
    epoch = take_epoch(store, run.run_id)
    work = [f"{run.prefix}/pieces/0001.json", f"segments/{run.run_id}-0123456789ab/part-00000.json"]
    for key in work:
        store.put(key, b"{}")
    other = begin_or_resume(store, {}, [], set(), "update")
    assert other.run_id == run.run_id
    taken = take_epoch(store, other.run_id)
    check_run_kept(store, other)
    with pytest.raises(FencedError):
        discard_unpublished(store, run, epoch)
    assert all(store.size_bytes(key) for key in work)
    discard_unpublished(store, other, taken)
    assert store.list_keys("runs") == store.list_keys("segments") == []
