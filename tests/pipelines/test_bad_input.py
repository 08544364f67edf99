"""Bad rows end in rejects with a reason and rows reconcile; bad objects end the build, and nothing is published."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import stream
from operators.artifact.index import Index
from operators.artifact.manifest import read_current
from operators.errors import ConfigError, IntegrityError, RejectLimitError, SourceError, VectormillError
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
from operators.storage.store import open_store
from pipelines.build import BuildResult
from tests.pipelines.one_process import build_in_one_process

ALLOW = "read.max_reject_fraction=0.9"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "corpus"
    made.mkdir()
    lines = [{"id": f"good-{i}", "text": f"A good text about the number {i}."} for i in range(30)]
    (made / "good.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> Any:
    def build_it(*settings: str, sources: list[str] | None = None) -> BuildResult:
        return build_in_one_process(monkeypatch, sources or [str(folder)], str(tmp_path / "root"), *settings)

    return build_it


def assert_nothing_published(tmp_path: Path) -> None:
    assert read_current(open_store(str(tmp_path / "root"))) is None


def test_every_kind_of_bad_row_is_rejected_with_its_reason(run: Any, folder: Path, tmp_path: Path) -> None:
    with (folder / "rows.jsonl").open("wb") as file:
        file.write(b'{"id": "bad-utf8", "text": "caf\xe9"}\n')
        file.write(b'{"id": "null", "text": null}\n')
        file.write(b'{"id": "empty", "text": ""}\n{"id": "blank", "text": " \\t\\n "}\n')
        file.write(json.dumps({"id": "huge", "text": "x " * 2_500_000}).encode() + b"\n")
        file.write(b'{"id": "number", "text": 7}\n{"id": true, "text": "an id of the wrong type"}\n')
        file.write(b'{"id": "good-3", "text": "a second document with this id"}\n')
        file.write(b"this is no JSON\n")
        file.write('{"id": "ok", "text": "Ein guter Text mit Umlauten: äöü, und 漢字."}\n'.encode())
    control = {"id": ["control"], "text": ["\x01\x02"]}  # characters that the tokenizer drops
    pq.write_table(pa.table(control), folder / "control.parquet")
    (folder / "empty.jsonl").write_bytes(b"")
    manifest = run(ALLOW).manifest
    assert manifest.rows["rejected"] == {
        "bad_json": 1,
        "duplicate_id": 1,
        "empty_text": 2,
        "invalid_utf8": 1,
        "null_text": 1,
        "too_large": 1,
        "wrong_type": 2,
    }
    assert manifest.rows["dropped"] == {"no_tokens": 1}
    assert (manifest.rows["read"], manifest.rows["indexed"], manifest.num_docs) == (41, 31, 31)
    store = open_store(str(tmp_path / "root"))
    assert manifest.rejects is not None
    rejects = read_table(store, ObjectEntry.from_json(manifest.rejects)).to_pylist()
    assert len(rejects) == 10
    assert all(line["source"] and line["row"] >= 0 and line["detail"] for line in rejects)
    duplicate = next(line for line in rejects if line["reason"] == "duplicate_id")
    assert (duplicate["doc_id"], duplicate["source"]) == ("good-3", "rows.jsonl")
    assert "good.jsonl" in duplicate["detail"]
    index = Index.open(store)
    ids = index.doc_ids_of(index.exact_search(index.vectors_of(np.arange(1)), manifest.ntotal).entries_Qk[0])
    assert sorted(ids) == sorted([f"good-{i}" for i in range(30)] + ["ok"])


def test_too_many_bad_rows_end_the_build_with_counts_by_reason(run: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "rows.jsonl").write_text('{"id": "a", "text": ""}\n' * 3 + "no json\n")
    with pytest.raises(RejectLimitError, match=r"at most 5\.00% .* got 4 of 34 .*bad_json 1, empty_text 3"):
        run()
    assert_nothing_published(tmp_path)
    assert run(ALLOW).pieces_encoded == 0  # the limit is operational: raising it resumes


def test_a_bad_object_does_not_stop_the_others_but_nothing_is_published(run: Any, folder: Path, tmp_path: Path) -> None:
    table = pa.table({"id": ["x"], "text": ["y"]})
    pq.write_table(table, folder / "cut.parquet")
    data = (folder / "cut.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(data[: len(data) // 2])
    packed = gzip.compress(b'{"id": "z", "text": "zipped"}\n' * 1000)
    (folder / "cut.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(SourceError) as failure:
        run()
    assert "cut.parquet" in str(failure.value)
    assert "cut.jsonl.gz" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert_nothing_published(tmp_path)
    pq.write_table(table, folder / "cut.parquet")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"id": "z", "text": "zipped"}\n'))
    mended = run()
    assert mended.pieces_resumed == 1  # good.jsonl
    assert mended.manifest.rows["indexed"] == 32


def test_a_source_that_vanishes_while_the_build_runs_is_named(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "later.jsonl").write_text('{"id": "later", "text": "here for now"}\n')
    read = stream._read

    def vanish(job: Any, piece: Any) -> Any:
        (folder / "later.jsonl").unlink(missing_ok=True)
        return read(job, piece)

    monkeypatch.setattr(stream, "_read", vanish)
    with pytest.raises(SourceError, match=r"later\.jsonl"):
        run()
    assert_nothing_published(tmp_path)


def test_a_source_that_changes_while_the_build_runs_is_named(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = stream._read

    def change(job: Any, piece: Any) -> Any:
        with (folder / "good.jsonl").open("a") as file:
            file.write('{"id": "new", "text": "appended"}\n')
        return read(job, piece)

    monkeypatch.setattr(stream, "_read", change)
    with pytest.raises(SourceError, match=r"good\.jsonl.*changed"):
        run()
    assert_nothing_published(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["read.text_columns=txt"], "'txt'.*did you mean 'text'"),
        (["read.id_column=idd"], "'idd'.*did you mean 'id'"),
        (["read.text_columns=title,text,body"], "title|body"),
    ],
)
def test_columns_that_do_not_exist_are_named_with_the_nearest(
    run: Any, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*settings)
    assert_nothing_published(tmp_path)


def test_a_column_of_the_wrong_type_is_named_with_its_type(run: Any, folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "text": [3.5]}), folder / "numbers.parquet")
    with pytest.raises(VectormillError, match=r"'text'.*numbers\.parquet.*double"):
        run()
    assert_nothing_published(tmp_path)


def test_a_corpus_without_a_usable_text_is_refused(run: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "good.jsonl").write_text('{"id": "a", "text": ""}\n')
    with pytest.raises(SourceError, match="at least one usable text"):
        run("read.max_reject_fraction=1")
    (folder / "good.jsonl").write_text("")
    with pytest.raises(SourceError, match="at least one row"):
        run()
    assert_nothing_published(tmp_path)


def test_a_root_inside_the_corpus_is_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with pytest.raises(ConfigError, match="must not lie in a SOURCE folder"):
        build_in_one_process(monkeypatch, [str(folder)], str(folder / "index"))
    assert not (folder / "index").exists()


def test_one_document_makes_an_index(run: Any, folder: Path) -> None:
    (folder / "good.jsonl").write_text('{"id": "only", "text": "the only document"}\n')
    manifest = run().manifest
    assert (manifest.ntotal, manifest.nlist, manifest.quality["recall@10"]) == (1, 1, 1.0)


def test_a_damaged_piece_is_refused_by_name_and_nothing_is_published(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "rows.jsonl").write_text('{"id": "a", "text": ""}\n' * 9)
    with pytest.raises(RejectLimitError):
        run()  # pieces are committed, nothing else
    pieces = [p for p in (tmp_path / "root" / "runs").rglob("pieces/*.parquet") if "rejects" not in p.name]
    data = bytearray(pieces[0].read_bytes())
    data[len(data) // 2] ^= 1
    os.unlink(pieces[0])
    pieces[0].write_bytes(data)
    with pytest.raises(IntegrityError, match=pieces[0].name):
        run(ALLOW)
    assert_nothing_published(tmp_path)
