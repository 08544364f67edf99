"""From SOURCE arguments to source objects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from operators.errors import ConfigError, SourceError
from operators.sources.listing import Listing, SourceObject, list_sources


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def sources_of(listing: Listing) -> list[str]:
    return [obj.source for obj in listing.objects]


def test_a_folder_is_listed_recursively_in_path_order_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    names = ["b/2.jsonl.gz", "b/1.csv", "a.parquet", "B.md", "z.tsv.zst", "café.txt"]
    make(tmp_path, *names, ".hidden.txt", "_SUCCESS", "_delta_log/0.txt", ".git/x.md", "picture.png", "meta.json")
    listing = list_sources([str(tmp_path)])
    assert sources_of(listing) == ["B.md", "a.parquet", "b/1.csv", "b/2.jsonl.gz", "café.txt", "z.tsv.zst"]
    assert [(obj.format, obj.compression) for obj in listing.objects] == [
        ("text", None),
        ("parquet", None),
        ("csv", None),
        ("jsonl", "gzip"),
        ("text", None),
        ("csv", "zstd"),
    ]
    assert [Path(uri).name for uri in listing.ignored] == ["meta.json", "picture.png"]
    assert [SourceObject.from_json(obj.to_json()) for obj in listing.objects] == listing.objects


def test_the_order_does_not_depend_on_the_order_of_creation(tmp_path: Path) -> None:
    names = [f"d{n % 3}/{n}.txt" for n in range(20)]
    one, two = make(tmp_path / "1" / "c", *names), make(tmp_path / "2" / "c", *reversed(names))
    assert sources_of(list_sources([str(one)])) == sources_of(list_sources([str(two)])) == sorted(names)


def test_arguments_keep_their_order_and_globs_their_sub_folders(tmp_path: Path) -> None:
    make(tmp_path, "z.txt", "2024-1/en/a.jsonl", "2024-2/en/b.jsonl", "2023/en/c.jsonl", "2024-2/de/d.jsonl")
    listing = list_sources([f"{tmp_path}/z.txt", f"{tmp_path}/2024-*/en/*.jsonl"])
    assert sources_of(listing) == ["z.txt", "2024-1/en/a.jsonl", "2024-2/en/b.jsonl"]
    assert listing.objects[1].uri == f"{tmp_path}/2024-1/en/a.jsonl"
    assert len(list_sources([f"{tmp_path}/2024-*"]).objects) == 3  # folders that match are listed
    assert len(list_sources([f"{tmp_path}/**/*.jsonl"]).objects) == 4


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    make(tmp_path, "a[1].txt", "a1.txt")
    assert sources_of(list_sources([f"{tmp_path}/a[1].txt"])) == ["a[1].txt"]


def test_relative_and_file_urls_mean_the_same_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.txt")
    monkeypatch.chdir(tmp_path)
    assert list_sources(["a.txt"]) == list_sources([f"file://{tmp_path}/a.txt"]) == list_sources(["./a.txt"])


def test_equal_source_paths_are_told_apart(tmp_path: Path) -> None:
    make(tmp_path, "en/a.txt", "de/a.txt", "x/en/b.txt", "fr/c.txt", "y/fr/c.txt", "y/fr/d.txt")
    both = list_sources([f"{tmp_path}/en", f"{tmp_path}/de", f"{tmp_path}/x"])
    assert sources_of(both) == ["en/a.txt", "de/a.txt", "en/b.txt"]
    same_name = list_sources([f"{tmp_path}/fr", f"{tmp_path}/y/fr"])
    assert sources_of(same_name) == ["0/c.txt", "1/c.txt", "1/d.txt"]


def test_symbolic_links_are_followed_to_files_and_a_dangling_one_is_an_error(tmp_path: Path) -> None:
    make(tmp_path, "data/a.txt")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").symlink_to(tmp_path / "data" / "a.txt")
    (listed,) = list_sources([str(tmp_path / "c")]).objects
    target = os.stat(tmp_path / "data" / "a.txt")
    assert (listed.size_bytes, listed.etag) == (1, f"1-{int(target.st_mtime * 1e6)}")
    (tmp_path / "c" / "b.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="symbolic link to nothing"):
        list_sources([str(tmp_path / "c")])


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ("missing", SourceError, "'{0}/missing' does not exist"),
        ("missing/*.jsonl", SourceError, "does not exist: looked for"),
        ("json/*.csv", SourceError, "matches nothing: looked for .parquet"),
        ("empty", SourceError, "found no files"),
        ("pictures", SourceError, "found 1 file.* other kinds, such as .*x.png"),
        ("json", SourceError, "rename .json files to .jsonl"),
        ("json/x.json", ConfigError, "one JSON object a line, rename it to .jsonl"),
        ("pictures/x.png", ConfigError, "must end in one of .parquet.*got 'x.png'"),
        ("p.parquet.gz", ConfigError, "got 'p.parquet.gz'"),
    ],
)
def test_an_argument_that_stands_for_nothing_is_one_clear_line(
    tmp_path: Path, argument: str, error: type[Exception], message: str
) -> None:
    make(tmp_path, "pictures/x.png", "json/x.json", "p.parquet.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message.format(tmp_path)) as caught:
        list_sources([f"{tmp_path}/{argument}"])
    assert "\n" not in str(caught.value)


def test_the_same_object_twice_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a/b.txt")
    with pytest.raises(ConfigError, match=r"a/b\.txt is in both .* leave one of them out"):
        list_sources([f"{tmp_path}/a", f"{tmp_path}/a/*.txt"])


def test_no_argument_and_other_schemes_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one SOURCE"):
        list_sources([])
    with pytest.raises(ConfigError, match="must be a local path or start with s3://"):
        list_sources(["gs://bucket/x"])
    with pytest.raises(ConfigError, match="a file, a folder, a glob or a bucket"):
        list_sources(["s3://"])
