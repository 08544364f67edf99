"""What an open index reads: every byte checked, its own version whatever happens to the root, and the next one when told."""

from __future__ import annotations

import dataclasses
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from operators.artifact.index import Index
from operators.artifact.manifest import manifest_key, open_current
from operators.artifact.open_files import OTHER_FILES, allow_open_files
from operators.errors import IndexNotFoundError, IntegrityError, ResourceError
from operators.schemas import ROW_STORE
from operators.storage.local_store import LocalStore
from operators.storage.store import open_store
from tests.artifact_maker import Version, add_delta, delete_rows, flip_bit, make_version

SMALL = {"num_docs": 40, "d": 8, "nlist": 6, "M": 4, "part_rows": 50}
MAPPED, JOINED = 0, 1 << 30


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Three segments, the first two with deleted rows."""
    version = make_version(tmp_path_factory.mktemp("reads"), **SMALL)  # type: ignore[arg-type]
    version = add_delta(version, 20, delete=[1, 30, 50])
    return add_delta(version, 10, delete=[85, 90])


@pytest.fixture
def copy(template: Version, tmp_path: Path) -> Version:
    shutil.copytree(template.store.url, tmp_path / "copy")
    return dataclasses.replace(template, store=open_store(str(tmp_path / "copy")))


def use_all(index: Index, version: Version) -> list[np.ndarray]:
    """Search through all lists, exactly, and read what belongs to the hits."""
    queries, manifest = version.corpus.queries_Qd, index.manifest
    found = index.search(queries, manifest.ntotal, nprobe=manifest.nlist, refine_factor=1)
    exact = index.exact_search(queries, 5)
    lines = index.rows_of(found.entries_Qk[0])
    texts = np.array([line["text"] for line in lines])
    return [found.scores_Qk, found.row_ids_Qk, exact.row_ids_Qk, texts]


def open_and_use_all(version: Version, joined_bytes: int) -> list[np.ndarray]:
    manifest = open_current(version.store)
    return use_all(Index(version.store, manifest, joined_bytes=joined_bytes), version)


KINDS: dict[str, Callable[[Version], str]] = {
    "lists of the base": lambda v: v.part_objects(1)["lists"].key,
    "vectors of the base": lambda v: v.part_objects(1)["vectors"].key,
    "rows of the base": lambda v: v.part_objects(0)["rows"].key,
    "part record of the base": lambda v: v.manifest.segments[0].parts[1].record_key,
    "bitmap of the base": lambda v: str((v.manifest.segments[0].deleted or {})["key"]),
    "lists of a delta": lambda v: v.part_objects(0, 2)["lists"].key,
    "vectors of a delta": lambda v: v.part_objects(0, 1)["vectors"].key,
    "rows of a delta": lambda v: v.part_objects(0, 2)["rows"].key,
    "part record of a delta": lambda v: v.manifest.segments[2].parts[0].record_key,
    "bitmap of a delta": lambda v: str((v.manifest.segments[1].deleted or {})["key"]),
    "quantizer": lambda v: v.manifest.quantizer_entry.key,
    "manifest": lambda v: manifest_key(v.manifest.version),
    "CURRENT": lambda v: "CURRENT",
}


@pytest.mark.parametrize("joined_bytes", [MAPPED, JOINED])
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_what_a_search_reads_is_found_and_named(copy: Version, kind: str, joined_bytes: int) -> None:
    key = KINDS[kind](copy)
    size = copy.store.size_bytes(key)
    assert size is not None
    rng = np.random.default_rng(7)
    for position in [0, size - 1, *rng.integers(0, size, 3).tolist()]:
        flip_bit(copy.store, key, position, position % 8)
        with pytest.raises(IntegrityError, match=key):
            open_and_use_all(copy, joined_bytes)
        flip_bit(copy.store, key, position, position % 8)
    open_and_use_all(copy, joined_bytes)


def test_lists_are_checked_when_they_are_first_probed_and_those_of_other_blocks_later(tmp_path: Path) -> None:
    made = make_version(tmp_path, num_docs=2_500, nlist=8, M=16, d=16, nbits=8, part_rows=100_000)
    lists = made.part_objects()["lists"]
    assert len(lists.crc32) == 2
    flip_bit(made.store, lists.key, lists.size_bytes - 1)  # the last row id of the last list
    index = Index.open(made.store)
    first = made.quantizer.centroids_Kd[:1]
    assert index.search(first, 3, nprobe=1).row_ids_Qk.min() >= 0
    with pytest.raises(IntegrityError, match=f"{lists.key} is damaged: bytes 65536 to {lists.size_bytes}"):
        index.search(first, 3, nprobe=8)
    flip_bit(made.store, lists.key, lists.size_bytes - 1)
    expected = Index.open(made.store).search(first, 3, nprobe=8)
    assert np.array_equal(index.search(first, 3, nprobe=8).row_ids_Qk, expected.row_ids_Qk)


@pytest.mark.parametrize("joined_bytes", [MAPPED, JOINED])
def test_an_open_index_of_a_local_root_answers_when_all_its_objects_are_deleted(
    copy: Version, joined_bytes: int
) -> None:
    expected = open_and_use_all(copy, joined_bytes)
    index = Index(
        copy.store, open_current(copy.store), joined_bytes=joined_bytes
    )  # has read no list, vector or row yet
    shutil.rmtree(copy.store.url)
    assert all(np.array_equal(a, b) for a, b in zip(use_all(index, copy), expected, strict=True))


def test_an_index_moves_to_the_published_version_when_it_is_told_to(copy: Version) -> None:
    index = Index.open(copy.store)
    assert index.is_current()
    assert index.reopened() is index
    answers = use_all(index, copy)
    after = delete_rows(add_delta(copy, 15), [5, 6, 7])
    assert not index.is_current()
    moved = index.reopened()
    assert moved.manifest.version == after.manifest.version
    assert moved.is_current()
    assert np.array_equal(use_all(moved, after)[2], open_and_use_all(after, MAPPED)[2])
    assert all(np.array_equal(a, b) for a, b in zip(use_all(index, copy), answers, strict=True))
    copy.store.delete("CURRENT")
    with pytest.raises(IndexNotFoundError, match="published at .* any more"):
        index.is_current()


def test_a_version_that_gc_deletes_while_it_is_opened_gives_way_to_the_published_one(copy: Version) -> None:
    last = copy.manifest.segments[2].parts[0].record_key
    without = dataclasses.replace(copy.manifest, segments=copy.manifest.segments[:2])

    class Busy(LocalStore):
        """Between the manifest and a record that it names, another version is published and the record deleted."""

        def read(self, key: str) -> bytes:
            if key == last and self.local_path(key).exists():
                self.local_path(key).unlink()
                add_delta(dataclasses.replace(copy, manifest=without), 5)
            return super().read(key)

    index = Index.open(Busy(copy.store.url, Path(copy.store.url)))
    assert index.manifest.version > copy.manifest.version


def test_damage_in_the_cache_of_a_remote_index_is_found_and_mended_by_opening_again(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VECTORMILL_CACHE", str(tmp_path / "cache"))
    made = make_version(bucket + "/cached", **SMALL)  # type: ignore[arg-type]
    made = add_delta(made, 10, delete=[2])
    expected = open_and_use_all(made, MAPPED)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == sum(len(segment.parts) for segment in made.manifest.segments)
    for position in (2, files[0].stat().st_size - 1):
        data = bytearray(files[0].read_bytes())
        data[position] ^= 1
        files[0].write_bytes(data)
        with pytest.raises(IntegrityError, match=f"the copy {files[0]} of object s3://.* was damaged"):
            open_and_use_all(made, MAPPED)
        assert all(np.array_equal(a, b) for a, b in zip(open_and_use_all(made, MAPPED), expected, strict=True))


@pytest.mark.parametrize(("kind", "warm"), [("vectors", False), ("rows", False), ("rows", True)])
def test_damaged_copies_of_vectors_and_rows_are_mended_by_opening_again(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, warm: bool
) -> None:
    monkeypatch.setenv("VECTORMILL_CACHE", str(tmp_path / "cache"))
    made = make_version(bucket + "/copied", **SMALL)  # type: ignore[arg-type]

    def use_all() -> list[np.ndarray]:
        index = Index(made.store, made.manifest, copies=True)
        if warm:
            index.row_groups.warm(tuple(ROW_STORE.names))
        found = index.search(made.corpus.queries_Qd, 5, nprobe=6)
        return [found.row_ids_Qk, np.array([row["text"] for row in index.rows_of(np.arange(made.manifest.ntotal))])]

    expected = use_all()
    magic = {"vectors": b"\x93NUMPY", "rows": b"PAR1"}[kind]
    files = [path for path in (tmp_path / "cache").iterdir() if path.read_bytes().startswith(magic)]
    assert files and not list((tmp_path / "cache").glob("*.tmp"))
    for position in (2, files[0].stat().st_size // 2, files[0].stat().st_size - 1):
        data = bytearray(files[0].read_bytes())
        data[position] ^= 1
        files[0].write_bytes(data)
        with pytest.raises(IntegrityError):
            use_all()
        assert not files[0].exists()
        assert all(np.array_equal(a, b) for a, b in zip(use_all(), expected, strict=True))


def test_the_limit_of_open_files_is_raised_as_far_as_the_process_may() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OTHER_FILES, hard))
        allow_open_files(50, "here")
        raised = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert raised[0] >= OTHER_FILES + 50
        allow_open_files(10, "here")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == raised
        if hard != resource.RLIM_INFINITY:
            with pytest.raises(ResourceError, match=f"keeps {hard} files open, this process may open {hard} in all"):
                allow_open_files(hard, "here")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
