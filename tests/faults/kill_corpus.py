"""What the kill harness runs: a small corpus in two states, a root for every command, and what each must end with.

State 1 is what the published version was built from. In state 2, on disk from then on, one object is as it was, in one
documents were edited and deleted, one is gone and one is new.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.build import build
from pipelines.compact import compact
from pipelines.config import RunConfig, load_config
from pipelines.update import update
from tests.pipelines.build_corpus import IN_PROCESS, SMALL_UNITS, write_corpus

KINDS = ("build", "update", "compact")
NUM_DOCS = 90
# On Ray: started on this machine, with little memory; a run in which nothing moves any more ends in a minute.
WHERE = {
    "ray": ("cluster.where=ray", "cluster.object_store_bytes=100000000", "cluster.stall_timeout_s=60"),
    "process": (IN_PROCESS,),
}


def in_process(config: RunConfig) -> RunConfig:
    """The settings, for work in this process."""
    return replace(config, cluster=replace(config.cluster, where="process"))


def real_documents() -> list[tuple[str, str, str]]:
    """(id, title, text) of NUM_DOCS different texts: the beginnings of NumPy's docstrings."""
    found: dict[str, str] = {}
    for name in sorted(np.__all__):
        text = str(getattr(np, name).__doc__ or "")[:300]
        if len(text) == 300:
            found.setdefault(text, name)
    return [(f"numpy.{name}", name, text) for text, name in found.items()][:NUM_DOCS]


@dataclass(frozen=True)
class Plan:
    """A command to disturb: what its root holds before (None: nothing), and the content_digest that it must end with."""

    kind: str
    where: str
    before: Path | None
    content_digest: str


class KillCorpus:
    """Corpus, template roots and undisturbed results, below `folder`. On disk is state 2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.docs = folder / "docs"
        self.docs.mkdir(parents=True)
        self._digests: dict[str, str] = {}
        self._write_state(1)
        self.base = folder / "base"  # published from state 1
        self.run("build", self.base)
        self._write_state(2)

    @property
    def updated(self) -> Path:
        """A root that was brought from `base` to state 2: a delta, and deleted rows."""
        return self._after("update", self.base)

    def content_digest(self, kind: str) -> str:
        """What the undisturbed command ends with, in this process."""
        self._after(kind, self.updated if kind == "compact" else self.base if kind == "update" else None)
        return self._digests[kind]

    def _after(self, kind: str, before: Path | None) -> Path:
        root = self.folder / f"after-{kind}"
        if kind not in self._digests:
            if before is not None:
                shutil.copytree(before, root)
            self._digests[kind] = self.run(kind, root)
        return root

    def plans(self, kinds: Sequence[str]) -> list[Plan]:
        """What is there to disturb."""
        found = []
        if "build" in kinds:
            found += [Plan("build", "ray", before, self.content_digest("build")) for before in (None, self.base)]
        if "update" in kinds:
            found += [Plan("update", where, self.base, self.content_digest("update")) for where in WHERE]
        if "compact" in kinds:
            found += [Plan("compact", where, self.updated, self.content_digest("compact")) for where in WHERE]
        return found

    def _write_state(self, state: int) -> None:
        documents = real_documents()
        documents[10] = (documents[10][0], documents[10][1], documents[10][2] + " and so on" * 300)  # cut in windows
        self.first_id = documents[0][0]
        third = NUM_DOCS // 3
        if state == 1:
            write_corpus(self.docs / "a.parquet", documents[:third], row_group_size=20)
            write_corpus(self.docs / "b.parquet", documents[third : 2 * third - 5], row_group_size=20)
            write_corpus(self.docs / "c.parquet", documents[2 * third - 5 : 2 * third], row_group_size=20)
            return
        changed = [(name, title, f"{text} Edited.") for name, title, text in documents[third : third + 4]]
        write_corpus(self.docs / "b.parquet", changed + documents[third + 7 : 2 * third - 5], row_group_size=20)
        (self.docs / "c.parquet").unlink()
        write_corpus(self.docs / "d.parquet", [documents[0], *documents[2 * third :]], row_group_size=20)

    def command(self, kind: str, root: Path, *settings: str) -> list[str]:
        """The command line of a kind; it prints JSON."""
        words = {
            "build": ["build", str(self.docs), "--out", str(root), "--workers", "2"],
            "update": ["update", str(self.docs), "--index", str(root)],
            "compact": ["compact", str(root)],
        }[kind]
        for setting in (*(SMALL_UNITS if kind == "build" else ()), *settings):
            words += ["--set", setting]
        return self.vectormill(*words)

    @staticmethod
    def vectormill(*words: str) -> list[str]:
        """The command line of a command that prints JSON."""
        return [sys.executable, "-m", "pipelines.cli", *words, "--json"]

    def run(self, kind: str, root: Path) -> str:
        """content_digest of what the undisturbed command publishes, in this process."""
        if kind == "build":
            return build(
                [str(self.docs)], str(root), load_config(None, [*SMALL_UNITS, IN_PROCESS])
            ).manifest.content_digest
        if kind == "update":
            return update([str(self.docs)], str(root), in_process).manifest.content_digest
        return compact(str(root), in_process).manifest.content_digest
