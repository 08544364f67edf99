"""Versions made in milliseconds: the objects of one small version, written again under names of their own, as a build names them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from operators.artifact.manifest import (
    Manifest,
    PartRef,
    part_ref,
    publish,
    read_current,
    read_part_record,
    write_manifest,
)
from operators.storage.checked import ObjectEntry, put_checked
from operators.storage.commits import CommitRecord, commit, new_attempt, seal
from operators.storage.fencing import Epoch, take_epoch
from operators.storage.store import Store
from tests.artifact_maker import Version, make_version

SMALL: dict[str, Any] = {"num_docs": 24, "d": 8, "nlist": 4, "M": 4, "nbits": 4, "num_pieces": 1, "num_shards": 1}
DAY_S = 86400.0


class Build:
    """A build in three steps, so that others can come between: `begin`, `write`, `publish`."""

    def __init__(self, store: Store, template: Version, run_id: str) -> None:
        self.store, self.template, self.run_id = store, template, run_id
        self.manifest: Manifest | None = None
        self.parent: str | None = None
        self.tag: str | None = None

    def begin(self) -> Build:
        """Its run lies at the root, it has seen CURRENT, and it has its epoch."""
        self.store.put(f"runs/{self.run_id}/run.json", seal({"run_id": self.run_id, "fingerprint": {}, "sources": []}))
        self.store.put(f"runs/{self.run_id}/pieces/0000.json", b"{}")
        current = read_current(self.store)
        if current:
            self.parent, self.tag = current[0]["version"], current[1]
        self.epoch: Epoch = take_epoch(self.store, self.run_id)
        return self

    def write(self) -> Build:
        """Everything but the manifest is written."""
        source, segment = self.template.manifest.segments[0], f"{self.run_id}-0123456789ab"
        parts = [self._copy_part(ref, f"segments/{segment}/part-{n:05d}") for n, ref in enumerate(source.parts)]
        segments = [dataclasses.replace(source, name=segment, parts=parts)]
        old = self.template.manifest
        rejects = self._copy(old.rejects, f"segments/{segment}/rejects-{new_attempt()}") if old.rejects else None
        documents = [
            {**table, "object": self._copy(table["object"], f"segments/{segment}/documents-{new_attempt()}")}
            for table in old.documents
        ]
        listing = self._copy(old.sources["listing"], f"segments/{segment}/sources-{new_attempt()}")
        self.manifest = dataclasses.replace(
            old,
            version=f"v{self.epoch.number:06d}",
            parent=self.parent,
            run_id=self.run_id,
            epoch=self.epoch.number,
            quantizer=self._copy(old.quantizer, f"quantizers/{old.quantizer['sha256']}-{new_attempt()}"),
            queries=self._copy(old.queries, f"segments/{segment}/queries-{new_attempt()}"),
            sources={**old.sources, "listing": listing},
            segments=segments,
            rejects=rejects,
            documents=documents,
        )
        return self

    def publish(self) -> str:
        """The version's name. Raises FencedError when the build lost."""
        assert self.manifest is not None
        publish(self.store, self.manifest, write_manifest(self.store, self.manifest), self.epoch, self.tag)
        self.store.delete_tree(f"runs/{self.run_id}")
        return self.manifest.version

    def _copy(self, entry: dict[str, Any], key: str) -> dict[str, Any]:
        return put_checked(self.store, key, self.template.store.read(entry["key"])).to_json()

    def _copy_part(self, ref: PartRef, key: str) -> PartRef:
        record, attempt = read_part_record(self.template.store, ref), new_attempt()
        objects = {
            role: ObjectEntry.from_json(self._copy(entry.to_json(), f"{key}-{attempt}.{role}"))
            for role, entry in record.objects.items()
        }
        commit(self.store, f"{key}.json", CommitRecord(record.unit, record.inputs, attempt, objects, record.facts))
        return part_ref(self.store, f"{key}.json")


def build_version(store: Store, template: Version, run_id: str) -> str:
    """A whole build, published; the version's name."""
    return Build(store, template, run_id).begin().write().publish()


def make_template(folder: Path) -> Version:
    """The version that the others are copies of."""
    return make_version(folder, part_rows=30, **SMALL)


def grow_old(folder: str, age_s: float = 2 * DAY_S) -> None:
    """Make everything below a local root look as if it was written `age_s` ago."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            before = path.stat().st_mtime - age_s
            os.utime(path, (before, before))
