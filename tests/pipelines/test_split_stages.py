"""Stages that are one task on a small corpus and many on a large one give the same index, version after version."""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster import in_process
from operators.artifact import part_scan
from operators.artifact.manifest import Manifest
from pipelines import gate, index_build, numbering, recall, run_context
from pipelines.compact import compact
from pipelines.verify import verify
from tests.pipelines.nightly_site import A, B, Site, configured


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many tasks of each function ran. Few documents have coarse recall: the gate is not the subject."""
    monkeypatch.setattr(gate, "MAX_RECALL_LOSS", 1.0)
    counted: Counter[str] = Counter()

    def tasks(function: Any, calls: list[Any], **options: Any) -> list[Any]:
        counted[function.__name__] += len(calls)
        return in_process.tasks_in_turn(function, calls, **options)

    monkeypatch.setattr(run_context, "tasks_in_turn", tasks)
    return counted


def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on stages are split as on a large corpus."""
    many = functools.partial(numbering.number_rows, hashes_per_pass=7, documents_per_run=5)
    monkeypatch.setattr(index_build, "number_rows", many)
    monkeypatch.setattr(recall, "scan_groups", functools.partial(part_scan.scan_groups, group_rows=3))


def nights(site: Site) -> list[Manifest]:
    """A build, an update, a compaction and a compaction with new training, of a corpus with equal ids and equal texts."""
    site.put_three()
    site.put("e.jsonl", [*A[:3], ("e-1", B[1][1]), ("e-2", B[2][1]), ("e-3", "a text of its own")])
    versions = [site.build("clean.duplicates=drop").manifest]
    site.change()
    versions.append(site.update().manifest)
    for retrain in (False, True):
        versions.append(compact(site.root, configured, retrain=retrain, min_recall=0.0).manifest)
    assert verify(site.root)["problems"] == []
    return versions


def of_version(manifest: Manifest) -> list[Any]:
    assert manifest.exact is not None
    return [manifest.content_digest, manifest.rows, manifest.quality, manifest.exact["sha256"]]


def test_split_stages_leave_the_versions_that_single_tasks_leave(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    expected = nights(Site(tmp_path / "corpus", tiny_model, str(tmp_path / "one")))
    assert sum(expected[0].rows["rejected"].values()) == 3
    assert sum(expected[0].rows["dropped"].values()) == 2
    assert (calls["number_in_one_task"], calls["write_hashes"], calls["scan"]) == (1, 0, 0)
    split(monkeypatch)
    shutil.rmtree(tmp_path / "corpus")
    found = nights(Site(tmp_path / "corpus", tiny_model, str(tmp_path / "many")))
    assert (calls["number_in_one_task"], calls["measure_recall"]) == (1, 4)
    assert min(calls["find_repeated_ids"], calls["find_repeated_texts"], calls["scan"]) > 2
    for one, other in zip(expected, found, strict=True):
        assert of_version(one) == of_version(other)


def test_an_update_whose_neighbours_cannot_be_carried_scans_all_rows_in_tasks(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    site = Site(tmp_path, tiny_model)
    site.put_three()
    site.build()
    other = site.copied(tmp_path / "other")
    split(monkeypatch)
    site.change()
    carried = site.update().manifest
    scans = calls["scan"]
    monkeypatch.setattr(recall, "exact_after_update", lambda *_: None)
    scanned = other.update().manifest
    assert calls["scan"] - scans > scans
    assert calls["measure_recall"] == 3
    assert of_version(carried)[:3] == of_version(scanned)[:3]


def test_split_stages_run_as_tasks_of_ray(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: str
) -> None:
    one = Site(tmp_path / "corpus", tiny_model, str(tmp_path / "one"))
    one.put_three()
    one.put("e.jsonl", [*A[:3], ("e-1", B[1][1]), ("e-2", "a text of its own")])
    expected = one.build("clean.duplicates=drop").manifest
    split(monkeypatch)
    many = Site(tmp_path / "corpus", tiny_model, str(tmp_path / "many"))
    found = many.build("clean.duplicates=drop", "cluster.where=ray", f"cluster.address={ray_cluster}").manifest
    assert of_version(found) == of_version(expected)
