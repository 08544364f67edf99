"""Verification: re-read every object of a version and check it against its records, its neighbours and the manifest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from operators import schemas
from operators.artifact.list_run import RunReader, row_id_checksum
from operators.artifact.manifest import Manifest, PartRef, Segment, compute_content_digest, read_part_record
from operators.artifact.quantizer import Quantizer, read_quantizer
from operators.errors import IntegrityError, VectormillError
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry, verify_object
from operators.storage.store import Store

REENCODED_ENTRIES = 2_048  # about so many of each part, evenly spread: lists and codes are computed again from vectors


@dataclass
class PartReport:
    """What was found in one part."""

    record_key: str
    num_entries: int = 0
    row_id_checksum: int = 0
    size_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify_part(store: Store, ref: PartRef, quantizer: Quantizer, ntotal: int) -> PartReport:
    """Read all objects of the part; problems are listed, not raised."""
    report = PartReport(ref.record_key)
    try:
        record = read_part_record(store, ref)
    except IntegrityError as error:
        report.problems.append(str(error))
        return report
    for role, entry in sorted(record.objects.items()):
        try:
            verify_object(store, entry)
            report.size_bytes += entry.size_bytes
        except VectormillError as error:
            report.problems.append(f"{record.unit} {role}: {error}")
    if record.facts["quantizer"] != quantizer.digest:
        report.problems.append(
            f"{record.unit} was made with quantizer {record.facts['quantizer']}, the version names {quantizer.digest}"
        )
    for name in ("first_list", "num_lists", "num_entries"):
        if record.facts[name] != getattr(ref, name):
            report.problems.append(
                f"{record.unit} has {name} {record.facts[name]}, the manifest says {getattr(ref, name)}"
            )
    if [list(entry) for entry in record.content()] != ref.content:
        report.problems.append(f"{record.unit}: objects of the record differ from those in the manifest")
    if report.problems:
        return report
    try:
        _check_entries(RunReader(store, record.unit, record.objects, record.facts), quantizer, ntotal, report)
    except VectormillError as error:
        report.problems.append(str(error))
    return report


def _check_entries(reader: RunReader, quantizer: Quantizer, ntotal: int, report: PartReport) -> None:
    """Lists, vectors and rows of every entry belong together; ids are in range and rise within each list."""
    stride = max(1, reader.facts["num_entries"] // REENCODED_ENTRIES)
    for first, end in _steps(reader):
        entries = reader.read_lists(first, end)
        ids = entries.row_ids
        report.num_entries += len(ids)
        report.row_id_checksum = (report.row_id_checksum + row_id_checksum(ids)) % 2**64
        if len(ids) and (ids.min() < 0 or ids.max() >= ntotal):
            raise IntegrityError(
                f"{reader.name}: row ids {ids.min()}..{ids.max()} in lists {first}..{end - 1}, expected 0..{ntotal - 1}"
            )
        same_list = entries.list_no[1:] == entries.list_no[:-1]
        if (ids[1:] <= ids[:-1])[same_list].any():
            raise IntegrityError(f"{reader.name}: row ids do not rise within a list among lists {first}..{end - 1}")
        if not np.isfinite(entries.vectors).all():
            raise IntegrityError(f"{reader.name}: NaN or infinite vector in lists {first}..{end - 1}")
        _check_spans(reader, entries.rows, first, end)
        sample = np.arange(-(report.num_entries - len(ids)) % stride, len(ids), stride)
        if len(sample):
            list_no, codes = quantizer.encode(entries.vectors[sample])
            if not (np.array_equal(list_no, entries.list_no[sample]) and np.array_equal(codes, entries.codes[sample])):
                raise IntegrityError(
                    f"{reader.name}: stored codes are not those of the stored vectors (lists {first}..{end - 1})"
                )


def _check_spans(reader: RunReader, rows: object, first: int, end: int) -> None:
    import pyarrow.compute as pc

    lengths = pc.utf8_length(rows.column("text"))  # type: ignore[attr-defined]
    spans = pc.subtract(rows.column("end"), rows.column("start"))  # type: ignore[attr-defined]
    if not pc.all(pc.equal(lengths.cast("int32"), spans)).as_py() and len(lengths):
        raise IntegrityError(f"{reader.name}: a text is not as long as its span in lists {first}..{end - 1}")


def _steps(reader: RunReader, entries_at_once: int = 16_384) -> Iterable[tuple[int, int]]:
    """Ranges of lists with about `entries_at_once` entries each."""
    first = 0
    num_lists = len(reader.list_sizes_L)
    while first < num_lists:
        end = int(np.searchsorted(reader.starts_L, reader.starts_L[first] + entries_at_once, side="right")) - 1
        end = min(max(end, first + 1), num_lists)
        yield reader.first_list + first, reader.first_list + end
        first = end


def check_coverage(manifest: Manifest, segment: Segment, reports: list[PartReport]) -> list[str]:
    """Parts cover all lists once; their entries are exactly the rows 0..n-1 of the segment."""
    problems = []
    position = 0
    for ref in segment.parts:
        if ref.first_list != position:
            problems.append(f"{ref.record_key} begins at list {ref.first_list}, expected {position}")
        position = ref.first_list + ref.num_lists
    if position != manifest.nlist:
        problems.append(f"parts of segment {segment.name} end at list {position}, expected nlist {manifest.nlist}")
    found = sum(report.num_entries for report in reports)
    if found != segment.num_rows:
        problems.append(f"segment {segment.name} holds {found} entries, expected {segment.num_rows}")
    checksum = sum(report.row_id_checksum for report in reports) % 2**64
    if checksum != expected_checksum(segment.first_row_id, segment.num_rows):
        problems.append(
            f"the row ids of segment {segment.name} are not exactly {segment.first_row_id}..{segment.first_row_id + segment.num_rows - 1}"
        )
    return problems


def expected_checksum(first_row_id: int, num_rows: int, step: int = 1 << 20) -> int:
    """Checksum that the complete set of row ids has."""
    total = 0
    for start in range(first_row_id, first_row_id + num_rows, step):
        total += row_id_checksum(np.arange(start, min(start + step, first_row_id + num_rows), dtype=np.int64))
    return total % 2**64


def check_manifest(store: Store, manifest: Manifest) -> list[str]:
    """Everything but the parts: quantizer, queries, rejects, source listing, counts, content digest."""
    problems = []
    queries = ObjectEntry.from_json(manifest.queries)
    try:
        quantizer = read_quantizer(store, manifest.quantizer_entry)
        shape = (quantizer.d, quantizer.nlist, quantizer.M, quantizer.nbits, quantizer.metric)
        expected = (manifest.d, manifest.nlist, manifest.M, manifest.nbits, manifest.metric)
        if shape != expected:
            problems.append(f"quantizer has (d, nlist, M, nbits, metric) {shape}, the manifest says {expected}")
    except VectormillError as error:
        problems.append(str(error))
    objects = [queries, ObjectEntry.from_json(manifest.sources["listing"])]
    objects += [ObjectEntry.from_json(segment.rejects) for segment in manifest.segments if segment.rejects]
    for entry in objects:
        try:
            verify_object(store, entry)
        except VectormillError as error:
            problems.append(str(error))
    rows = manifest.rows
    left_out = sum(rows["rejected"].values()) + sum(rows["dropped"].values())
    if rows["read"] != rows["indexed"] + left_out:
        problems.append(
            f"rows do not reconcile: {rows['read']} read, {rows['indexed']} indexed, {left_out} rejected or dropped"
        )
    if not problems:
        listed = sum(
            read_table(store, ObjectEntry.from_json(s.rejects), [schemas.REJECTS.names[0]]).num_rows
            for s in manifest.segments
            if s.rejects
        )
        if listed != left_out:
            problems.append(f"{left_out} rows were left out, the rejects object lists {listed}")
    digest = compute_content_digest(manifest.quantizer_entry, queries, manifest.segments)
    if digest != manifest.content_digest:
        problems.append(f"content_digest is {digest}, the manifest says {manifest.content_digest}")
    if sum(segment.num_rows for segment in manifest.segments) != manifest.ntotal:
        problems.append(
            f"segments hold {sum(s.num_rows for s in manifest.segments)} rows, the manifest says ntotal {manifest.ntotal}"
        )
    return problems
