"""Versions with deltas and deletions that tests of `compact` start from."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from operators.storage.store import open_store
from pipelines.config import RunConfig, load_config
from tests.artifact_maker import Version, add_delta, make_version

SMALL = ("index.part_bytes=20000", "index.merge_buffer_bytes=6000", "index.shard_rows=90", "cluster.where=process")


def settings(*assignments: str) -> Callable[[RunConfig], RunConfig]:
    return lambda base: load_config(None, [*SMALL, *assignments], base=base)


def make_versions(root: Path | str, **options: Any) -> Version:
    """A base, three deltas, and deletions in all of them but the last."""
    version = make_version(root, num_docs=120, nlist=8, num_pieces=2, num_shards=1, **options)
    version = add_delta(version, 15, delete=range(3, 40))
    version = add_delta(version, 9, delete=[100, 180, 245], num_pieces=2)
    version = add_delta(version, 12, delete=[260, 275])
    assert len(version.manifest.segments) == 4
    assert sum(s.num_deleted > 0 for s in version.manifest.segments) == 3
    return version


def copied(template: Version, root: Path) -> Version:
    shutil.copytree(template.store.url, root)
    return dataclasses.replace(template, store=open_store(str(root)))
