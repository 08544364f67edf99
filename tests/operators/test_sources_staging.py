"""Objects that cannot be sliced: one streaming pass, a commit record, slices that any piece reads alone."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.errors import IntegrityError, SourceChangedError, SourceError
from operators.sources import staging
from operators.sources.listing import SourceObject, list_sources
from operators.sources.pieces import Piece, plan_pieces
from operators.sources.readers import PieceReader, ReadConfig
from operators.sources.staging import stage_object
from operators.storage.store import open_store
from tests.operators.sources_corpus import read_corpus, reasons, texts

PREFIX = "runs/r/staged"


def json_lines(count: int) -> bytes:
    words = random.Random(7)
    made = [{"id": str(n), "text": f"text {n} {words.random()}"} for n in range(count)]
    return b"".join(json.dumps(record).encode() + b"\n" for record in made)


def pack(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data, mtime=0))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(data)
    return path


def listed(path: Path) -> SourceObject:
    (obj,) = list_sources([str(path)]).objects
    return obj


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_object_reads_like_the_plain_one(tmp_path: Path, suffix: str) -> None:
    data = json_lines(500) + b'{"id": "bad", "text": 1}\n\n\xff\n' + '{"id": "u", "text": "\u2028"}\n'.encode()
    plain = read_corpus([pack(tmp_path / "a.jsonl", data)], tmp_path / "root")
    packed = read_corpus([pack(tmp_path / f"a.jsonl{suffix}", data)], tmp_path / "root", piece_rows=64)
    assert packed.rows.drop_columns("source").equals(plain.rows.drop_columns("source"))
    assert reasons(packed) == reasons(plain)


def test_members_of_a_gzip_are_read_as_one_stream(tmp_path: Path) -> None:
    data = json_lines(10)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(data[:99]) + gzip.compress(data[99:]))
    assert len(texts(read_corpus([path], tmp_path / "root"))) == 10


def test_slices_hold_at_most_piece_rows_and_piece_bytes(tmp_path: Path) -> None:
    lines = [b'"id","text"\n', *(f'"{n}","{"x" * (n % 50)}"\n'.encode() for n in range(300))]
    path = pack(tmp_path / "a.csv", b"".join(lines))
    store = open_store(str(tmp_path / "root"))
    pieces = stage_object(listed(path), ReadConfig(piece_rows=40, piece_bytes=700), store, PREFIX)
    found = [PieceReader(ReadConfig(), store).read(piece) for piece in pieces]
    assert all(part.num_rows_read <= 40 for part in found)
    assert all(sum(map(len, part.rows["text"].to_pylist())) <= 700 + 50 for part in found)
    assert [(piece.start, piece.end) for piece in pieces][:1] == [(0, found[0].num_rows_read)]
    assert sum(part.num_rows_read for part in found) == 300
    assert sum(part.rejects.num_rows for part in found) == 6  # every 50th text is empty


def test_a_second_call_finds_the_record_and_reads_nothing(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.jsonl.gz", json_lines(50))
    store, obj, config = open_store(str(tmp_path / "root")), listed(path), ReadConfig(piece_rows=20)
    first = stage_object(obj, config, store, PREFIX)
    path.unlink()
    assert stage_object(obj, config, store, PREFIX) == first
    assert len(first) == 3
    with pytest.raises(SourceChangedError, match="has vanished"):
        stage_object(obj, ReadConfig(piece_rows=21), store, PREFIX)  # other slices, other unit


def test_piece_ids_do_not_depend_on_the_attempt_or_the_root(tmp_path: Path) -> None:
    obj = listed(pack(tmp_path / "a.jsonl.zst", json_lines(50)))
    made = [
        stage_object(obj, ReadConfig(piece_rows=20), open_store(str(tmp_path / root)), PREFIX)
        for root in ("one", "two")
    ]
    assert [piece.piece_id for piece in made[0]] == [piece.piece_id for piece in made[1]]
    assert made[0] != made[1]  # keys carry the attempt


def test_an_attempt_that_loses_the_race_leaves_the_winners_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obj = listed(pack(tmp_path / "a.jsonl.gz", json_lines(50)))
    store, config = open_store(str(tmp_path / "root")), ReadConfig(piece_rows=20)
    winner = stage_object(obj, config, store, PREFIX)
    kept = store.list_keys(PREFIX)
    monkeypatch.setattr(staging, "read_record", lambda *_: None)  # a second attempt that began before the commit
    assert stage_object(obj, config, store, PREFIX) == winner
    assert store.list_keys(PREFIX) == kept


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.csv.gz"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_truncated_object_is_an_error_and_commits_nothing(tmp_path: Path, name: str, part: float) -> None:
    data = b"id,text\n" + b"".join(b"%d,text %d\n" % (n, n * n) for n in range(200_000))
    path = pack(tmp_path / name, data if ".csv" in name else json_lines(30_000))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(SourceError, match=rf"{name} .*(truncated|ended before)") as caught:
        read_corpus([path], tmp_path / "root", piece_rows=1000)
    assert "\n" not in str(caught.value)
    assert open_store(str(tmp_path / "root")).list_keys(PREFIX) == []


# A flipped bit in zstd is found where the frame has a checksum: the zstd tool writes one, pyarrow does not.
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in ("a.jsonl.gz", "a.txt.gz") for damage in ("bit", "tail", "other format")),
        *(("a.jsonl.zst", damage) for damage in ("tail", "other format")),
    ],
)
def test_a_damaged_object_is_an_error(tmp_path: Path, name: str, damage: str) -> None:
    path = pack(tmp_path / name, json_lines(300))
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 16
    elif damage == "tail":
        data += b"garbage"
    else:
        data = bytearray(json_lines(3))
    path.write_bytes(data)
    with pytest.raises(SourceError, match=name):
        read_corpus([path], tmp_path / "root")


def test_a_truncated_text_file_is_an_error(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "a.txt.zst"):
        path = pack(tmp_path / name, json_lines(300))
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(SourceError, match=f"{name} .*truncated"):
            read_corpus([path], tmp_path / "root")


def test_a_damaged_or_missing_slice_is_found_where_it_is_read(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "root"))
    obj = listed(pack(tmp_path / "a.jsonl.gz", json_lines(50)))
    (piece,) = stage_object(obj, ReadConfig(), store, PREFIX)
    assert piece.staged is not None
    assert piece.staged.rows is not None
    key = piece.staged.rows.key
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))
    with pytest.raises(IntegrityError, match="is damaged"):
        PieceReader(ReadConfig(), store).read(piece)
    store.delete(key)
    with pytest.raises(IntegrityError, match="is missing"):
        PieceReader(ReadConfig(), store).read(piece)


def test_an_object_that_changes_while_it_is_staged_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(tmp_path / "a.csv", b"id,text\n" + b"".join(b"%d,text\n" % n for n in range(1000)))
    obj, store = listed(path), open_store(str(tmp_path / "root"))
    write = staging._SliceWriter.write

    def write_and_touch(writer: staging._SliceWriter, batch: staging.PieceRows) -> None:
        write(writer, batch)
        path.write_bytes(b"id,text\n")

    monkeypatch.setattr(staging._SliceWriter, "write", write_and_touch)
    with pytest.raises(SourceChangedError, match=r"a\.csv has changed"):
        stage_object(obj, ReadConfig(piece_rows=100), store, PREFIX)
    assert store.list_keys(PREFIX) == []


def test_pieces_stand_in_source_order_whatever_is_staged(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    pack(folder / "a.jsonl", b'{"id": "a", "text": "x"}\n')
    pack(folder / "b.jsonl.gz", b'{"id": "b", "text": "x"}\n')
    pack(folder / "c.txt", b"x")
    pack(folder / "d.csv", b"id,text\nd,x\n")
    pq.write_table(pa.table({"id": ["e"], "text": ["x"]}), folder / "e.parquet")
    pack(folder / "f.jsonl", b"")
    pack(folder / "g.txt", b"x")
    found = read_corpus([folder], tmp_path / "root")
    assert found.rows["doc_id"].to_pylist() == ["a", "b", "c.txt", "d", "e", "g.txt"]
    plan = plan_pieces(list_sources([str(folder)]).objects, ReadConfig())
    assert [obj.source for obj in plan.to_stage] == ["b.jsonl.gz", "d.csv"]
    with pytest.raises(AssertionError, match="not staged"):
        plan.pieces({})


def test_a_csv_with_a_header_alone_has_no_pieces(tmp_path: Path) -> None:
    obj = listed(pack(tmp_path / "a.csv", b"id,text\n"))
    nothing: list[Piece] = []
    assert stage_object(obj, ReadConfig(), open_store(str(tmp_path / "root")), PREFIX) == nothing
