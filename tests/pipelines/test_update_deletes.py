"""Documents that are deleted by request: `update --deletes`."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.errors import ConfigError
from pipelines.deletes import read_ids
from tests.pipelines.nightly_site import A, B, C, Site


def ids_file(folder: Path, kind: str, ids: list[str]) -> str:
    path = folder / f"ids.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"doc_id": ids}), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"_id": name}) + "\n" for name in ids))
    else:
        path.write_text("\n".join(ids) + "\n\n")
    return str(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_ids_to_delete_come_from_files(kind: str, tmp_path: Path) -> None:
    assert read_ids(ids_file(tmp_path, kind, ["a-0", "b 1", "ключ"])) == ["a-0", "b 1", "ключ"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.csv", b"", "must end in .txt, .jsonl or .parquet"),
        ("ids.jsonl", b"{}\n", "line 1 has none"),
        ("ids.jsonl", b'{"id": "a"}\nno json\n', "line 2 is not"),
        ("ids.jsonl", b'{"id": null}\n', "line 1 has none"),
        ("ids.jsonl", b'{"id": true}\n', "line 1 has none"),
        ("ids.txt", b"\xff\n", "must be UTF-8"),
    ],
)
def test_what_is_no_list_of_ids_is_refused_with_file_and_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_ids(str(tmp_path / name))


def test_a_deleted_document_stays_deleted_until_it_gets_another_text(site: Site) -> None:
    site.put("d.jsonl", [("b-1", "the same id further on"), ("b-2", "the same id further on")])
    site.update()
    deleted = site.update(append=True, deletes=["a-0", "b-1", "nobody"])
    assert (deleted.published, deleted.changes["deleted"], deleted.texts_encoded) == (True, 2, 0)
    assert deleted.manifest.rows["dropped"] == {"deleted_by_request": 3}
    left = {name: text for name, text in dict(A + B + C).items() if name not in ("a-0", "b-1")}
    assert site.live() == left
    again = site.update(append=True, deletes=["a-0", "b-1", "nobody"])
    assert not again.published
    site.put("a.jsonl", [*A[:7], ("a-7", "edited")])  # its object changed, it did not
    site.update()
    assert site.live() == {**left, "a-7": "edited"}
    site.put("a.jsonl", [("a-0", "a new text"), *A[1:]])
    site.update()
    assert site.live() == {**left, "a-0": "a new text"}


def test_a_request_to_delete_is_kept_when_nothing_else_changes(site: Site) -> None:
    site.put("d.jsonl", [("x", "deleted at once"), ("y", "stays")])
    site.update()
    site.update(deletes=["x"])
    site.put("d.jsonl", [("z", "never wanted"), ("y", "stays")])  # as many rows of each kind as before
    assert site.update(deletes=["z"]).published
    site.put("e.jsonl", [("e", "another night")])
    site.update()
    assert "z" not in site.live()
