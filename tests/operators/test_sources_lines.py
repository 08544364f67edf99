"""JSONL, CSV and text files: every line is read once, bad ones are rejected with a reason."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.errors import ConfigError, SourceError
from operators.settings import semantic_fields
from operators.sources.listing import list_sources
from operators.sources.pieces import plan_pieces
from operators.sources.read_config import MAX_LINE_BYTES, ReadConfig
from operators.sources.readers import PieceReader
from operators.sources.streams import lines
from tests.operators.sources_corpus import read_corpus, reasons, texts


def write(path: Path, *parts: Any) -> Path:
    """A file of JSON values, one a line; bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(p if isinstance(p, bytes) else json.dumps(p).encode() + b"\n" for p in parts))
    return path


def test_every_bad_json_line_is_a_reject_and_every_good_one_a_row(tmp_path: Path) -> None:
    bad_lines: list[tuple[bytes, str | None, str]] = [
        (b'{"id": "bytes", "text": "\xff\xfe"}', None, "invalid_utf8"),
        (b'{"id": "lone", "text": "\\ud800"}', "lone", "invalid_utf8"),
        (b'{"id": "null", "text": null}', "null", "null_text"),
        (b'{"id": "none"}', "none", "null_text"),
        (b'{"id": "empty", "text": ""}', "empty", "empty_text"),
        (b'{"id": "blank", "text": " \\t\\u3000\\n"}', "blank", "empty_text"),
        (b'{"id": "number", "text": 7}', "number", "wrong_type"),
        (b'{"id": 1.5, "text": "x"}', None, "wrong_type"),
        (b'{"id": true, "text": "x"}', None, "wrong_type"),
        (b'{"id": null, "text": "x"}', None, "null_id"),
        (b'{"text": "x"}', None, "null_id"),
        (b'{"id": " ", "text": "x"}', None, "empty_id"),
        (b'{"id": "' + b"i" * 5000 + b'", "text": "x"}', None, "too_large"),
        (b'{"id": "large", "text": "' + b"a" * 5_000_000 + b'"}', "large", "too_large"),
        (b'["a list"]', None, "wrong_type"),
        (b'"a string"', None, "wrong_type"),
        (b'{"id": "cut", "text": "x', None, "bad_json"),
        (b"\x00\x01\x02", None, "bad_json"),
        (b"[" * 100_000, None, "bad_json"),
        (b'{"id": ' + b"9" * 5000 + b', "text": "x"}', None, "bad_json"),
    ]
    good: list[Any] = [{"id": "first", "text": "one"}, {"id": 12345678901234567890, "text": "two"}]
    last = {"id": "letzte", "text": "zuletzt — последний 最後 🎉"}
    content = [good[0], *(line + b"\n" for line, _, _ in bad_lines), b"\n", b"  \r\n", good[1], last]
    found = read_corpus([write(tmp_path / "a.jsonl", *content)], tmp_path / "root")
    assert texts(found) == {"first": "one", "12345678901234567890": "two", "letzte": last["text"]}
    assert [(doc_id, reason) for _, doc_id, reason in reasons(found)] == [bad[1:] for bad in bad_lines]
    assert found.num_rows_read == 3 + len(bad_lines)
    data = (tmp_path / "a.jsonl").read_bytes()
    assert all(data[:row].endswith(b"\n") for row, _, _ in reasons(found))  # a row is its line's byte offset
    assert set(found.rows["source"].to_pylist()) == {"a.jsonl"}


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    strange = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    raw = json.dumps({"id": "x", "text": strange}, ensure_ascii=False).encode()
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + raw + b"\r\n", b'{"id": "y", "text": "no newline at the end"}')
    assert texts(read_corpus([path], tmp_path / "root")) == {"x": strange, "y": "no newline at the end"}


@given(
    records=st.lists(st.one_of(st.none(), st.text(max_size=20)), min_size=1, max_size=12),
    newline=st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    final=st.booleans(),
    piece_bytes=st.integers(1, 90),
)
def test_ranges_of_any_size_read_every_line_once_in_order(
    records: list[str | None], newline: bytes, final: bool, piece_bytes: int
) -> None:
    made = [
        b"{broken" if text is None else json.dumps({"id": str(n), "text": text + "."}, ensure_ascii=False).encode()
        for n, text in enumerate(records)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.jsonl", newline.join(made) + (newline if final else b""))
        whole = read_corpus([path], folder)
        config = ReadConfig(piece_bytes=piece_bytes)
        plan = plan_pieces(list_sources([str(path)]).objects, config)
        parts = [PieceReader(config).read(piece) for piece in plan.pieces({})]
    assert len(parts) == -(-len(newline.join(made) + (newline if final else b"")) // piece_bytes)
    assert [row for part in parts for row in part.rows.to_pylist()] == whole.rows.to_pylist()
    assert [row for part in parts for row in part.rejects.to_pylist()] == whole.rejects.to_pylist()
    assert whole.num_rows_read == len(made)


@given(data=st.lists(st.sampled_from([b"\n", b"a", b"bcd", b"\r\n", b"\n\n"])), cuts=st.integers(1, 7))
def test_lines_do_not_depend_on_how_the_bytes_are_cut(data: list[bytes], cuts: int) -> None:
    joined = b"".join(data)
    chunked = [joined[at : at + cuts] for at in range(0, len(joined), cuts)]
    expected = joined.split(b"\n")
    found = list(lines(chunked, limit=4))
    assert [len(line) > 4 for line in expected[: len(found)]] == [line is None for _, line in found]
    assert [line for _, line in found if line is not None] == [
        line for line in (expected if expected[-1] else expected[:-1]) if len(line) <= 4
    ]
    assert all(offset == 0 or joined[offset - 1 : offset] == b"\n" for offset, _ in found)


def test_a_line_too_long_to_hold_is_rejected_and_the_next_one_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"id": "1", "text": "x"}\n{"id": "2", "text": "')
        for _ in range(MAX_LINE_BYTES // (1 << 20) + 1):
            file.write(bytes(1 << 20))
        file.write(b'"}\n{"id": "3", "text": "y"}\n')
    found = read_corpus([path], tmp_path / "root")
    assert texts(found) == {"1": "x", "3": "y"}
    assert reasons(found) == [(25, None, "too_large")]


def test_title_and_text_are_joined_and_blank_ones_left_out(tmp_path: Path) -> None:
    rows = [("T", "x"), (None, "x"), ("", "x"), (" ", "x"), ("T", None), ("T ", " x"), (None, ""), (None, None)]
    records = [{"_id": str(n), "title": title, "text": text} for n, (title, text) in enumerate(rows)]
    found = read_corpus([write(tmp_path / "a.jsonl", *records)], tmp_path / "root")
    assert list(texts(found).values()) == ["T x", "x", "x", "x", "T", "T   x"]
    assert [reason for _, _, reason in reasons(found)] == ["empty_text", "null_text"]


@pytest.mark.parametrize(
    ("record", "settings", "doc_id", "text"),
    [
        ({"_id": "1", "id": "2", "doc_id": "3", "text": "x"}, {}, "1", "x"),
        ({"id": "2", "doc_id": "3", "contents": "x", "body": "y"}, {}, "2", "x"),
        ({"doc_id": 3, "content": "x"}, {}, "3", "x"),
        ({"title": "t", "body": "y"}, {}, "a.jsonl#0", "y"),
        ({"id": "2", "sku": "s", "a": "x", "b": "y"}, {"id_column": "sku", "text_columns": ("b", "a")}, "s", "y x"),
    ],
)
def test_default_columns_are_found_and_named_ones_win(
    tmp_path: Path, record: dict[str, Any], settings: dict[str, Any], doc_id: str, text: str
) -> None:
    path = write(tmp_path / "a.jsonl", record)
    assert texts(read_corpus([path], tmp_path / "root", **settings)) == {doc_id: text}


def test_bad_lines_at_the_top_do_not_decide_what_the_columns_are(tmp_path: Path) -> None:
    bad = (b"{" + b"x" * 1000 + b"\n") * 1100
    found = read_corpus([write(tmp_path / "a.jsonl", bad, {"id": "1", "text": "x"})], tmp_path / "root")
    assert texts(found) == {"1": "x"}
    assert found.rejects.num_rows == 1100


def test_an_object_of_bad_lines_only_has_only_rejects(tmp_path: Path) -> None:
    found = read_corpus([write(tmp_path / "a.jsonl", b"\xff\n[]\n")], tmp_path / "root")
    assert [reason for _, _, reason in reasons(found)] == ["invalid_utf8", "wrong_type"]


def test_csv_with_quoted_newlines_and_every_kind_of_bad_record(tmp_path: Path) -> None:
    head = (
        '\ufeffid,title,text\r\n1,"a ""quoted"" title","line one\nline two\r\nline three, with comma"\r\n\r\n'.encode()
    )
    bad = b'2,too,many,fields\n3,few\n4,,\n,t,x\n5,"a"b,x\n6,\xff,x\n7,t,"' + b"a" * 1_100_000 + b'"\n'
    last = '8,,"zuletzt\u2028 последний 最後"'.encode()
    found = read_corpus([write(tmp_path / "a.csv", head, bad, last)], tmp_path / "root")
    assert texts(found) == {
        "1": 'a "quoted" title line one\nline two\r\nline three, with comma',
        "8": "zuletzt\u2028 последний 最後",
    }
    assert reasons(found) == [
        (1, None, "bad_csv"),
        (2, None, "bad_csv"),
        (3, "4", "empty_text"),
        (4, None, "empty_id"),
        (5, None, "bad_csv"),
        (6, "6", "invalid_utf8"),
        (7, "7", "too_large"),
    ]
    assert found.rows["row"].to_pylist() == [0, 8]


def test_tsv_splits_at_tabs(tmp_path: Path) -> None:
    found = read_corpus([write(tmp_path / "a.TSV", b"id\ttext\n1\ta, b\n")], tmp_path / "root")
    assert texts(found) == {"1": "a, b"}


def test_a_quote_that_never_ends_is_an_error_of_the_object(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'id,text\n1,x\n2,"begins here\n3,y\n4,z\n')
    with pytest.raises(
        SourceError, match=r"a\.csv has a quoted field that begins in the record of line 3 and does not"
    ):
        read_corpus([path], tmp_path / "root")


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    contents: dict[str, bytes] = {
        "a/blank.md": b" \n\t ",
        "a/empty.txt": b"",
        "a/large.txt": b"a" * 5_000_000,
        "a/ok.txt": b"\xef\xbb\xbfone\r\ntwo\n",
        "bad.rst": b"ok until \xff here",
        "exact.txt": b"b" * 1_000_000,
        "over.txt": b"b" * 1_000_001,
        "ж.txt": "Привет, 世界".encode(),
    }
    for name, content in contents.items():
        write(folder / name, content)
    (folder / "z.txt.gz").write_bytes(gzip.compress(b"packed") + gzip.compress(b" twice"))
    (folder / "zz.txt.gz").write_bytes(gzip.compress(bytes(3_000_000)))
    found = read_corpus([folder], tmp_path / "root")
    assert texts(found) == {
        "a/ok.txt": "one\r\ntwo\n",
        "exact.txt": "b" * 1_000_000,
        "ж.txt": "Привет, 世界",
        "z.txt.gz": "packed twice",
    }
    assert reasons(found) == [
        (0, "a/blank.md", "empty_text"),
        (0, "a/empty.txt", "empty_text"),
        (0, "a/large.txt", "too_large"),
        (0, "bad.rst", "invalid_utf8"),
        (0, "over.txt", "too_large"),
        (0, "zz.txt.gz", "too_large"),
    ]
    assert found.rejects["source"].to_pylist() == [doc_id for _, doc_id, _ in reasons(found)]


def test_text_files_are_grouped_by_number_and_bytes(tmp_path: Path) -> None:
    for number in range(1030):
        write(tmp_path / f"{number:04d}.txt", b"0123456789")
    objects = list_sources([str(tmp_path)]).objects
    by_number = plan_pieces(objects, ReadConfig()).pieces({})
    assert [len(piece.objects) for piece in by_number] == [1024, 6]
    by_bytes = plan_pieces(objects, ReadConfig(piece_bytes=45)).pieces({})
    assert [len(piece.objects) for piece in by_bytes] == [4] * 257 + [2]
    assert [obj for piece in by_bytes for obj in piece.objects] == objects


def test_objects_of_no_bytes_are_counted_and_no_error(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b"")
    write(tmp_path / "b.csv", b"")
    write(tmp_path / "c.csv", b"\n\n")
    write(tmp_path / "d.csv", b"id,text\n")
    write(tmp_path / "e.jsonl", {"id": "1", "text": "x"})
    plan = plan_pieces(list_sources([str(tmp_path)]).objects, ReadConfig())
    assert plan.empty_objects == (f"{tmp_path}/a.jsonl", f"{tmp_path}/b.csv")
    assert texts(read_corpus([tmp_path], tmp_path / "root")) == {"1": "x"}


def test_a_column_that_no_object_has_is_a_slip_of_the_user(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"id": "1", "title": "t", "text": "x"})
    write(tmp_path / "b.csv", b"id,headline,text\n1,h,x\n")
    objects = list_sources([str(tmp_path)]).objects
    with pytest.raises(ConfigError, match=r"no column 'tilte'; did you mean 'title'\? its columns are 'id', 'title'"):
        plan_pieces(objects, ReadConfig(text_columns=("tilte", "text")))
    with pytest.raises(ConfigError, match=r"no column 'ID'; did you mean 'id'\?"):
        plan_pieces(objects, ReadConfig(id_column="ID"))
    # JSONL need not have every column in its first records; CSV must.
    with pytest.raises(SourceError, match=r"b\.csv has no column 'title'") as caught:
        plan_pieces(objects, ReadConfig(text_columns=("title", "text")))
    assert not isinstance(caught.value, ConfigError)
    plan_pieces(objects, ReadConfig(text_columns=("headline", "text")))


def test_no_default_text_column_anywhere_is_a_slip_of_the_user(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"id": "1", "words": "x"})
    objects = list_sources([str(tmp_path)]).objects
    with pytest.raises(ConfigError, match=r"has no text column .*its columns are 'id', 'words'; name the text with"):
        plan_pieces(objects, ReadConfig())
    write(tmp_path / "b.jsonl", {"id": "1", "text": "x"})
    objects = list_sources([str(tmp_path)]).objects
    with pytest.raises(SourceError, match=r"a\.jsonl has no text column"):
        plan_pieces(objects, ReadConfig())
    kept_going = plan_pieces(objects, ReadConfig(), keep_going=True)
    assert len(kept_going.failures) == 1
    assert len(kept_going.pieces({})) == 1


def test_columns_for_text_files_alone_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x")
    with pytest.raises(ConfigError, match="all 1 source objects are text files"):
        plan_pieces(list_sources([str(tmp_path)]).objects, ReadConfig(text_columns=("text",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"piece_rows": 0}, "read.piece_rows must be a whole number of at least 1, got 0"),
        ({"piece_bytes": 1.5}, "read.piece_bytes must be a whole number"),
        ({"max_text_bytes": 1 << 40}, "read.max_text_bytes must be in 1..67108864"),
        ({"max_reject_fraction": 2}, r"read.max_reject_fraction must be in 0..1, got 2"),
        ({"text_columns": "text"}, "read.text_columns must be a list of column names, got 'text'"),
        ({"text_columns": ("a", "a")}, "name each column once"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReadConfig(**settings)


def test_only_the_reject_limit_may_change_between_attempts() -> None:
    assert semantic_fields(ReadConfig()).keys() == {
        "id_column",
        "text_columns",
        "max_text_bytes",
        "piece_rows",
        "piece_bytes",
    }
