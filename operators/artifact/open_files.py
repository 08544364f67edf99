"""Objects of a local root that stay open: an open index goes on reading them after gc has deleted their names."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from operators.artifact.mapped_segment import cached_path, local_copy
from operators.errors import IntegrityError, ResourceError
from operators.storage.checked import GONE_ADVICE, ObjectEntry
from operators.storage.store import Store

OTHER_FILES = 256  # descriptors that the rest of a process may come to need


class OpenFiles(Store):
    """A store for reading, in which the objects `kept` are opened once, by `reader`, and closed with the last reader.

    That holds for a root on a local disk; from a remote one objects are read by key, as long as they are there, but for
    those of `copies`: they are fetched into the cache first.
    """

    def __init__(self, store: Store, kept: Collection[str], copies: Mapping[str, ObjectEntry]) -> None:
        super().__init__(store.url)
        self._store = store
        self._kept = frozenset(kept)
        self._copies = copies
        if kept and store.local_path(next(iter(kept))) is not None:
            allow_open_files(len(self._kept), store.url)

    def read(self, key: str) -> bytes:
        return self._store.read(key)

    def size_bytes(self, key: str) -> int | None:
        return self._store.size_bytes(key)

    def local_path(self, key: str) -> Path | None:
        if key in self._copies and key in self._kept:
            return local_copy(self._store, self._copies[key])
        return self._store.local_path(key)

    def is_copy(self, key: str) -> bool:
        """Whether the object is remote and read from a copy in the cache."""
        return key in self._copies and key in self._kept and self._store.local_path(key) is None

    def drop_copy(self, key: str) -> bool:
        """Delete the copy in the cache, if there is one, so that the next to open the index fetches another."""
        if not self.is_copy(key):
            return False
        cached_path(self._copies[key]).unlink(missing_ok=True)
        return True

    def reader(self, key: str) -> Callable[[int, int], bytes]:
        """As the store's own. Raises IntegrityError when an object that is kept open has vanished since it was measured."""
        path = self.local_path(key) if key in self._kept else None
        if path is None:
            return self._store.reader(key)
        try:
            return OpenFile(path)
        except FileNotFoundError:
            raise IntegrityError(f"object {path} went missing while it was opened{GONE_ADVICE}") from None


class OpenFile:
    """Function (start, stop) -> bytes of a file that is open as long as the function lives."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __call__(self, start: int, stop: int) -> bytes:
        return os.pread(self._descriptor, stop - start, start)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def allow_open_files(count: int, url: str) -> None:
    """Raise this process's own limit of open files where `count` more need it. Raises ResourceError where it may not."""
    needed = count + OTHER_FILES + len(os.listdir("/dev/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ResourceError(
            f"the index at {url} keeps {count} files open, this process may open {hard} in all: raise the limit (ulimit -n) to"
            f" {needed}, or build with a larger index.part_bytes"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
