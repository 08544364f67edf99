"""`verify`: every object of a version is read again and checked, and all that is wrong is listed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from operators.artifact.manifest import Manifest, PartRef, manifest_key, read_current, read_manifest, read_part_record
from operators.artifact.quantizer import Quantizer, read_quantizer
from operators.artifact.verifier import PartReport, check_coverage, check_manifest, verify_part
from operators.errors import IndexNotFoundError, IntegrityError, VectormillError
from operators.storage.checked import verify_object
from operators.storage.store import Store, open_store
from pipelines.progress import RunProgress

NUM_THREADS = 4
OBJECTS_OF_A_PART = 4  # lists, vectors, rows and the commit record


def verify(root: str, version: str | None = None, progress: RunProgress | None = None) -> dict[str, Any]:
    """{"version", "ok", "problems", "objects", "bytes", "seconds"} of the published version, or of a named one.

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
    found = read_current(store)
    if version is not None and (found is None or found[0]["version"] != version):
        if store.size_bytes(manifest_key(version)) is None:
            raise IndexNotFoundError(
                f"no version {version!r} at {store.url} (no object {manifest_key(version)}); versions: {_versions(store)}"
            )
        return read_manifest(store, version), version
    if found is None:
        raise IndexNotFoundError(
            f"no index is published at {store.url} (no object CURRENT there); check the path, or run `vectormill build` first"
        )
    current = found[0]
    manifest = read_manifest(store, current["version"], current["manifest"])
    if current["content_digest"] != manifest.content_digest:
        problems.append(
            f"CURRENT names content_digest {current['content_digest']}, the manifest {manifest.content_digest}"
        )
    return manifest, manifest.version


def _versions(store: Store) -> str:
    names = [key.split("/")[1] for key in store.list_keys("versions") if key.endswith("/manifest.json")]
    return ", ".join(names) or "none"


def _check(store: Store, manifest: Manifest, problems: list[str], shown: RunProgress) -> tuple[int, int]:
    """Number and bytes of the objects read; what is wrong with them is added to `problems`."""
    refs = [ref for segment in manifest.segments for ref in segment.parts]
    small = [manifest.quantizer, manifest.queries, manifest.sources["listing"]]
    small += [segment.rejects for segment in manifest.segments if segment.rejects]
    shown.stage("verify", total=len(refs) + 1)
    problems += check_manifest(store, manifest)
    shown.advance()
    try:
        quantizer = read_quantizer(store, manifest.quantizer_entry, manifest.list_assignment)
    except VectormillError:
        quantizer = None  # listed by check_manifest; the parts' own bytes can be checked all the same
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        futures = [pool.submit(_check_part, store, ref, quantizer, manifest.ntotal) for ref in refs]
        reports = []
        for future in futures:
            reports.append(future.result())
            shown.advance()
    problems += [problem for report in reports for problem in report.problems]
    if quantizer is not None and not any(report.problems for report in reports):
        done = 0
        for segment in manifest.segments:
            problems += check_coverage(manifest, segment, reports[done : done + len(segment.parts)])
            done += len(segment.parts)
    size_bytes = sum(entry["size_bytes"] for entry in small) + sum(report.size_bytes for report in reports)
    return 2 + len(small) + OBJECTS_OF_A_PART * len(refs), size_bytes  # 2: CURRENT and the manifest


def _check_part(store: Store, ref: PartRef, quantizer: Quantizer | None, ntotal: int) -> PartReport:
    if quantizer is not None:
        return verify_part(store, ref, quantizer, ntotal)
    report = PartReport(ref.record_key)
    try:
        for entry in read_part_record(store, ref).objects.values():
            verify_object(store, entry)
            report.size_bytes += entry.size_bytes
    except VectormillError as error:
        report.problems.append(str(error))
    return report
