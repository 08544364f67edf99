"""A disk that fills up: a clear error, nothing half-published or left behind, and the work goes on when there is room."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from operators.artifact import mapped_segment
from operators.artifact.manifest import read_current
from operators.storage import local_store
from operators.storage.checked import put_checked
from operators.storage.fencing import take_epoch
from operators.storage.local_store import TEMPORARY_PREFIX, DiskFullError, LocalStore
from operators.storage.store import open_store
from pipelines.verify import verify
from tests.artifact_maker import add_delta, make_version
from tests.faults.full_disk import UNSHARE, mounting_is_allowed


class FullDisk:
    """A disk of `room` bytes: writing more fails as the kernel lets it fail, in the middle of the data."""

    def __init__(self, room: int) -> None:
        self.room = room

    def open(self, path: Path, mode: str) -> Any:
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                data = memoryview(data).cast("B")
                if disk.room <= 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written = super().write(data[: disk.room])
                disk.room -= written
                return written

        return io.BufferedWriter(File(path, mode.replace("b", "")))


def test_a_disk_that_fills_up_at_any_write_leaves_the_published_version_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_version(tmp_path / "base", num_docs=60, nlist=8, num_pieces=2, num_shards=1)
    whole = _size(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "roomy")
    roomy = dataclasses.replace(base, store=open_store(str(tmp_path / "roomy")))
    take_epoch(roomy.store, "as the run that fails")
    undisturbed = add_delta(roomy, 20, delete=[3], seed=5)
    needed = _size(tmp_path / "roomy") - whole
    for share in (0.02, 0.3, 0.6, 0.8, 0.95, 0.995):
        root = tmp_path / f"root-{share}"
        shutil.copytree(tmp_path / "base", root)
        store = open_store(str(root))
        assert isinstance(store, LocalStore)
        made = dataclasses.replace(base, store=store)
        with monkeypatch.context() as patch:
            patch.setattr(local_store, "open", FullDisk(int(share * needed)).open, raising=False)
            with pytest.raises(DiskFullError, match=r"disk full \([\d,.]+ of [\d,.]+ MB free\)") as caught:
                add_delta(made, 20, delete=[3], seed=5)
        assert str(caught.value.filename).startswith(str(root))
        assert not list(root.rglob(f"{TEMPORARY_PREFIX}*"))
        current = read_current(store)
        assert current is not None and current[0]["version"] == base.manifest.version
        assert verify(str(root))["problems"] == []
        again = add_delta(made, 20, delete=[3], seed=5)
        assert again.manifest.content_digest == undisturbed.manifest.content_digest


def test_a_cache_that_fills_up_is_named_and_nothing_is_left_of_the_copy(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VECTORMILL_CACHE", str(tmp_path))
    store = open_store(f"{bucket}/root")
    data = os.urandom(300_000)
    entry = put_checked(store, "part.lists", data)
    with monkeypatch.context() as patch:
        patch.setattr(mapped_segment, "open", FullDisk(100_000).open, raising=False)
        with pytest.raises(DiskFullError, match="disk full") as caught:
            mapped_segment.local_copy(store, entry)
    assert str(caught.value.filename).startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert mapped_segment.local_copy(store, entry).read_bytes() == data


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.skipif(not mounting_is_allowed(), reason="a small file system cannot be mounted here (unshare -rm)")
def test_commands_on_a_small_file_system_stop_with_one_line_and_go_on_when_it_has_grown(tmp_path: Path) -> None:
    script = f'mount -t tmpfs -o size=200m tmpfs "$1" && exec "{sys.executable}" -m tests.faults.full_disk "$1" "$2" --factor 32 --steps update'
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", script, "sh", str(tmp_path / "disk"), str(tmp_path / "docs")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
