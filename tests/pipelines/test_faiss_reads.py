"""The code of docs/artifact-format.md, run as printed: an artifact is read with faiss, pyarrow and the standard library."""

from __future__ import annotations

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

from operators.artifact.index import Index
from operators.artifact.list_run import row_id_checksum
from tests.artifact_maker import Version, flip_bit, make_version

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
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp(request.param), metric=request.param, d=32, M=16)


def test_the_printed_code_imports_nothing_of_ours() -> None:
    code = printed_code()
    imported = re.findall(r"^(?:import|from) ([\w.]+)", code, re.MULTILINE)
    assert set(imported) == {"json", "pathlib", "faiss", "pyarrow.dataset", "hashlib"}


def test_plain_faiss_finds_what_search_finds_without_refinement(doc: Any, made: Version) -> None:
    index, manifest, records = doc.open_index(made.store.url)
    gc.collect()
    assert len(records) > 2
    assert (index.ntotal, index.nlist) == (manifest["ntotal"], manifest["nlist"])
    ours = Index.open(made.store)
    queries = made.corpus.queries_Qd
    for nprobe in (1, 3, manifest["quality"]["nprobe"], manifest["nlist"]):
        index.nprobe = nprobe
        distances, ids = index.search(queries, 30)
        found = ours.search(queries, 30, nprobe=nprobe, refine_factor=0)
        assert np.array_equal(found.row_ids_Qk, ids)
        present = ids >= 0
        assert np.array_equal(
            found.scores_Qk[present], (distances if made.quantizer.metric == "ip" else -distances)[present]
        )


def test_lists_are_memory_mapped_not_loaded(doc: Any, made: Version) -> None:
    index, _, records = doc.open_index(made.store.url)
    index.search(made.corpus.queries_Qd, 5)
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("only Linux lists a process's mappings")
    for record in records:
        assert record["objects"]["lists"]["key"] in mapped.read_text()


def test_rows_of_hits_are_read_with_pyarrow_alone(doc: Any, made: Version) -> None:
    index, _, records = doc.open_index(made.store.url)
    _, ids = index.search(made.corpus.queries_Qd, 10)
    wanted = sorted({int(i) for i in ids.ravel() if i >= 0})
    rows = doc.rows_of(made.store.url, records, wanted)
    assert sorted(rows) == wanted
    for row_id, line in rows.items():  # no row of this corpus is rejected, so row ids count its chunks
        assert (line["doc_id"], line["text"]) == (made.corpus.doc_ids[row_id], made.corpus.texts[row_id])
        assert line["chunk_no"] == made.corpus.chunk_no[row_id]
        assert line["end"] - line["start"] == len(line["text"])


def test_vectors_and_lists_lie_as_the_document_says(doc: Any, made: Version) -> None:
    _, manifest, records = doc.open_index(made.store.url)
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
    assert checksum % 2**64 == row_id_checksum(np.arange(manifest["ntotal"]))


def test_content_digest_is_what_the_document_defines(doc: Any, made: Version) -> None:
    _, manifest, _ = doc.open_index(made.store.url)
    content = {
        "format_version": 1,
        "quantizer": manifest["quantizer"]["sha256"],
        "queries": manifest["queries"]["sha256"],
        "segments": [
            {
                "first_row_id": segment["first_row_id"],
                "num_rows": segment["num_rows"],
                "rejects": segment["rejects"]["sha256"] if segment["rejects"] else None,
                "parts": [[p["first_list"], p["num_lists"], p["num_entries"], p["content"]] for p in segment["parts"]],
            }
            for segment in manifest["segments"]
        ],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == manifest["content_digest"]


def test_every_field_of_the_files_is_in_the_document(made: Version) -> None:
    root, text = Path(made.store.url), DOCUMENT.read_text(encoding="utf-8")
    manifest = json.loads((root / "versions/v000001/manifest.json").read_text())["body"]
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
    ]
    assert [name for name in named if f"`{name}`" not in text] == []


def test_the_printed_check_names_damaged_objects(doc: Any, made: Version, tmp_path: Path) -> None:
    shutil.copytree(made.store.url, tmp_path / "root")
    root = str(tmp_path / "root")
    assert doc.damaged_objects(root) == []
    keys = [entry.key for entry in made.part_objects(1).values()] + [made.manifest.quantizer["key"]]
    copy = type(made.store)(root, tmp_path / "root")  # type: ignore[call-arg]
    for key in keys:
        flip_bit(copy, key, 100)
        assert doc.damaged_objects(root) == [key]
        flip_bit(copy, key, 100)
    (tmp_path / "root" / keys[0]).unlink()
    assert doc.damaged_objects(root) == [keys[0]]


def test_a_process_without_our_code_reads_the_index(made: Version, tmp_path: Path) -> None:
    """Elsewhere, with nothing of ours on the path: the document's code and three lines of use."""
    script = tmp_path / "stranger.py"
    use = (
        "import sys, numpy as np\n"
        "index, manifest, records = open_index(sys.argv[1])\n"
        "_, ids = index.search(np.load(sys.argv[2]), 5)\n"
        "rows = rows_of(sys.argv[1], records, ids[0])\n"
        "print(json.dumps({'ids': ids.tolist(), 'text': rows[ids[0][0]]['text'], 'damaged': damaged_objects(sys.argv[1])}))\n"
    )
    script.write_text(f"{printed_code()}\n{use}", encoding="utf-8")
    np.save(tmp_path / "queries.npy", made.corpus.queries_Qd)
    command = [sys.executable, "-I", str(script), made.store.url, str(tmp_path / "queries.npy")]
    answer = json.loads(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout)
    expected = Index.open(made.store).search(made.corpus.queries_Qd, 5, refine_factor=0).row_ids_Qk
    assert answer["ids"] == expected.tolist()
    assert answer["text"] == made.corpus.texts[expected[0, 0]]
    assert answer["damaged"] == []
