"""A store on a local disk: link(2) for put-if-absent, flock(2) for compare-and-swap, fsync before anything counts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from operators.storage.store import Store, StoredObject
from operators.storage.traffic import count

TEMPORARY_PREFIX = ".tmp-"


class DiskFullError(OSError):
    """The file system, or the user's quota on it, has no room. `filename` is what was written."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Gives errors of the block the name of the file, and those for want of room a class and the room that is left."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(error.errno, f"disk full ({_room(path)})", str(path)) from error
        if error.filename is None:
            error.filename = str(path)
        raise


def _room(path: Path) -> str:
    folder = next(folder for folder in path.parents if folder.exists())
    usage = shutil.disk_usage(folder)
    return f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB free"


def fsync_folder(folder: Path) -> None:
    """Make renames and links in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _LocalStream:
    """A file under a temporary name, renamed into place by commit()."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "xb")  # noqa: SIM115 - closed by commit() or discard()

    def write(self, data: bytes) -> int:
        with writing(self._target):
            written = self._file.write(data)
        count(bytes_written=written)
        return written

    def commit(self) -> None:
        with writing(self._target):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._target)
            fsync_folder(self._target.parent)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # what is still buffered may find no room
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class LocalStore(Store):
    """A folder on a local (or POSIX-compliant shared) disk."""

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(url)
        self._folder = folder

    def local_path(self, key: str) -> Path:
        return self._folder / key

    def read(self, key: str) -> bytes:
        data = self.local_path(key).read_bytes()
        count(bytes_read=len(data))
        return data

    def reader(self, key: str) -> Callable[[int, int], bytes]:
        path = self.local_path(key)

        def read_range(start: int, stop: int) -> bytes:
            descriptor = os.open(path, os.O_RDONLY)  # 5 us; a kept one would have to be closed by every caller
            try:
                data = os.pread(descriptor, stop - start, start)
            finally:
                os.close(descriptor)
            count(bytes_read=len(data))
            return data

        return read_range

    def size_bytes(self, key: str) -> int | None:
        try:
            return self.local_path(key).stat().st_size
        except FileNotFoundError:
            return None

    def list_keys(self, prefix: str) -> list[str]:
        folder = self.local_path(prefix)
        keys = []
        for parent, _, names in os.walk(folder):
            relative = Path(parent).relative_to(self._folder)
            keys += [str(relative / name) for name in names if not name.startswith(TEMPORARY_PREFIX)]
        return sorted(keys)

    def list_objects(self, prefix: str) -> list[StoredObject]:
        return sorted(self._stats(prefix, temporary=False), key=lambda found: found.key)

    def list_half_written(self, prefix: str) -> list[StoredObject]:
        return sorted(self._stats(prefix, temporary=True), key=lambda found: found.key)

    def _stats(self, prefix: str, *, temporary: bool) -> Iterator[StoredObject]:
        for parent, _, names in os.walk(self.local_path(prefix)):
            for name in names:
                if name.startswith(TEMPORARY_PREFIX) == temporary:
                    path = Path(parent, name)
                    with contextlib.suppress(FileNotFoundError):  # deleted or renamed since the folder was read
                        stat = path.stat()
                        yield StoredObject(str(path.relative_to(self._folder)), stat.st_size, stat.st_mtime)

    def clock(self) -> float:
        return time.time()

    def _write_temporary(self, key: str, data: bytes) -> Path:
        target = self.local_path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(
                missing_ok=True
            )  # on a full disk what is left behind takes the room that the next run needs
            raise
        count(bytes_written=len(data))
        return temporary

    def put(self, key: str, data: bytes) -> None:
        with writing(self.local_path(key)):
            temporary = self._write_temporary(key, data)
            os.replace(temporary, self.local_path(key))
            fsync_folder(temporary.parent)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with writing(self.local_path(key)):
            temporary = self._write_temporary(key, data)
            try:
                # link(2) is atomic and fails when the name is taken; rename(2) would replace it.
                os.link(temporary, self.local_path(key))
            except FileExistsError:
                return False
            finally:
                temporary.unlink()
            fsync_folder(temporary.parent)
            return True

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        try:
            data = self.read(key)
        except FileNotFoundError:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def replace_if(self, key: str, data: bytes, tag: str | None) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.read_tagged(key)
            if (found[1] if found else None) != tag:
                return False
            self.put(key, data)
            return True

    def open_stream(self, key: str) -> _LocalStream:
        return _LocalStream(self.local_path(key))

    def delete(self, key: str) -> None:
        self.local_path(key).unlink(missing_ok=True)

    def delete_many(self, keys: Sequence[str]) -> None:
        folders = {self.local_path(key).parent for key in keys}
        for key in keys:
            self.delete(key)
        for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
            # Folders of units (a version, a segment, a run) have names that are never used again; those above them stay.
            while len(folder.relative_to(self._folder).parts) > 1:
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    pass
                except OSError:  # not empty
                    break
                folder = folder.parent
            with contextlib.suppress(FileNotFoundError):  # another process removed it, empty as it was
                fsync_folder(folder)

    def delete_tree(self, prefix: str) -> None:
        shutil.rmtree(self.local_path(prefix), ignore_errors=True)
