"""Versions of an index: the manifest that lists every object of a version, and CURRENT that names the published one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from operators.artifact.list_assignment import NEAREST, ListAssignment
from operators.crash_points import crash_point
from operators.errors import FencedError, IndexNotFoundError, IntegrityError
from operators.settings import digest_of
from operators.storage.checked import ObjectEntry
from operators.storage.commits import CommitRecord, parse_record, seal, unseal
from operators.storage.fencing import Epoch
from operators.storage.store import Store

FORMAT_VERSION = 2
CURRENT_KEY = "CURRENT"


@dataclass(frozen=True)
class PartRef:
    """A part as the manifest names it: the record's key and SHA-256, what it covers, and what its objects must hold."""

    record_key: str
    record_sha256: str
    first_list: int
    num_lists: int
    num_entries: int
    size_bytes: int
    content: list[list[Any]]  # [role, size_bytes, sha256] of each object


@dataclass(frozen=True)
class Segment:
    """A set of rows, the base or a nightly delta, and which of them a version has deleted. Only the latter changes."""

    name: str
    first_row_id: int  # where the segment before it ended
    num_rows: int
    parts: list[PartRef]
    deleted: dict[str, Any] | None = (
        None  # ObjectEntry JSON of a bitmap (operators/artifact/deletions.py), None: no row
    )
    num_deleted: int = 0

    @property
    def num_live(self) -> int:
        return self.num_rows - self.num_deleted


@dataclass(frozen=True)
class Manifest:
    """Everything that makes up a version. Field meanings: docs/artifact-format.md."""

    version: str
    parent: str | None
    run_id: str
    epoch: int
    created_at: str
    config: dict[str, Any]
    fingerprint: dict[str, Any]
    model: dict[str, Any]
    metric: str
    d: int
    nlist: int
    M: int
    nbits: int
    ntotal: int  # live entries: those that are not deleted
    num_docs: int
    rows: dict[str, Any]
    sources: dict[str, Any]
    quantizer: dict[str, Any]
    queries: dict[str, Any]
    segments: list[Segment]
    rejects: dict[str, Any] | None  # ObjectEntry JSON of a schemas.REJECTS Parquet, None when no row was left out
    documents: list[dict[str, Any]]  # {"num_rows", "object": ObjectEntry JSON}: the ledger (operators/documents.py)
    amended: dict[str, Any] | None  # ObjectEntry JSON of a schemas.AMENDED Parquet
    quality: dict[str, Any]
    content_digest: str
    exact: dict[str, Any] | None = (
        None  # ObjectEntry JSON: exact neighbours of the queries (artifact/exact_neighbours.py)
    )
    kind: str = "build"  # or update, compact
    changes: dict[str, Any] = field(default_factory=dict)  # what an update found, by count
    format_version: int = FORMAT_VERSION
    reports: dict[str, Any] = field(default_factory=dict)
    assignment: dict[str, Any] = field(default_factory=NEAREST.to_json)  # a manifest without it: nearest of all

    @property
    def list_assignment(self) -> ListAssignment:
        return ListAssignment.from_json(self.assignment)

    @property
    def quantizer_entry(self) -> ObjectEntry:
        return ObjectEntry.from_json(self.quantizer)

    @property
    def next_row_id(self) -> int:
        """The first row id that no segment has."""
        return self.segments[-1].first_row_id + self.segments[-1].num_rows

    @property
    def small_objects(self) -> list[dict[str, Any]]:
        """ObjectEntry JSON of everything that the manifest itself names; the part records name the rest."""
        optional = [self.rejects, self.amended, self.exact, *(segment.deleted for segment in self.segments)]
        return [
            self.quantizer,
            self.queries,
            self.sources["listing"],
            *(table["object"] for table in self.documents),
            *(entry for entry in optional if entry),
        ]

    @property
    def bytes_per_vector(self) -> float:
        """Bytes of all published objects per vector."""
        total = self.quantizer["size_bytes"] + sum(part.size_bytes for s in self.segments for part in s.parts)
        return total / max(1, self.ntotal)


def compute_content_digest(manifest: Manifest) -> str:
    """SHA-256 over what the published objects hold, not over their keys, times or run ids; nor over the listing (etags)."""
    content = {
        "format_version": FORMAT_VERSION,
        "quantizer": manifest.quantizer["sha256"],
        "queries": manifest.queries["sha256"],
        "rejects": manifest.rejects["sha256"] if manifest.rejects else None,
        "documents": [table["object"]["sha256"] for table in manifest.documents],
        "amended": manifest.amended["sha256"] if manifest.amended else None,
        "segments": [
            {
                "first_row_id": s.first_row_id,
                "num_rows": s.num_rows,
                "deleted": s.deleted["sha256"] if s.deleted else None,
                "parts": [[p.first_list, p.num_lists, p.num_entries, p.content] for p in s.parts],
            }
            for s in manifest.segments
        ],
    }
    return digest_of(content)


def part_ref(store: Store, record_key: str) -> PartRef:
    """Reference to a committed part."""
    data = store.read(record_key)
    record = parse_record(data, record_key)
    return PartRef(
        record_key,
        hashlib.sha256(data).hexdigest(),
        record.facts["first_list"],
        record.facts["num_lists"],
        record.facts["num_entries"],
        record.size_bytes,
        [list(entry) for entry in record.content()],
    )


def read_part_record(store: Store, ref: PartRef) -> CommitRecord:
    """The part's record. Raises IntegrityError when it is missing or not the one that the manifest names."""
    try:
        data = store.read(ref.record_key)
    except FileNotFoundError:
        raise IntegrityError(
            f"part record {store.url}/{ref.record_key} is missing; restore it from a copy, or build again"
        ) from None
    if hashlib.sha256(data).hexdigest() != ref.record_sha256:
        raise IntegrityError(
            f"part record {store.url}/{ref.record_key} is not the one that the manifest names (other SHA-256)"
        )
    return parse_record(data, f"{store.url}/{ref.record_key}")


def read_part_records(store: Store, refs: Sequence[PartRef]) -> list[CommitRecord]:
    """Records of all parts, read in parallel."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda ref: read_part_record(store, ref), refs))


def manifest_key(version: str) -> str:
    return f"versions/{version}/manifest.json"


def write_manifest(store: Store, manifest: Manifest) -> str:
    """Store the manifest of a version that is to be published; returns the digest that CURRENT will name.

    Raises FencedError when another version has that name.
    """
    data = seal(asdict(manifest))
    key = manifest_key(manifest.version)
    if not store.put_if_absent(key, data) and store.read(key) != data:
        raise FencedError(
            f"{store.url}/{key} is there already and belongs to another run: two runs took epoch {manifest.epoch}; nothing was"
            " published by this one, run again"
        )
    return hashlib.sha256(data).hexdigest()


def candidate_key(run_id: str) -> str:
    """Where the manifest of a version that was refused is kept: not among the versions, so nothing can publish it."""
    return f"runs/{run_id}/candidate.json"


def write_candidate(store: Store, manifest: Manifest) -> str:
    """Keep the manifest of a refused version for inspection; returns its key."""
    store.put(candidate_key(manifest.run_id), seal(asdict(manifest)))
    return candidate_key(manifest.run_id)


def read_candidate(store: Store, run_id: str) -> Manifest:
    """Manifest of the version that a run made and that was refused. Raises FileNotFoundError, IntegrityError."""
    return parse_manifest(store.read(candidate_key(run_id)), f"{store.url}/{candidate_key(run_id)}")


def read_manifest(store: Store, version: str, digest: str | None = None) -> Manifest:
    """Manifest of a version. Raises IntegrityError when it is missing, damaged or not the one with `digest`."""
    name = f"{store.url}/{manifest_key(version)}"
    try:
        data = store.read(manifest_key(version))
    except FileNotFoundError:
        raise IntegrityError(
            f"manifest {name} is missing; CURRENT names it: restore it from a copy, or build again"
        ) from None
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise IntegrityError(f"manifest {name} is not the one that CURRENT names (other SHA-256): damaged or replaced")
    return parse_manifest(data, name)


def parse_manifest(data: bytes, name: str) -> Manifest:
    """Manifest from its stored bytes. Raises IntegrityError naming `name`."""
    body = unseal(data, f"manifest {name}")
    if body["format_version"] != FORMAT_VERSION:
        raise IntegrityError(
            f"manifest {name} has format version {body['format_version']}, this vectormill reads {FORMAT_VERSION}; use the"
            " version that wrote it, or build again"
        )
    segments = [Segment(**{**s, "parts": [PartRef(**p) for p in s["parts"]]}) for s in body.pop("segments")]
    return Manifest(**body, segments=segments)


def read_current(store: Store) -> tuple[dict[str, Any], str] | None:
    """What CURRENT says ({version, manifest, epoch, ...}) and its tag, None where nothing is published."""
    found = store.read_tagged(CURRENT_KEY)
    return (unseal(found[0], f"{store.url}/{CURRENT_KEY}"), found[1]) if found else None


def open_current(store: Store) -> Manifest:
    """Manifest of the published version. Raises IndexNotFoundError where there is none."""
    return open_published(store)[0]


def open_published(store: Store) -> tuple[Manifest, str]:
    """Manifest of the published version and its digest, of one moment. Raises IndexNotFoundError where there is none."""
    found = read_current(store)
    if found is None:
        raise IndexNotFoundError(
            f"no index is published at {store.url} (no object CURRENT there); check the path, or run `vectormill build` first"
        )
    digest = found[0]["manifest"]
    return read_manifest(store, found[0]["version"], digest), digest


def publish(store: Store, manifest: Manifest, digest: str, epoch: Epoch, tag: str | None) -> None:
    """Swap CURRENT to the manifest. `tag` is CURRENT's when the run began. Raises FencedError when the run lost."""
    epoch.check(store)
    crash_point("publish.before")
    body = {
        "version": manifest.version,
        "manifest": digest,
        "epoch": epoch.number,
        "content_digest": manifest.content_digest,
        "published_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if not store.replace_if(CURRENT_KEY, seal(body), tag):
        found = read_current(store)
        if found is None or found[0]["manifest"] != digest:  # else the put succeeded, its answer was lost
            epoch.check(store)  # says who took the root, where that is why
            raise _overtaken(store, epoch, found)
    crash_point("publish.after")


def fence_current(store: Store, epoch: Epoch, digest: str | None) -> str | None:
    """Put the epoch into CURRENT, which names the same version after it; the tag to publish with.

    From then on no earlier run's swap can succeed, wherever it was suspended, also if this run publishes nothing. digest:
    of the manifest that CURRENT named when the run began; None: there was no CURRENT, or one that cannot be read. Raises
    FencedError when it names another one, or a later run was here.
    """
    while True:
        found = store.read_tagged(CURRENT_KEY)
        if found is None:
            if digest is not None:
                raise _overtaken(store, epoch, None)
            return None
        try:
            body = unseal(found[0], f"{store.url}/{CURRENT_KEY}")
        except IntegrityError:
            if digest is not None:
                raise
            return found[1]
        if body["manifest"] != digest:
            raise _overtaken(store, epoch, (body, found[1]))
        data = seal({**body, "fence": epoch.number})
        if body.get("fence", 0) < epoch.number:
            store.replace_if(CURRENT_KEY, data, found[1])
        again = store.read_tagged(CURRENT_KEY)
        if again is not None and again[0] == data:
            return again[1]
        epoch.check(store)


def check_current(store: Store, epoch: Epoch, tag: str | None) -> None:
    """Raise FencedError when CURRENT is not what it was when the run began (`tag`)."""
    found = read_current(store)
    if (found[1] if found else None) != tag:
        raise _overtaken(store, epoch, found)


def _overtaken(store: Store, epoch: Epoch, found: tuple[dict[str, Any], str] | None) -> FencedError:
    winner = f"version {found[0]['version']} (epoch {found[0]['epoch']})" if found else "nothing"
    return FencedError(
        f"{store.url}/CURRENT changed while this run ({epoch.run_id}) worked: it now names {winner};"
        " this run's version was not published; run again to start from the new one"
    )
