"""The code of docs/artifact-format.md, run as printed: an artifact is read with faiss, pyarrow and the standard library."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from operators import schemas
from operators.artifact.index import Index
from operators.artifact.list_run import row_id_checksum
from operators.storage.store import open_store
from tests.artifact_maker import Version, add_delta, flip_bit, make_version

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "artifact-format.md"


def printed_code() -> str:
    """All Python blocks of the document."""
    return "\n".join(re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL))


@pytest.fixture(scope="module")
def doc() -> Any:
    """The document's functions."""
    names: dict[str, Any] = {}
    exec(compile(printed_code(), str(DOCUMENT), "exec"), names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module", params=["ip", "l2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """One segment, nothing deleted."""
    return make_version(tmp_path_factory.mktemp(request.param), metric=request.param, d=32, M=16)


@pytest.fixture(scope="module", params=["base", "deltas"])
def made(base: Version, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """The base, or three segments of 600, 60 and 15 rows, of which the first two have deleted rows."""
    if request.param == "base":
        return base
    root = tmp_path_factory.mktemp("deltas") / "root"
    shutil.copytree(base.store.url, root)
    copy = dataclasses.replace(base, store=open_store(str(root)))
    return add_delta(add_delta(copy, 30, delete=range(40, 160)), 8, delete=[610, 655])


def test_the_printed_code_imports_nothing_of_ours() -> None:
    code = printed_code()
    imported = re.findall(r"^(?:import|from) ([\w.]+)", code, re.MULTILINE)
    assert set(imported) == {"json", "pathlib", "faiss", "numpy", "pyarrow.dataset", "hashlib"}


def test_plain_faiss_finds_what_one_index_of_the_live_rows_finds(doc: Any, made: Version) -> None:
    index, params, manifest, records = doc.open_index(made.store.url)
    gc.collect()
    assert len(records) > 2
    assert (index.ntotal, index.nlist) == (len(made.corpus.texts), manifest["nlist"])
    whole, live = made.quantizer.to_faiss(), np.flatnonzero(made.live_N)
    whole.add_with_ids(made.corpus.vectors_Nd[live].astype(np.float32), live)
    assert whole.ntotal == manifest["ntotal"]
    queries = made.corpus.queries_Qd
    for nprobe in (1, 3, manifest["quality"]["nprobe"], manifest["nlist"]):
        params.nprobe = whole.nprobe = nprobe
        distances, ids = index.search(queries, 30, params=params)
        expected_distances, expected = whole.search(queries, 30)
        assert np.array_equal(ids, expected)
        assert np.array_equal(distances, expected_distances)


def test_plain_faiss_finds_what_search_finds_without_refinement(doc: Any, made: Version) -> None:
    index, params, manifest, _ = doc.open_index(made.store.url)
    ours = Index.open(made.store)
    queries = made.corpus.queries_Qd
    for nprobe in (1, manifest["quality"]["nprobe"], manifest["nlist"]):
        params.nprobe = nprobe
        distances, ids = index.search(queries, 30, params=params)
        found = ours.search(queries, 30, nprobe=nprobe, refine_factor=0)
        assert np.array_equal(found.row_ids_Qk, ids)
        present = ids >= 0
        assert np.array_equal(
            found.scores_Qk[present], (distances if made.quantizer.metric == "ip" else -distances)[present]
        )


def test_lists_are_memory_mapped_not_loaded(doc: Any, made: Version) -> None:
    index, params, _, records = doc.open_index(made.store.url)
    index.search(made.corpus.queries_Qd, 5, params=params)
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("only Linux lists a process's mappings")
    for record in records:
        assert record["objects"]["lists"]["key"] in mapped.read_text()


def test_rows_of_hits_are_read_with_pyarrow_alone(doc: Any, made: Version) -> None:
    index, params, _, records = doc.open_index(made.store.url)
    _, ids = index.search(made.corpus.queries_Qd, 10, params=params)
    wanted = sorted({int(i) for i in ids.ravel() if i >= 0})
    rows = doc.rows_of(made.store.url, records, wanted)
    assert sorted(rows) == wanted
    for row_id, line in rows.items():
        assert (line["doc_id"], line["text"]) == (made.corpus.doc_ids[row_id], made.corpus.texts[row_id])
        assert line["chunk_no"] == made.corpus.chunk_no[row_id]
        assert line["end"] - line["start"] == len(line["text"])


def test_vectors_and_lists_lie_as_the_document_says(doc: Any, made: Version) -> None:
    _, _, manifest, records = doc.open_index(made.store.url)
    checksum = 0
    for record in records:
        facts, objects = record["facts"], record["objects"]
        root = Path(made.store.url)
        data = (root / objects["lists"]["key"]).read_bytes()
        num_lists, code_size = np.frombuffer(data, "<u8", 2, 4).tolist()
        assert (data[:4], data[20:24]) == (b"ilar", b"full")
        assert (num_lists, code_size) == (facts["num_lists"], -(-manifest["M"] * manifest["nbits"] // 8))
        assert np.frombuffer(data, "<u8", 1, 24)[0] == num_lists
        position, ids = 32 + 8 * num_lists, []
        for size in np.frombuffer(data, "<u8", num_lists, 32).tolist():
            ids.append(np.frombuffer(data, "<i8", size, position + size * code_size))
            assert (np.diff(ids[-1]) > 0).all()
            position += size * (code_size + 8)
        assert position == len(data)
        vectors = np.load(root / objects["vectors"]["key"], mmap_mode="r")
        row_ids = np.concatenate(ids)
        assert np.array_equal(vectors, made.corpus.vectors_Nd[row_ids])
        assert facts["row_id_checksum"] == row_id_checksum(row_ids)
        checksum += facts["row_id_checksum"]
    assert checksum % 2**64 == row_id_checksum(np.arange(len(made.corpus.texts)))


def test_content_digest_is_what_the_document_defines(doc: Any, made: Version) -> None:
    _, _, manifest, _ = doc.open_index(made.store.url)
    content = {
        "format_version": 2,
        "quantizer": manifest["quantizer"]["sha256"],
        "queries": manifest["queries"]["sha256"],
        "rejects": manifest["rejects"]["sha256"] if manifest["rejects"] else None,
        "documents": [table["object"]["sha256"] for table in manifest["documents"]],
        "amended": manifest["amended"]["sha256"] if manifest["amended"] else None,
        "segments": [
            {
                "first_row_id": segment["first_row_id"],
                "num_rows": segment["num_rows"],
                "deleted": segment["deleted"]["sha256"] if segment["deleted"] else None,
                "parts": [[p["first_list"], p["num_lists"], p["num_entries"], p["content"]] for p in segment["parts"]],
            }
            for segment in manifest["segments"]
        ],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == manifest["content_digest"]


def test_every_field_of_the_files_is_in_the_document(made: Version) -> None:
    root, text = Path(made.store.url), DOCUMENT.read_text(encoding="utf-8")
    manifest = json.loads((root / f"versions/{made.manifest.version}/manifest.json").read_text())["body"]
    part = manifest["segments"][0]["parts"][0]
    record = json.loads((root / part["record_key"]).read_text())["body"]
    named = [
        *json.loads((root / "CURRENT").read_text())["body"],
        *manifest,
        *manifest["segments"][0],
        *part,
        *record,
        *record["facts"],
        *record["objects"]["lists"],
        *manifest["documents"][0],
        *schemas.SOURCES.names,
        *schemas.DOCUMENTS.names,
        *schemas.AMENDED.names,
        *schemas.EXACT.names,
        *schemas.REJECTS.names,
        *schemas.ROW_STORE.names,
    ]
    assert [name for name in named if f"`{name}`" not in text] == []


def test_the_printed_check_names_damaged_objects(doc: Any, made: Version, tmp_path: Path) -> None:
    shutil.copytree(made.store.url, tmp_path / "root")
    root = str(tmp_path / "root")
    assert doc.damaged_objects(root) == []
    keys = [entry.key for entry in made.part_objects(1).values()]
    keys += [entry["key"] for entry in made.manifest.small_objects]
    copy = type(made.store)(root, tmp_path / "root")  # type: ignore[call-arg]
    for key in keys:
        position = min(100, (copy.size_bytes(key) or 0) - 1)  # the last segment's bitmap has a few bytes
        flip_bit(copy, key, position)
        assert doc.damaged_objects(root) == [key]
        flip_bit(copy, key, position)
    (tmp_path / "root" / keys[0]).unlink()
    assert doc.damaged_objects(root) == [keys[0]]


def test_a_process_without_our_code_reads_the_index(doc: Any, made: Version, tmp_path: Path) -> None:
    """Elsewhere, with nothing of ours on the path: the document's code and three lines of use."""
    script = tmp_path / "stranger.py"
    use = (
        "import sys, numpy as np\n"
        "index, params, manifest, records = open_index(sys.argv[1])\n"
        "_, ids = index.search(np.load(sys.argv[2]), 5, params=params)\n"
        "rows = rows_of(sys.argv[1], records, ids[0])\n"
        "print(json.dumps({'ids': ids.tolist(), 'text': rows[ids[0][0]]['text'], 'damaged': damaged_objects(sys.argv[1])}))\n"
    )
    script.write_text(f"{printed_code()}\n{use}", encoding="utf-8")
    np.save(tmp_path / "queries.npy", made.corpus.queries_Qd)
    command = [sys.executable, "-I", str(script), made.store.url, str(tmp_path / "queries.npy")]
    answer = json.loads(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout)
    index, params, _, _ = doc.open_index(made.store.url)
    _, expected = index.search(made.corpus.queries_Qd, 5, params=params)
    assert answer["ids"] == expected.tolist()
    assert answer["text"] == made.corpus.texts[expected[0, 0]]
    assert answer["damaged"] == []
