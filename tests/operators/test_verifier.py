"""Damage of every kind to every kind of published object, and versions put together wrongly: all found and named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from operators.artifact.index import Index
from operators.artifact.list_run import RunReader, RunSlice, write_run
from operators.artifact.manifest import (
    Manifest,
    PartRef,
    manifest_key,
    part_ref,
    read_manifest,
    read_part_record,
    write_manifest,
)
from operators.artifact.verifier import check_coverage, check_manifest, expected_checksum, verify_part
from operators.errors import IndexNotFoundError, IntegrityError
from operators.storage.commits import CommitRecord, commit
from operators.storage.store import Store, open_store
from pipelines.verify import verify
from tests.artifact_maker import Version, flip_bit, make_version, truncate

KINDS = {
    "lists": "part-00001-*.lists",
    "vectors": "part-00001-*.vectors.npy",
    "rows": "part-00001-*.rows.parquet",
    "part record": "part-00001.json",
    "quantizer": "*.faissindex",
    "queries": "queries.parquet",
    "rejects": "rejects.parquet",
    "sources": "sources.jsonl",
    "manifest": "manifest.json",
    "CURRENT": "CURRENT",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("good"))


@pytest.fixture
def copy(good: Version, tmp_path: Path) -> Version:
    """The version at a root of its own, to be damaged."""
    shutil.copytree(good.store.url, tmp_path / "root")
    return dataclasses.replace(good, store=open_store(str(tmp_path / "root")))


def key_of(store: Store, pattern: str) -> str:
    """The one published object whose name matches."""
    root = Path(store.url)
    (found,) = [path for path in root.rglob(pattern) if "runs" not in path.parts]
    return str(found.relative_to(root))


def problems_of(made: Version, manifest: Manifest | None = None) -> list[str]:
    """What a build finds before it publishes the candidate."""
    manifest = manifest or made.manifest
    problems = check_manifest(made.store, manifest)
    (segment,) = manifest.segments
    reports = [verify_part(made.store, ref, made.quantizer, manifest.ntotal) for ref in segment.parts]
    problems += [problem for report in reports for problem in report.problems]
    return problems + check_coverage(manifest, segment, reports)


def test_a_good_version_has_no_problems(good: Version) -> None:
    found = verify(good.store.url)
    assert (found["ok"], found["problems"], found["version"]) == (True, [], "v000001")
    assert problems_of(good) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_any_object_is_found_and_named(copy: Version, kind: str) -> None:
    key = key_of(copy.store, KINDS[kind])
    size = copy.store.size_bytes(key)
    assert size is not None
    rng = np.random.default_rng(11)
    for position in [0, size - 1, *rng.integers(0, size, 8).tolist()]:
        bit = int(rng.integers(0, 8))
        flip_bit(copy.store, key, position, bit)
        found = verify(copy.store.url)
        assert not found["ok"], (position, bit)
        assert any(key in problem for problem in found["problems"]), found["problems"]
        flip_bit(copy.store, key, position, bit)
    assert verify(copy.store.url)["ok"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_object_is_found_and_named(copy: Version, kind: str) -> None:
    key = key_of(copy.store, KINDS[kind])
    size = copy.store.size_bytes(key)
    assert size is not None
    for left in (size - 1, size // 2, 0):
        truncate(copy.store, key, left)
        assert any(key in problem for problem in verify(copy.store.url)["problems"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_deleted_object_is_found_and_named(copy: Version, kind: str) -> None:
    key = key_of(copy.store, KINDS[kind])
    copy.store.delete(key)
    if kind == "CURRENT":
        with pytest.raises(IndexNotFoundError, match="no object CURRENT"):
            verify(copy.store.url)
    else:
        assert any(key in problem for problem in verify(copy.store.url)["problems"])


@pytest.mark.parametrize("kind", ["CURRENT", "manifest", "part record"])
def test_every_flipped_bit_of_a_small_object_is_found(copy: Version, kind: str) -> None:
    key = key_of(copy.store, KINDS[kind])
    size = copy.store.size_bytes(key)
    assert size is not None
    for position in range(0, size, max(1, size // 300)):
        flip_bit(copy.store, key, position, position % 8)
        with pytest.raises(IntegrityError, match=key):
            Index.open(copy.store)
        flip_bit(copy.store, key, position, position % 8)


@pytest.mark.parametrize("kind", ["lists", "vectors", "rows", "part record"])
def test_swapped_objects_of_two_parts_are_found_and_named(copy: Version, kind: str) -> None:
    one = key_of(copy.store, KINDS[kind])
    other = key_of(copy.store, KINDS[kind].replace("part-00001", "part-00000"))
    first, second = copy.store.read(one), copy.store.read(other)
    copy.store.put(one, second)
    copy.store.put(other, first)
    problems = verify(copy.store.url)["problems"]
    assert any(one in problem for problem in problems)
    assert any(other in problem for problem in problems)


def test_a_part_of_another_version_is_found_and_named(copy: Version, tmp_path: Path) -> None:
    other = make_version(tmp_path / "other", seed=9)
    theirs = other.manifest.segments[0].parts[1].record_key
    ours = copy.manifest.segments[0].parts[1].record_key
    for entry in read_part_record(other.store, other.manifest.segments[0].parts[1]).objects.values():
        copy.store.put(entry.key, other.store.read(entry.key))
    copy.store.put(ours, other.store.read(theirs))
    (problem,) = verify(copy.store.url)["problems"]
    assert ours in problem
    assert "not the one that the manifest names" in problem


def test_a_manifest_of_another_version_under_this_name_is_found(copy: Version) -> None:
    changed = dataclasses.replace(copy.manifest, num_docs=copy.manifest.num_docs + 1)
    write_manifest(copy.store, changed)
    (problem,) = verify(copy.store.url)["problems"]
    assert "is not the one that CURRENT names" in problem
    assert manifest_key("v000001") in problem


def test_a_newer_format_is_refused(copy: Version) -> None:
    digest = write_manifest(copy.store, dataclasses.replace(copy.manifest, format_version=2))
    with pytest.raises(IntegrityError, match="has format version 2, this vectormill reads 1"):
        read_manifest(copy.store, "v000001", digest)


def with_parts(manifest: Manifest, parts: list[PartRef]) -> Manifest:
    return dataclasses.replace(manifest, segments=[dataclasses.replace(manifest.segments[0], parts=parts)])


def test_candidates_with_parts_missing_doubled_swapped_or_stretched_have_problems(good: Version) -> None:
    parts = good.manifest.segments[0].parts
    assert len(parts) >= 3
    wrong = {
        "missing": [parts[0], *parts[2:]],
        "the last missing": parts[:-1],
        "doubled": [*parts, parts[-1]],
        "swapped": [parts[1], parts[0], *parts[2:]],
    }
    for name, refs in wrong.items():
        assert any("list" in problem for problem in problems_of(good, with_parts(good.manifest, refs))), name
    stretched = [
        dataclasses.replace(parts[0], num_lists=parts[0].num_lists + 1),
        dataclasses.replace(parts[1], first_list=parts[1].first_list + 1, num_lists=parts[1].num_lists - 1),
        *parts[2:],
    ]
    problems = problems_of(good, with_parts(good.manifest, stretched))
    assert any("part 00001 has first_list" in problem for problem in problems)


def test_a_part_of_another_codebook_is_named(good: Version, tmp_path: Path) -> None:
    other = make_version(tmp_path, seed=9)
    (segment,) = other.manifest.segments
    problems = verify_part(other.store, segment.parts[0], good.quantizer, other.manifest.ntotal).problems
    assert any(f"was made with quantizer {other.quantizer.digest}" in problem for problem in problems)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_docs": 0, "rows": {"read": 5, "indexed": 4, "rejected": {}, "dropped": {}}}, "rows do not reconcile"),
        ({"content_digest": "0" * 64}, "content_digest is"),
        ({"ntotal": 3}, "the manifest says ntotal 3"),
        ({"nlist": 15}, "quantizer has"),
        ({"metric": "l2"}, "quantizer has"),
        (
            {"rows": {"read": 303, "indexed": 300, "rejected": {"empty_text": 3}, "dropped": {}}},
            "3 rows were left out, the rejects object lists 2",
        ),
    ],
)
def test_a_manifest_that_contradicts_its_objects_has_problems(
    good: Version, change: dict[str, Any], problem: str
) -> None:
    found = check_manifest(good.store, dataclasses.replace(good.manifest, **change))
    assert any(problem in line for line in found), found


def remade(made: Version, spoil: Callable[[RunSlice], None]) -> Manifest:
    """The manifest with its second part written again after `spoil` changed its entries: all checksums are right."""
    ref = made.manifest.segments[0].parts[1]
    record = read_part_record(made.store, ref)
    reader = RunReader(made.store, "part", record.objects, record.facts)
    entries = reader.read_lists(reader.first_list, reader.end_list)
    entries = RunSlice(
        entries.list_no, entries.row_ids.copy(), entries.codes.copy(), entries.vectors.copy(), entries.rows
    )
    spoil(entries)
    with write_run(
        made.store,
        "segments/remade/part-00001-x",
        list_sizes_L=reader.list_sizes_L,
        first_list=reader.first_list,
        code_size=record.facts["code_size"],
        d=record.facts["d"],
    ) as (writer, finished):
        writer.append(entries, reader.end_list)
    facts = {**finished.facts, "quantizer": made.quantizer.digest}
    key = "segments/remade/part-00001.json"
    commit(made.store, key, CommitRecord("part 00001", "i", "x", finished.objects, facts))
    parts = list(made.manifest.segments[0].parts)
    parts[1] = part_ref(made.store, key)
    return with_parts(made.manifest, parts)


def with_column(rows: pa.Table, name: str, values: Any) -> pa.Table:
    number = rows.schema.get_field_index(name)
    return rows.set_column(number, rows.schema.field(name), pa.array(values, rows.schema.field(name).type))


def _another_code(entries: RunSlice) -> None:
    entries.codes[-3, 0] ^= 1


def _vectors_of_neighbours(entries: RunSlice) -> None:
    entries.vectors[[10, 90]] = entries.vectors[[90, 10]]


def _not_a_number(entries: RunSlice) -> None:
    entries.vectors[4, 2] = np.nan


def _another_text(entries: RunSlice) -> None:
    texts = entries.rows.column("text").to_pylist()
    entries.rows = with_column(entries.rows, "text", [*texts[:-1], texts[-1] + "x"])


def _ids(entries: RunSlice, ids: np.ndarray) -> None:
    entries.row_ids[:] = ids
    entries.rows = with_column(entries.rows, "row_id", ids)


def _ids_falling_in_a_list(entries: RunSlice) -> None:
    ids = entries.row_ids.copy()
    ids[[0, 1]] = ids[[1, 0]]
    _ids(entries, ids)


def _an_id_beyond_the_last(entries: RunSlice) -> None:
    ids = entries.row_ids.copy()
    ids[np.flatnonzero(entries.list_no == entries.list_no[0])[-1]] = 10_000
    _ids(entries, ids)


def _an_id_of_the_first_part(entries: RunSlice) -> None:
    ids = entries.row_ids.copy()
    ids[0] = min(set(range(int(ids[1]))) - set(ids.tolist()))
    _ids(entries, ids)


def _rows_in_another_order(entries: RunSlice) -> None:
    entries.rows = entries.rows.take(pa.array(np.arange(len(entries.row_ids))[::-1]))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_another_code, "part 00001: stored codes are not those of the stored vectors"),
        (_vectors_of_neighbours, "part 00001: stored codes are not those of the stored vectors"),
        (_not_a_number, "part 00001: NaN or infinite vector"),
        (_another_text, "part 00001: a text is not as long as its span"),
        (_ids_falling_in_a_list, "part 00001: row ids do not rise within a list"),
        (_an_id_beyond_the_last, "part 00001: row ids"),
        (_an_id_of_the_first_part, "are not exactly 0..599"),
        (_rows_in_another_order, "part 00001: row ids of lists"),
    ],
)
def test_entries_that_do_not_belong_together_are_found_though_all_checksums_are_right(
    copy: Version, spoil: Callable[[RunSlice], None], problem: str
) -> None:
    problems = problems_of(copy, remade(copy, spoil))
    assert any(problem in line for line in problems), problems


def test_a_part_that_is_written_again_unchanged_has_no_problems(copy: Version) -> None:
    manifest = remade(copy, lambda entries: None)
    assert problems_of(copy, manifest) == []
    assert manifest.segments[0].parts[1].content == copy.manifest.segments[0].parts[1].content


def test_the_checksum_of_all_rows_does_not_depend_on_its_steps() -> None:
    assert expected_checksum(3, 1000) == expected_checksum(3, 1000, step=7)
    assert (expected_checksum(0, 500) + expected_checksum(500, 500)) % 2**64 == expected_checksum(0, 1000)


def test_current_names_what_is_published(good: Version) -> None:
    body = json.loads(good.store.read("CURRENT"))["body"]
    assert (body["version"], body["epoch"], body["content_digest"]) == ("v000001", 1, good.manifest.content_digest)
