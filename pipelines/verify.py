"""`verify`: every object of a version is read again and checked, and all that is wrong is listed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.artifact.deletions import read_deleted
from operators.artifact.manifest import Manifest, PartRef, Segment, read_current, read_manifest, read_part_record
from operators.artifact.quantizer import Quantizer, read_quantizer
from operators.artifact.verifier import PartReport, check_exact, check_version, verify_part
from operators.errors import IntegrityError, VectormillError
from operators.storage.checked import verify_object
from operators.storage.store import Store, open_store
from pipelines.telemetry.progress import RunProgress
from pipelines.versions import CANDIDATE, open_version

NUM_THREADS = 4
OBJECTS_OF_A_PART = 4  # lists, vectors, rows and the commit record


def verify(root: str, version: str | None = None, progress: RunProgress | None = None) -> dict[str, Any]:
    """{"version", "ok", "problems", "objects", "bytes", "seconds"} of the published version, or another: see `open_version`.

    Damage is listed, not raised, also that of CURRENT and of the manifest: without them there is nothing more to read.
    Raises IndexNotFoundError where nothing is published, or no such version.
    """
    started = time.monotonic()
    with progress or RunProgress(quiet=True) as shown:
        store = open_store(root)
        shown.stage("read manifest", total=1)
        problems: list[str] = []
        name = version
        manifest: Manifest | None = None
        try:
            manifest, name = _open(store, version, problems)
        except IntegrityError as error:
            problems.append(str(error))
        objects, size_bytes = 0, 0
        if manifest is not None:
            objects, size_bytes = _check(store, manifest, problems, shown)
    return {
        "version": name,
        "ok": not problems,
        "problems": problems,
        "objects": objects,
        "bytes": size_bytes,
        "seconds": time.monotonic() - started,
    }


def _open(store: Store, version: str | None, problems: list[str]) -> tuple[Manifest, str]:
    """Manifest and its version; what CURRENT and the manifest disagree in is added to `problems`."""
    found = read_current(store) if version != CANDIDATE else None
    if version is not None and (found is None or found[0]["version"] != version):
        manifest = open_version(store, version)
        return manifest, manifest.version
    if found is None:
        open_version(store, None)  # says that nothing is published
    assert found is not None
    current = found[0]
    manifest = read_manifest(store, current["version"], current["manifest"])
    if current["content_digest"] != manifest.content_digest:
        problems.append(
            f"CURRENT names content_digest {current['content_digest']}, the manifest {manifest.content_digest}"
        )
    return manifest, manifest.version


def _check(store: Store, manifest: Manifest, problems: list[str], shown: RunProgress) -> tuple[int, int]:
    """Number and bytes of the objects read; what is wrong with them is added to `problems`."""
    num_parts = sum(len(segment.parts) for segment in manifest.segments)
    shown.stage("verify", total=num_parts + 1)
    try:
        quantizer = read_quantizer(store, manifest.quantizer_entry, manifest.list_assignment)
    except VectormillError:
        quantizer = None  # listed by check_version; the parts' own bytes can be checked all the same
    reports = _check_parts(store, manifest, quantizer, shown)
    found = check_version(store, manifest, reports)
    problems += found or check_exact(store, manifest)
    shown.advance()
    read = [report for found in reports.values() for report in found]
    size_bytes = sum(entry["size_bytes"] for entry in manifest.small_objects) + sum(r.size_bytes for r in read)
    return 2 + len(manifest.small_objects) + OBJECTS_OF_A_PART * num_parts, size_bytes  # 2: CURRENT and the manifest


def _check_parts(
    store: Store, manifest: Manifest, quantizer: Quantizer | None, shown: RunProgress
) -> dict[str, list[PartReport]]:
    """Reports of all parts by segment. Without a quantizer, or the segment's bitmap, only a part's own bytes are checked."""
    reports: dict[str, list[PartReport]] = {segment.name: [] for segment in manifest.segments}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        bitmaps = list(pool.map(lambda segment: _bitmap(store, segment), manifest.segments))
        futures = []
        for segment, deleted_N in zip(manifest.segments, bitmaps, strict=True):
            for ref in segment.parts:
                if quantizer is None or deleted_N is None:
                    futures.append((segment.name, pool.submit(_check_bytes, store, ref)))
                else:
                    futures.append((segment.name, pool.submit(verify_part, store, ref, quantizer, segment, deleted_N)))
        for name, future in futures:
            reports[name].append(future.result())
            shown.advance()
    return reports


def _bitmap(store: Store, segment: Segment) -> npt.NDArray[np.bool_] | None:
    """The deleted rows; None for a bitmap that cannot be read, which check_version lists."""
    try:
        return read_deleted(store, segment)
    except VectormillError:
        return None


def _check_bytes(store: Store, ref: PartRef) -> PartReport:
    report = PartReport(ref.record_key)
    try:
        for entry in read_part_record(store, ref).objects.values():
            verify_object(store, entry)
            report.size_bytes += entry.size_bytes
    except VectormillError as error:
        report.problems.append(str(error))
    return report
