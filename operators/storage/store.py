"""The keys below one root, on a local disk or on S3: durable puts, conditional puts, listing, ranged reads.

Every published fact rests on two conditional writes: put-if-absent (commit records, epochs) and compare-and-swap
(CURRENT). A local disk has link(2) and flock(2) for them, S3 has If-None-Match and If-Match. A store that ignores or
refuses those headers is found out by a probe, and a claim protocol on strongly consistent listings takes their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operators.errors import ConfigError
from operators.storage.filesystem import filesystem_for, is_local


def open_store(root: str) -> Store:
    """The store at `root`: a folder (made when the first key is written) or an s3:// prefix."""
    from operators.storage.local_store import LocalStore  # here, since it builds on this module

    fs, path = filesystem_for(root)
    if is_local(fs):
        if Path(path).exists() and not Path(path).is_dir():
            raise ConfigError(f"an index root must be a folder or an s3:// prefix, got the file {root!r}")
        return LocalStore(path, Path(path))  # absolute: workers may have another working directory
    if "/" not in path:
        raise ConfigError(f"an index root on S3 needs a prefix inside the bucket, got {root!r}; use s3://bucket/name")
    from operators.storage.s3_store import S3Store  # here: importing the S3 client takes half a second

    return S3Store(root, fs, path)


@dataclass(frozen=True)
class StoredObject:
    """An object as a listing shows it."""

    key: str
    size_bytes: int
    modified_at: float  # seconds since 1970 by the store's own clock, which `Store.clock` reads


class Store:
    """What the rest of the tool knows of a root. Keys are relative, with forward slashes. Pickles to its URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __reduce__(self) -> Any:
        return open_store, (self.url,)

    def read(self, key: str) -> bytes:
        """Whole object. Raises FileNotFoundError."""
        raise NotImplementedError

    def reader(self, key: str) -> Callable[[int, int], bytes]:
        """Function (start, stop) -> bytes of that range; shorter at the object's end. Raises FileNotFoundError."""
        raise NotImplementedError

    def size_bytes(self, key: str) -> int | None:
        """Size of the object, None where there is none."""
        raise NotImplementedError

    def list_keys(self, prefix: str) -> list[str]:
        """Sorted keys of all objects below the folder `prefix`."""
        raise NotImplementedError

    def list_objects(self, prefix: str) -> list[StoredObject]:
        """All objects below the folder `prefix` with size and age, sorted by key. Costs more than `list_keys` on a disk."""
        raise NotImplementedError

    def list_half_written(self, prefix: str) -> list[StoredObject]:
        """What writers that were killed left below the folder `prefix`, and what living ones are writing."""
        return []

    def clock(self) -> float:
        """Now, by the clock that `modified_at` is told by."""
        raise NotImplementedError

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object, durably and atomically."""
        raise NotImplementedError

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object unless the key exists. True if it was written by this call."""
        raise NotImplementedError

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        """Content and the tag that `replace_if` takes, None where there is no object."""
        raise NotImplementedError

    def replace_if(self, key: str, data: bytes, tag: str | None) -> bool:
        """Write the object if its tag still is `tag` (None: if it is absent). True if written."""
        raise NotImplementedError

    def open_stream(self, key: str) -> Any:
        """Binary file to write a new object to, with `commit()` (makes it visible, durable) and `discard()`."""
        raise NotImplementedError

    def delete(self, key: str) -> None:
        """Delete an object; no error if there is none."""
        raise NotImplementedError

    def delete_many(self, keys: Sequence[str]) -> None:
        """Delete the objects, durably, in few requests, and folders that are empty then; no error where there is none."""
        raise NotImplementedError

    def delete_tree(self, prefix: str) -> None:
        """Delete everything below the folder `prefix`."""
        raise NotImplementedError

    def local_path(self, key: str) -> Path | None:
        """Where the object lies on this machine's disk; None for a remote store."""
        return None
