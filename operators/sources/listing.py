"""From SOURCE arguments to source objects: files, folders, globs and s3:// URLs, in an order that never varies."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fsspec.core import has_magic

from operators.errors import ConfigError, SourceError
from operators.settings import digest_of
from operators.sources.failures import READ_FAILURES
from operators.storage.filesystem import etag_of, filesystem_for, is_local

Format = Literal["parquet", "jsonl", "csv", "text"]
Compression = Literal["gzip", "zstd"]

FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
LOOKED_FOR = ".parquet, .pq, .jsonl, .ndjson, .csv, .tsv, .txt, .md, .rst (all but Parquet also with .gz or .zst)"


@dataclass(frozen=True)
class SourceObject:
    """One object of the corpus, as it was when it was listed."""

    uri: str  # absolute local path, or s3://bucket/key
    source: str  # path below the SOURCE argument; unique in a listing
    etag: str
    size_bytes: int
    format: Format
    compression: Compression | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> SourceObject:
        """Inverse of `to_json`."""
        return SourceObject(**fields)


@dataclass(frozen=True)
class Listing:
    """`objects` in (argument, source path) order; `ignored`: URIs in folders and globs that are of no known format."""

    objects: list[SourceObject]
    ignored: list[str]

    @property
    def digest(self) -> str:
        """Of which objects, in which state, make up the corpus."""
        return digest_of([[o.uri, o.source, o.etag, o.size_bytes] for o in self.objects])


def format_of(name: str) -> tuple[Format, Compression | None] | None:
    """Format and compression by the extension (any case) of a file name; None for an unknown one."""
    stem, last = posixpath.splitext(name.lower())
    compression = COMPRESSIONS.get(last)
    if compression:
        last = posixpath.splitext(stem)[1]
    file_format = FORMATS.get(last)
    if file_format is None or (compression and file_format == "parquet"):
        return None
    return file_format, compression


def list_sources(sources: Sequence[str]) -> Listing:
    """All source objects behind the arguments: the same list, in the same order, on every machine.

    In folders and globs, names (of files and folders) that begin with `.` or `_` are skipped and files of unknown
    extension are ignored; an object that is named directly must have a known one. Equal source paths of two arguments
    are told apart by the argument's last folder, or its number.

    Raises ConfigError for an unknown extension or an object given twice, SourceError where nothing matches.
    """
    if not sources:
        raise ConfigError("a build needs at least one SOURCE (file, folder, glob or s3:// prefix), got none")
    found = [_list_argument(argument) for argument in sources]
    _refuse_duplicates(sources, found)
    objects: list[SourceObject] = []
    for (_, entries, _), prefix in zip(found, _prefixes(found), strict=True):
        for relative, uri, info in entries:
            known = format_of(uri)
            assert known is not None
            objects.append(SourceObject(uri, prefix + relative, etag_of(info), int(info["size"]), *known))
    return Listing(objects, sorted({uri for _, _, ignored in found for uri in ignored}))


# What an argument stands for: its base folder, (path below it, uri, info) of each object, URIs of ignored files.
_Found = tuple[str, list[tuple[str, str, dict[str, Any]]], list[str]]


def _list_argument(argument: str) -> _Found:
    fs, path = filesystem_for(argument)
    if not path or path == "/":
        raise ConfigError(f"a SOURCE must name a file, a folder, a glob or a bucket, got {argument!r}")
    try:
        base, infos, direct = _expand(fs, path, argument)
    except FileNotFoundError:
        raise SourceError(f"source {argument!r} does not exist: looked for a file or folder {_uri(fs, path)}") from None
    except READ_FAILURES as error:
        raise SourceError(f"source {argument!r} cannot be listed: {type(error).__name__}: {error}") from error
    entries, ignored = [], []
    for found in sorted(infos):
        relative = posixpath.relpath(found, base)
        uri = _uri(fs, found)
        if not direct and any(part.startswith((".", "_")) for part in relative.split("/")):
            continue
        info = _followed(fs, found, infos[found])
        if format_of(found) and info["type"] == "file":
            entries.append((_printable(relative, uri), uri, info))
        elif direct:
            raise ConfigError(f"source {argument!r} must end in one of {LOOKED_FOR}{_json_hint(found)}")
        else:
            ignored.append(uri)
    if not entries:
        raise SourceError(f"source {argument!r} matches nothing: looked for {LOOKED_FOR}{_ignored_hint(ignored)}")
    entries.sort(key=lambda entry: entry[0])
    return base, entries, ignored


def _expand(fs: Any, path: str, argument: str) -> tuple[str, dict[str, dict[str, Any]], bool]:
    """Base folder, path -> info of everything below or matched, and whether the argument names one object."""
    is_folder = argument.endswith("/")
    try:
        info = {"type": "directory"} if is_folder and not is_local(fs) else fs.info(path)
    except FileNotFoundError:
        if not has_magic(path):
            raise
        return _expand_glob(fs, path)
    if info["type"] == "directory":
        return path, _files_below(fs, path), False
    return posixpath.dirname(path), {path: info}, True


def _expand_glob(fs: Any, path: str) -> tuple[str, dict[str, dict[str, Any]], bool]:
    parts = path.split("/")
    first = next(number for number, part in enumerate(parts) if has_magic(part))
    infos: dict[str, dict[str, Any]] = {}
    for found, info in fs.glob(path, detail=True, **_walk_options(fs)).items():
        if info["type"] == "directory":
            infos |= _files_below(fs, found.rstrip("/"))
        else:
            infos[found] = info
    return "/".join(parts[:first]) or "/", infos, False


def _files_below(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    found = fs.find(folder, detail=True, **_walk_options(fs))
    return {path: info for path, info in found.items() if info["type"] != "directory" and not path.endswith("/")}


def _walk_options(fs: Any) -> dict[str, Any]:
    # By default the local walk leaves out, silently, folders that it may not read.
    return {"on_error": "raise"} if is_local(fs) else {}


def _followed(fs: Any, path: str, info: dict[str, Any]) -> dict[str, Any]:
    """Info of what a symbolic link points to: listings describe the link, later checks its target."""
    if not info.get("islink"):
        return info
    try:
        return dict(fs.info(path))
    except FileNotFoundError:
        raise SourceError(f"source object {path} is a symbolic link to nothing; mend or remove the link") from None


def _uri(fs: Any, path: str) -> str:
    return path if is_local(fs) else f"s3://{path}"


def _printable(relative: str, uri: str) -> str:
    try:
        relative.encode()
    except UnicodeEncodeError:
        raise SourceError(f"the name of source object {uri!r} is not UTF-8; rename it") from None
    return relative


def _is_json(path: str) -> bool:
    return re.search(r"\.json(\.gz|\.zst)?$", path.lower()) is not None


def _json_hint(path: str) -> str:
    if _is_json(path):
        return "; .json is not read: if the file holds one JSON object a line, rename it to .jsonl"
    return f", got {posixpath.basename(path)!r}"


def _ignored_hint(ignored: list[str]) -> str:
    if not ignored:
        return "; found no files (names that begin with . or _ are skipped)"
    example = next((path for path in ignored if _is_json(path)), ignored[0])
    hint = "; rename .json files to .jsonl if they hold one JSON object a line" if _is_json(example) else ""
    return f"; found {len(ignored)} file(s) of other kinds, such as {example}{hint}"


def _refuse_duplicates(sources: Sequence[str], found: list[_Found]) -> None:
    first: dict[str, int] = {}
    for number, (_, entries, _) in enumerate(found):
        for _, uri, _ in entries:
            if uri in first:
                raise ConfigError(
                    f"a source object may be given once, but {uri} is in both {sources[first[uri]]!r} and"
                    f" {sources[number]!r}; leave one of them out"
                )
            first[uri] = number


def _prefixes(found: list[_Found]) -> list[str]:
    """One prefix an argument, so that source paths are unique: none, else its last folder, else its number."""
    paths = [[relative for relative, _, _ in entries] for _, entries, _ in found]
    owners = Counter(relative for relatives in paths for relative in relatives)
    clashing = [any(owners[relative] > 1 for relative in relatives) for relatives in paths]
    by_folder = [
        f"{posixpath.basename(base)}/" if clashes and posixpath.basename(base) else ""
        for (base, _, _), clashes in zip(found, clashing, strict=True)
    ]
    for prefixes in (["" for _ in found], by_folder):
        full = [prefix + relative for prefix, relatives in zip(prefixes, paths, strict=True) for relative in relatives]
        if len(set(full)) == len(full):
            return prefixes
    return [f"{number}/" for number in range(len(found))]
