"""The same corpus on S3, over a socket: same rows, same checks."""

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from operators.errors import SourceChangedError, SourceError
from operators.sources.listing import list_sources
from operators.sources.pieces import plan_pieces
from operators.sources.readers import PieceReader, ReadConfig
from tests.operators.sources_corpus import pieces_of, read_corpus, reasons


def parquet_bytes(count: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": [f"p{n}" for n in range(count)], "text": ["x"] * count}), sink, row_group_size=10)
    return sink.getvalue()


CORPUS = {
    "a.parquet": parquet_bytes(25),
    "b/b.jsonl": b"".join(b'{"id": "j%d", "text": "x"}\n' % n for n in range(30)) + b'{"id": "j", "text": "\xff"}\n',
    "b/c.jsonl.gz": gzip.compress(b'{"id": "g", "text": "x"}\n'),
    "d.csv": b'id,text\nc,"two\nlines"\n',
    "e.txt": "Привет".encode(),
    "empty.txt": b"",
    "empty.jsonl": b"",
}


@pytest.fixture
def corpus(bucket: str) -> str:
    fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for name, content in {**CORPUS, "_SUCCESS": b"", "picture.png": b"x", "b/": b""}.items():
        fs.pipe_file(f"{bucket}/corpus/{name}", content)
    return f"{bucket}/corpus"


def test_a_prefix_on_s3_reads_like_a_folder(corpus: str, tmp_path: Path) -> None:
    for name, content in CORPUS.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    listing = list_sources([corpus + "/"])
    assert [obj.source for obj in listing.objects] == sorted(CORPUS)
    assert listing.ignored == [f"{corpus}/picture.png"]
    on_s3 = read_corpus([corpus], corpus.replace("/corpus", "/root"), piece_rows=10, piece_bytes=100)
    local = read_corpus([tmp_path / "corpus"], tmp_path / "root", piece_rows=10, piece_bytes=100)
    assert on_s3.rows.equals(local.rows)
    assert on_s3.rejects.equals(local.rejects)
    assert [reason for _, _, reason in reasons(on_s3)] == ["invalid_utf8", "empty_text"]


def test_objects_prefixes_and_globs_on_s3_are_listed(corpus: str) -> None:
    (one,) = list_sources([f"{corpus}/b/b.jsonl"]).objects
    assert (one.uri, one.source) == (f"{corpus}/b/b.jsonl", "b.jsonl")
    globbed = list_sources([f"{corpus}/*/*.jsonl*", f"{corpus}/a.parquet"])
    assert [obj.source for obj in globbed.objects] == ["b/b.jsonl", "b/c.jsonl.gz", "a.parquet"]
    assert globbed.objects[0].etag == one.etag
    for argument in (f"{corpus}-2", f"{corpus}/x.txt", "s3://no-such-bucket/x"):
        with pytest.raises(SourceError, match="does not exist: looked for a file or folder s3://"):
            list_sources([argument])


def test_an_object_on_s3_that_changes_or_vanishes_is_an_error(corpus: str) -> None:
    config = ReadConfig()
    pieces = plan_pieces(list_sources([f"{corpus}/a.parquet", f"{corpus}/b/b.jsonl"]).objects, config).pieces({})
    fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for piece in pieces:
        assert PieceReader(config).read(piece).rows.num_rows in (25, 30)
        uri = piece.objects[0].uri
        fs.pipe_file(uri, b"another content")
        with pytest.raises(SourceChangedError, match=f"{uri} has changed since it was listed"):
            PieceReader(config).read(piece)
        fs.rm_file(uri)
        with pytest.raises(SourceChangedError, match=f"{uri} has vanished"):
            PieceReader(config).read(piece)


def test_damaged_objects_on_s3_are_named(bucket: str) -> None:
    from operators.storage.store import open_store

    fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    fs.pipe_file(f"{bucket}/c/a.parquet", CORPUS["a.parquet"][:-50])
    with pytest.raises(SourceError, match=f"{bucket}/c/a.parquet .*truncated"):
        plan_pieces(list_sources([f"{bucket}/c"]).objects, ReadConfig())
    fs.pipe_file(f"{bucket}/d/a.jsonl.gz", CORPUS["b/c.jsonl.gz"][:-1])
    with pytest.raises(SourceError, match=f"{bucket}/d/a.jsonl.gz .*truncated"):
        pieces_of([f"{bucket}/d"], ReadConfig(), open_store(f"{bucket}/root"))
