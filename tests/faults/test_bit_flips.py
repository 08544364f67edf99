"""One flipped bit in each kind of published object, of a version as build, update and a deletion leave it.

The kinds are found from the manifest and held against what lies at the root: a new one cannot be forgotten.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from operators.artifact.index import Index
from operators.artifact.manifest import CURRENT_KEY, Manifest, manifest_key, open_current, read_part_records
from operators.errors import IntegrityError
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
from operators.storage.store import Store, open_store
from pipelines.demo_corpus import collect_documents
from pipelines.verify import verify
from tests.artifact_maker import flip_bit
from tests.faults.bad_storage import run_command
from tests.pipelines.build_corpus import IN_PROCESS, SMALL_UNITS

# Objects that the manifest names: the path of the field. Others: what they are.
READ_BY_SEARCH = ("CURRENT", "manifest", "part record", "quantizer", "lists", "vectors", "rows", "segments.deleted")
NOT_READ_BY_SEARCH = ("queries", "exact", "sources.listing", "documents.object", "rejects", "amended")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a base, a delta, deleted rows in both, rejects and an amended ledger."""
    folder = tmp_path_factory.mktemp("flips")
    documents = [{"id": d.name, "text": d.text[:150]} for d in collect_documents(40)]
    (folder / "docs").mkdir()
    root, update = str(folder / "root"), ("update", str(folder / "docs"), "--index", str(folder / "root"))
    settings = [word for setting in (*SMALL_UNITS, IN_PROCESS) for word in ("--set", setting)]

    def write(name: str, lines: list[dict[str, str]]) -> None:
        (folder / "docs" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    write("a.jsonl", [*documents[:20], {"id": "empty", "text": ""}])
    assert run_command("build", str(folder / "docs"), "--out", root, *settings).code == 0
    write("b.jsonl", [*documents[20:], documents[3] | {"id": "again"}])
    assert run_command(*update, *settings[-2:]).code == 0
    write("a.jsonl", documents[4:20])
    (folder / "gone.txt").write_text(f"{documents[25]['id']}\n")
    done = run_command(*update, "--deletes", str(folder / "gone.txt"), *settings[-2:])
    assert done.code == 0, done.err
    return Path(root)


def published_objects(store: Store, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(kind, key) of all that the published version consists of."""
    yield "CURRENT", CURRENT_KEY
    yield "manifest", manifest_key(manifest.version)
    yield from _entries_in(dataclasses.asdict(manifest), "")
    for segment in manifest.segments:
        for ref, record in zip(segment.parts, read_part_records(store, segment.parts), strict=True):
            yield "part record", ref.record_key
            for role, part_object in record.objects.items():
                yield role, part_object.key


def _entries_in(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, key) of everything in a JSON value that is an ObjectEntry."""
    if isinstance(value, dict):
        if "crc32" in value:
            yield path, value["key"]
        for name, inner in value.items():
            yield from _entries_in(inner, f"{path}.{name}".lstrip("."))
    if isinstance(value, list):
        for inner in value:
            yield from _entries_in(inner, path)


def test_the_kinds_that_are_damaged_here_are_all_that_a_version_has(built: Path) -> None:
    store = open_store(str(built))
    manifest = open_current(store)
    found = list(published_objects(store, manifest))
    assert {kind for kind, _ in found} == {*READ_BY_SEARCH, *NOT_READ_BY_SEARCH}
    assert {entry["key"] for entry in manifest.small_objects} <= {key for _, key in found}
    assert verify(store.url)["problems"] == []


@pytest.mark.parametrize("kind", [*READ_BY_SEARCH, *NOT_READ_BY_SEARCH])
def test_a_flipped_bit_is_found_by_verify_and_by_a_search_that_reads_it(built: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(built, tmp_path / "root")
    store = open_store(str(tmp_path / "root"))
    manifest = open_current(store)
    queries = np.array(
        read_table(store, ObjectEntry.from_json(manifest.queries)).column("vector").to_pylist(), np.float32
    )

    def search() -> list[str]:
        index = Index.open(store)
        found = index.search(queries, index.manifest.ntotal, nprobe=index.manifest.nlist, refine_factor=1)
        return [line["text"] for line in index.rows_of(found.entries_Qk[0])]

    before = search()
    keys = [key for found, key in published_objects(store, manifest) if found == kind]
    rng = np.random.default_rng(5)
    for key in {keys[0], keys[-1]}:
        size = store.size_bytes(key)
        assert size
        for position in (0, int(rng.integers(0, size)), size - 1):
            bit = int(rng.integers(0, 8))
            flip_bit(store, key, position, bit)
            problems = verify(store.url)["problems"]
            assert any(key in problem for problem in problems), (key, position, problems)
            if kind in READ_BY_SEARCH:
                with pytest.raises(IntegrityError, match=key):
                    search()
            else:
                assert search() == before
            flip_bit(store, key, position, bit)
    assert verify(store.url)["problems"] == []
    assert search() == before
