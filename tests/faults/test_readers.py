"""A search process that is open while versions come and go keeps answering, and moves to the published one when told to."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipelines.compact import compact
from pipelines.garbage import collect_garbage
from pipelines.rollback import rollback
from pipelines.update import UpdateOptions, update
from tests.faults.kill_corpus import KillCorpus, in_process
from tests.faults.reader import Reader


def test_a_reader_answers_from_its_version_during_update_compact_rollback_and_gc(
    kill_corpus: KillCorpus, tmp_path: Path
) -> None:
    root = str(tmp_path / "root")
    shutil.copytree(kill_corpus.base, root)

    def collect() -> list[str]:
        """Versions that gc removed, once the reader has moved on: a version that is just being opened is kept by its age."""
        reader.tell()
        return list(collect_garbage(root, 1, 0.0, delete=True)["dropped"])

    with Reader() as reader:
        reader.watch(root)
        assert reader.tell()["versions"] == ["v000001"]
        update([str(kill_corpus.docs)], root, in_process)
        reader.tell()
        rollback(root)
        reader.tell()
        rollback(root, "v000002")
        assert collect() == ["v000001"]
        compact(root, in_process)
        assert collect() == ["v000002"]
        update([], root, in_process, UpdateOptions(append=True, deletes=[kill_corpus.first_id]))
        collect()
        seen = reader.leave()
    assert seen["failures"] == []
    assert seen["versions"][:2] == ["v000001", "v000002"] and len(seen["versions"]) == 4
    assert seen["searches"] > seen["rounds"]
