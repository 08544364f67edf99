"""Parquet: rows by whole columns, row groups into pieces, damaged and unfit objects."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.errors import ConfigError, SourceChangedError, SourceError
from operators.schemas import REJECTS, ROWS
from operators.sources.listing import list_sources
from operators.sources.pieces import Piece, plan_pieces
from operators.sources.readers import PieceReader, ReadConfig
from tests.data_paths import collection
from tests.operators.sources_corpus import read_corpus, reasons, texts


def write(path: Path, row_group_size: int | None = None, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def strings_of(*values: bytes | None) -> pa.Array:
    """A string array of any bytes: what a careless writer leaves in a file."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


BAD: list[tuple[bytes | None, bytes | None, str, bool]] = [  # id, text, reason, whether the id is known
    (b"a", b"\xff\xfe", "invalid_utf8", True),
    (b"\xc3", b"x", "invalid_utf8", False),
    (None, b"x", "null_id", False),
    (b"", b"x", "empty_id", False),
    (b" \t", b"x", "empty_id", False),
    (b"i" * 5000, b"x", "too_large", False),
    (b"b", None, "null_text", True),
    (b"c", b"", "empty_text", True),
    (b"d", " \u3000\u2028\x1c\n".encode(), "empty_text", True),
    (b"e", b"x" * 5_000_000, "too_large", True),
]


@pytest.mark.parametrize("kind", [pa.binary(), pa.string(), pa.large_string(), pa.string_view(), pa.large_binary()])
def test_every_bad_row_is_a_reject_and_every_good_one_a_row(tmp_path: Path, kind: pa.DataType) -> None:
    good = [(b"first", b"one"), *[(bad[0], bad[1]) for bad in BAD], (b"letzte", "Последний 最後 🎉".encode())]
    ids, bodies = (strings_of(*column).cast(pa.binary()) for column in zip(*good, strict=True))
    if kind in (pa.binary(), pa.large_binary()):
        ids, bodies = ids.cast(kind), bodies.cast(kind)
    else:
        ids, bodies = strings_of(*ids.to_pylist()), strings_of(*bodies.to_pylist())
        if kind != pa.string():
            ids, bodies = ids.cast(kind, safe=False), bodies.cast(kind, safe=False)
    found = read_corpus([write(tmp_path / "a.parquet", id=ids, text=bodies)], tmp_path / "root")
    assert texts(found) == {"first": "one", "letzte": "Последний 最後 🎉"}
    assert found.rows["row"].to_pylist() == [0, len(BAD) + 1]
    assert reasons(found) == [
        (row, bad[0].decode() if bad[3] and bad[0] else None, bad[2]) for row, bad in enumerate(BAD, start=1)
    ]
    assert (found.rows.schema, found.rejects.schema) == (ROWS, REJECTS)


values = st.one_of(st.none(), st.text(max_size=6), st.sampled_from(["", " ", "\u2003", "x" * 40, " x "]))


@given(rows=st.lists(st.tuples(values, values, values), min_size=1, max_size=8))
def test_the_column_path_decides_as_the_row_path_does(rows: list[tuple[str | None, ...]]) -> None:
    ids, titles, bodies = zip(*rows, strict=True)
    settings: dict[str, Any] = {"max_text_bytes": 30, "id_column": "id", "text_columns": ("title", "text")}
    with tempfile.TemporaryDirectory() as folder:
        columns = {"id": ids, "title": titles, "text": bodies}
        path = write(Path(folder) / "a.parquet", **{name: pa.array(c, pa.string()) for name, c in columns.items()})
        by_column = read_corpus([path], folder, **settings)
        jsonl = Path(folder) / "a.jsonl"
        jsonl.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
        by_row = read_corpus([jsonl], folder, **settings)
    assert by_column.rows.select(["doc_id", "text"]).equals(by_row.rows.select(["doc_id", "text"]))
    assert [reason for _, *reason in reasons(by_column)] == [reason for _, *reason in reasons(by_row)]


def test_integer_dictionary_and_null_columns_serve(tmp_path: Path) -> None:
    columns = {
        "id": pa.array([2**63, 7, None], pa.uint64()),
        "title": pa.nulls(3),
        "text": pa.array(["x", None, "y"]).dictionary_encode(),
    }
    found = read_corpus([write(tmp_path / "a.parquet", **columns)], tmp_path / "root")
    assert texts(found) == {"9223372036854775808": "x"}
    assert reasons(found) == [(1, "7", "null_text"), (2, None, "null_id")]


def test_ids_are_made_of_source_and_row_where_no_column_has_them(tmp_path: Path) -> None:
    path = write(tmp_path / "c" / "x" / "a.parquet", text=["a", "b", "c", "d", "e"], row_group_size=2)
    found = read_corpus([path.parent.parent], tmp_path / "root", piece_rows=2)
    assert texts(found) == {f"x/a.parquet#{row}": text for row, text in enumerate("abcde")}
    assert found.rows["row"].to_pylist() == [0, 1, 2, 3, 4]


def test_row_groups_are_grouped_into_pieces_of_consecutive_rows(tmp_path: Path) -> None:
    body = [f"text {n}" for n in range(100)]
    path = write(tmp_path / "a.parquet", id=list(range(100)), text=body, row_group_size=7)
    objects = list_sources([str(path)]).objects
    pieces = plan_pieces(objects, ReadConfig(piece_rows=20)).pieces({})
    assert [(piece.start, piece.end, piece.first_row) for piece in pieces] == [
        *((start, start + 2, 7 * start) for start in range(0, 12, 2)),
        (12, 15, 84),  # 7 + 7 + 2 rows
    ]
    by_bytes = plan_pieces(objects, ReadConfig(piece_bytes=150)).pieces({})
    assert {(piece.start, piece.end) for piece in by_bytes} == {(number, number + 1) for number in range(15)}
    assert all(piece.rows_of_groups is not None for piece in by_bytes)  # each group is cut in two
    assert len(plan_pieces(objects, ReadConfig()).pieces({})) == 1
    assert plan_pieces(objects, ReadConfig()) == plan_pieces(objects, ReadConfig())
    for settings in ({"piece_rows": 20}, {"piece_rows": 1}, {"piece_bytes": 1}, {}):
        found = read_corpus([path], tmp_path / "root", **settings)
        assert found.rows["text"].to_pylist() == body
        assert found.rows["row"].to_pylist() == list(range(100))


def test_a_row_group_of_several_pieces_is_cut_without_losing_a_row(tmp_path: Path) -> None:
    table = pa.table({"id": [str(i) for i in range(100)], "text": [f"text {i}" for i in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet")
    objects = list_sources([str(tmp_path)]).objects
    config = ReadConfig(piece_rows=30)
    pieces = plan_pieces(objects, config).pieces({})
    assert [piece.rows_of_groups for piece in pieces] == [(0, 25), (25, 50), (50, 75), (75, 100)]
    assert len({piece.piece_id for piece in pieces}) == 4
    assert [Piece.from_json(json.loads(json.dumps(piece.to_json()))) for piece in pieces] == pieces
    cut = pa.concat_tables([PieceReader(config).read(piece).rows for piece in pieces])
    whole = PieceReader(config).read(plan_pieces(objects, ReadConfig()).pieces({})[0]).rows
    assert cut.equals(whole)


def test_a_row_group_far_over_the_piece_size_is_staged(tmp_path: Path) -> None:
    body = [None if n % 10 == 3 else f"text {n}" for n in range(2000)]
    path = write(tmp_path / "a.parquet", text=body)
    plan = plan_pieces(list_sources([str(path)]).objects, ReadConfig(piece_rows=499))
    assert len(plan.to_stage) == 1
    found = read_corpus([path], tmp_path / "root", piece_rows=499)
    assert texts(found) == {f"a.parquet#{n}": text for n, text in enumerate(body) if text}
    assert [row for row, _, _ in reasons(found)] == list(range(3, 2000, 10))


def test_an_empty_table_has_no_pieces(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", id=pa.array([], pa.string()), text=pa.array([], pa.string()))
    assert plan_pieces(list_sources([str(path)]).objects, ReadConfig()).pieces({}) == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["1"], "text": [1]}, "text column 'text' of .*a.parquet must hold strings, its type is int64; name"),
        ({"id": ["1"], "text": [["x"]]}, "text column 'text' of .* its type is list"),
        ({"id": [1.5], "text": ["x"]}, "id column 'id' of .* must hold strings or integers, its type is double; name"),
        ({"id": [True], "text": ["x"]}, "id column 'id' of .* its type is bool"),
    ],
)
def test_a_column_of_a_type_that_cannot_serve_is_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(SourceError, match=message):
        plan_pieces(list_sources([str(path)]).objects, ReadConfig())


def test_a_missing_column_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", id=["1"], title=["t"], text=["x"])
    write(tmp_path / "b.parquet", id=["1"], text=["x"])
    objects = list_sources([str(tmp_path)]).objects
    with pytest.raises(
        ConfigError, match=r"a\.parquet \(nor any of 1 other objects\) has no column 'txt'; did you mean"
    ):
        plan_pieces(objects, ReadConfig(text_columns=("txt",)))
    with pytest.raises(SourceError, match=r"b\.parquet has no column 'title'; its columns are 'id', 'text'"):
        plan_pieces(objects, ReadConfig(text_columns=("title",)))


def test_two_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="more than one column 'text'"):
        plan_pieces(list_sources([str(tmp_path)]).objects, ReadConfig())


def test_truncated_and_damaged_objects_are_all_listed(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.parquet", text=["x" * 50] * 100).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "text.parquet").write_bytes(b"this is no Parquet at all")
    objects = list_sources([str(tmp_path)]).objects
    with pytest.raises(
        SourceError, match=r"^3 source objects cannot be read: .*cut\.parquet .*empty\.parquet .*"
    ) as caught:
        plan_pieces(objects, ReadConfig())
    assert "\n" not in str(caught.value)
    plan = plan_pieces(objects, ReadConfig(), keep_going=True)
    assert len(plan.failures) == 3
    assert [piece.objects[0].source for piece in plan.pieces({})] == ["whole.parquet"]


def test_damaged_pages_are_found_where_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    body = [os.urandom(100).hex() for _ in range(1000)]
    pq.write_table(pa.table({"text": body}), path, write_page_checksum=True, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (piece,) = plan_pieces(list_sources([str(path)]).objects, ReadConfig()).pieces({})
    with pytest.raises(SourceError, match=r"a\.parquet .*truncated, damaged or unreadable.*CRC"):
        PieceReader(ReadConfig()).read(piece)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_an_object_that_changes_or_vanishes_after_the_listing_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = {"a.jsonl": b'{"text": "x"}\n', "a.txt": b"x"}.get(name)
    if content is None:
        content = write(path, text=["x"]).read_bytes()
    path.write_bytes(content)
    objects = list_sources([str(path)]).objects
    (piece,) = plan_pieces(objects, ReadConfig()).pieces({})
    os.utime(path, ns=(1, 1))
    with pytest.raises(SourceChangedError, match=f"{name} has changed since it was listed"):
        PieceReader(ReadConfig()).read(piece)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceChangedError, match="has changed since it was listed"):
        PieceReader(ReadConfig()).read(piece)
    path.unlink()
    with pytest.raises(SourceChangedError, match="has vanished since it was listed"):
        PieceReader(ReadConfig()).read(piece)


def test_cranfield_is_read_whole(tmp_path: Path) -> None:
    corpus = collection("cranfield") / "corpus.parquet"
    table = pq.read_table(corpus)
    found = read_corpus([corpus], tmp_path / "root", piece_rows=100)
    assert found.num_rows_read == table.num_rows
    first = table.slice(0, 1).to_pylist()[0]
    assert found.rows["text"][0].as_py() == f"{first['title']} {first['text']}"
    assert found.rows["doc_id"][0].as_py() == first["_id"]
