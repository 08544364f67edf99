"""Damage of every kind to every kind of published object, and versions put together wrongly: all found and named."""

from __future__ import annotations

import dataclasses
import hashlib
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
    compute_content_digest,
    manifest_key,
    part_ref,
    read_manifest,
    read_part_record,
)
from operators.artifact.verifier import check_manifest, check_version, expected_checksum, verify_part
from operators.errors import IndexNotFoundError, IntegrityError
from operators.storage.commits import CommitRecord, commit, seal
from operators.storage.store import Store, open_store
from pipelines.verify import verify
from tests.artifact_maker import Version, add_delta, flip_bit, make_version, truncate

# Version 3: a base s1 and two deltas, with deleted rows in the base and in the first delta.
KINDS = {
    "lists": "segments/s1/part-00001-*.lists",
    "vectors": "segments/s1/part-00001-*.vectors.npy",
    "rows": "segments/s1/part-00001-*.rows.parquet",
    "part record": "segments/s1/part-00001.json",
    "lists of a delta": "segments/s2/part-00000-*.lists",
    "vectors of a delta": "segments/s3/part-00000-*.vectors.npy",
    "rows of a delta": "segments/s2/part-00000-*.rows.parquet",
    "part record of a delta": "segments/s3/part-00000.json",
    "quantizer": "quantizers/*.faissindex",
    "queries": "segments/s1/queries.parquet",
    "rejects": "segments/s3/rejects.parquet",
    "sources": "segments/s3/sources.parquet",
    "documents of the base": "segments/s1/documents.parquet",
    "documents of a delta": "segments/s2/documents.parquet",
    "amended": "segments/s3/amended.parquet",
    "bitmap of the base": "segments/s2/deleted-s1",
    "bitmap of a delta": "segments/s3/deleted-s2",
    "manifest": "versions/v000003/manifest.json",
    "CURRENT": "CURRENT",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Version:
    base = make_version(tmp_path_factory.mktemp("good"))
    return add_delta(add_delta(base, 30, delete=[3, 250]), 8, delete=[610])


@pytest.fixture
def copy(good: Version, tmp_path: Path) -> Version:
    """The version at a root of its own, to be damaged."""
    shutil.copytree(good.store.url, tmp_path / "root")
    return dataclasses.replace(good, store=open_store(str(tmp_path / "root")))


def key_of(store: Store, pattern: str) -> str:
    """The one published object whose key matches."""
    root = Path(store.url)
    (found,) = root.glob(pattern)
    return str(found.relative_to(root))


def problems_of(made: Version, manifest: Manifest | None = None) -> list[str]:
    """What a build finds before it publishes the candidate."""
    manifest = manifest or made.manifest
    reports = {
        segment.name: [verify_part(made.store, ref, made.quantizer, segment) for ref in segment.parts]
        for segment in manifest.segments
    }
    return check_version(made.store, manifest, reports)


def test_a_good_version_has_no_problems(good: Version) -> None:
    found = verify(good.store.url)
    assert (found["ok"], found["problems"], found["version"]) == (True, [], "v000003")
    assert [segment.num_deleted for segment in good.manifest.segments] == [6, 3, 0]
    assert problems_of(good) == []
    assert check_version(good.store, good.manifest, {}) == []  # all segments taken over from a parent
    for version in ("v000001", "v000002"):
        assert verify(good.store.url, version)["problems"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_any_object_is_found_and_named(copy: Version, kind: str) -> None:
    key = key_of(copy.store, KINDS[kind])
    size = copy.store.size_bytes(key)
    assert size is not None
    rng = np.random.default_rng(11)
    for position in [0, size - 1, *rng.integers(0, size, 3).tolist()]:
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


def replaced_manifest(store: Store, manifest: Manifest) -> str:
    """Put the manifest in the place of the one of its version; its SHA-256."""
    data = seal(dataclasses.asdict(manifest))
    store.put(manifest_key(manifest.version), data)
    return hashlib.sha256(data).hexdigest()


def test_a_manifest_of_another_version_under_this_name_is_found(copy: Version) -> None:
    changed = dataclasses.replace(copy.manifest, num_docs=copy.manifest.num_docs + 1)
    replaced_manifest(copy.store, changed)
    (problem,) = verify(copy.store.url)["problems"]
    assert "is not the one that CURRENT names" in problem
    assert manifest_key("v000003") in problem


def test_a_newer_format_is_refused(copy: Version) -> None:
    digest = replaced_manifest(copy.store, dataclasses.replace(copy.manifest, format_version=3))
    with pytest.raises(IntegrityError, match="has format version 3, this vectormill reads 2"):
        read_manifest(copy.store, "v000003", digest)


def with_parts(manifest: Manifest, parts: list[PartRef]) -> Manifest:
    return with_segment(manifest, 0, parts=parts)


def with_segment(manifest: Manifest, number: int, **changes: Any) -> Manifest:
    segments = list(manifest.segments)
    segments[number] = dataclasses.replace(segments[number], **changes)
    return dataclasses.replace(manifest, segments=segments)


def redigested(manifest: Manifest) -> Manifest:
    """With the content digest that it should have: what is wrong lies elsewhere."""
    return dataclasses.replace(manifest, content_digest=compute_content_digest(manifest))


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
    problems = verify_part(other.store, segment.parts[0], good.quantizer, segment).problems
    assert any(f"was made with quantizer {other.quantizer.digest}" in problem for problem in problems)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rows": {"read": 5, "indexed": 4, "rejected": {}, "dropped": {}}}, "rows do not reconcile"),
        ({"num_docs": 7}, "documents are indexed, the manifest says num_docs 7"),
        ({"content_digest": "0" * 64}, "content_digest is"),
        ({"ntotal": 3}, "the manifest says ntotal 3"),
        ({"nlist": 15}, "quantizer has"),
        ({"metric": "l2"}, "quantizer has"),
        (
            {"rows": {"read": 340, "indexed": 335, "rejected": {"empty_text": 2}, "dropped": {"deleted": 3}}},
            "the rejects list {'rejected': {'empty_text': 1, 'not_utf8': 1}, 'dropped': {'deleted': 3}}",
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
    return redigested(with_parts(made.manifest, parts))


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
    assert (body["version"], body["epoch"], body["content_digest"]) == ("v000003", 3, good.manifest.content_digest)
