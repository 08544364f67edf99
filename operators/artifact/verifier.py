"""Verification: re-read every object of a version and check it against its records, its neighbours and the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from operators.artifact.deletions import live_rows, read_deleted
from operators.artifact.ledger_verifier import check_ledger, check_rejects, rows_checksum
from operators.artifact.list_run import RunReader, row_id_checksum
from operators.artifact.manifest import Manifest, PartRef, Segment, compute_content_digest, read_part_record
from operators.artifact.quantizer import Quantizer, read_quantizer
from operators.errors import IntegrityError, VectormillError
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry, verify_object
from operators.storage.store import Store

NUM_THREADS = 8
REENCODED_ENTRIES = 2_048  # about so many of each part, evenly spread: lists and codes are computed again from vectors


@dataclass
class PartReport:
    """What was found in one part."""

    record_key: str
    num_entries: int = 0
    row_id_checksum: int = 0
    document_checksum: int = 0  # ledger_verifier.document_checksum of the live rows
    size_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify_part(
    store: Store, ref: PartRef, quantizer: Quantizer, segment: Segment, deleted_N: npt.NDArray[np.bool_] | None = None
) -> PartReport:
    """Read all objects of a part of the segment; problems are listed, not raised.

    deleted_N: bool [num_rows], what `read_deleted` gave for the segment; None: it is read here.
    """
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
        reader = RunReader(store, record.unit, record.objects, record.facts)
        _check_entries(
            reader, quantizer, segment, read_deleted(store, segment) if deleted_N is None else deleted_N, report
        )
    except VectormillError as error:
        report.problems.append(str(error))
    return report


def _check_entries(
    reader: RunReader, quantizer: Quantizer, segment: Segment, deleted_N: npt.NDArray[np.bool_], report: PartReport
) -> None:
    """Lists, vectors and rows of every entry belong together; ids are in range and rise within each list."""
    first_row_id = segment.first_row_id
    stride = max(1, reader.facts["num_entries"] // REENCODED_ENTRIES)
    for first, end in _steps(reader):
        entries = reader.read_lists(first, end)
        ids = entries.row_ids
        report.num_entries += len(ids)
        report.row_id_checksum = (report.row_id_checksum + row_id_checksum(ids)) % 2**64
        if len(ids) and (ids.min() < first_row_id or ids.max() >= first_row_id + segment.num_rows):
            raise IntegrityError(
                f"{reader.name}: row ids {ids.min()}..{ids.max()} in lists {first}..{end - 1}, segment {segment.name} has"
                f" {first_row_id}..{first_row_id + segment.num_rows - 1}"
            )
        same_list = entries.list_no[1:] == entries.list_no[:-1]
        if (ids[1:] <= ids[:-1])[same_list].any():
            raise IntegrityError(f"{reader.name}: row ids do not rise within a list among lists {first}..{end - 1}")
        if not np.isfinite(entries.vectors).all():
            raise IntegrityError(f"{reader.name}: NaN or infinite vector in lists {first}..{end - 1}")
        _check_spans(reader, entries.rows, first, end)
        live = entries.rows.filter(pa.array(~deleted_N[ids - first_row_id]))
        report.document_checksum = (report.document_checksum + rows_checksum(live)) % 2**64
        sample = np.arange(-(report.num_entries - len(ids)) % stride, len(ids), stride)
        if len(sample):
            list_no, codes = quantizer.encode(entries.vectors[sample])
            if not (np.array_equal(list_no, entries.list_no[sample]) and np.array_equal(codes, entries.codes[sample])):
                raise IntegrityError(
                    f"{reader.name}: stored codes are not those of the stored vectors (lists {first}..{end - 1})"
                )


def _check_spans(reader: RunReader, rows: pa.Table, first: int, end: int) -> None:
    lengths = pc.utf8_length(rows.column("text"))
    spans = pc.subtract(rows.column("end"), rows.column("start"))
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


def check_version(store: Store, manifest: Manifest, reports: Mapping[str, Sequence[PartReport]]) -> list[str]:
    """All that is wrong with the version. reports: of all parts of a segment, in order, by the segment's name.

    A segment without reports counts as checked, as those are that an update takes over from its parent.
    """
    problems = check_manifest(store, manifest)
    ledger_is_readable = not problems
    checksums = {}
    for segment in manifest.segments:
        if segment.name not in reports:
            continue
        found = [problem for report in reports[segment.name] for problem in report.problems]
        found = found or check_coverage(manifest, segment, reports[segment.name])
        if not found:
            checksums[segment.name] = sum(report.document_checksum for report in reports[segment.name]) % 2**64
        problems += found
    if ledger_is_readable:
        problems += check_ledger(store, manifest, checksums)
    return list(dict.fromkeys(problems))  # a bitmap is read with each part of its segment


def check_coverage(manifest: Manifest, segment: Segment, reports: Sequence[PartReport]) -> list[str]:
    """Parts cover all lists once; their entries are exactly the rows of the segment."""
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
    """What is wrong beside parts and ledger: quantizer, small objects, bitmaps, row ids of segments, counts, content digest."""
    problems = []
    try:
        quantizer = read_quantizer(store, manifest.quantizer_entry)
        shape = (quantizer.d, quantizer.nlist, quantizer.M, quantizer.nbits, quantizer.metric)
        expected = (manifest.d, manifest.nlist, manifest.M, manifest.nbits, manifest.metric)
        if shape != expected:
            problems.append(f"quantizer has (d, nlist, M, nbits, metric) {shape}, the manifest says {expected}")
    except VectormillError as error:
        problems.append(str(error))
    bitmaps = [segment.deleted["key"] for segment in manifest.segments if segment.deleted]
    entries = [ObjectEntry.from_json(entry) for entry in manifest.small_objects]
    entries = [entry for entry in entries if entry.key not in (manifest.quantizer["key"], *bitmaps)]
    problems += _failures(verify_object, store, entries)
    problems += _failures(read_deleted, store, manifest.segments)
    problems += _check_segments(manifest)
    rows = manifest.rows
    left_out = sum(rows["rejected"].values()) + sum(rows["dropped"].values())
    if rows["read"] != rows["indexed"] + left_out:
        problems.append(
            f"rows do not reconcile: {rows['read']} read, {rows['indexed']} indexed, {left_out} rejected or dropped"
        )
    if rows["indexed"] != manifest.num_docs:
        problems.append(f"{rows['indexed']} documents are indexed, the manifest says num_docs {manifest.num_docs}")
    if not problems:
        problems += check_rejects(store, manifest)
    digest = compute_content_digest(manifest)
    if digest != manifest.content_digest:
        problems.append(f"content_digest is {digest}, the manifest says {manifest.content_digest}")
    return problems


def check_exact(store: Store, manifest: Manifest) -> list[str]:
    """What is wrong with the stored exact neighbours: they must be live rows, best first, of each query of the sample."""
    if manifest.exact is None:
        return []
    try:
        table = read_table(store, ObjectEntry.from_json(manifest.exact))
        num_queries = read_table(store, ObjectEntry.from_json(manifest.queries), ["order"]).num_rows
        live_N = live_rows(store, manifest)
    except VectormillError as error:
        return [str(error)]
    if table.num_rows != num_queries:
        return [f"the exact neighbours are those of {table.num_rows} queries, the sample has {num_queries}"]
    found = zip(table.column("row_ids").to_pylist(), table.column("scores").to_pylist(), strict=True)
    for number, (rows, scores) in enumerate(found):
        row_ids = np.array(rows, np.int64)
        if len(set(rows)) != len(rows) or ((row_ids < 0) | (row_ids >= len(live_N))).any() or not live_N[row_ids].all():
            return [
                f"the exact neighbours of query {number} are not different rows of the version that are not deleted"
            ]
        if len(scores) != len(rows) or (np.diff(np.array(scores)) > 0).any():
            return [f"the scores of the exact neighbours of query {number} do not fall, or are not one for each"]
    return []


def _failures(check: Callable[[Store, Any], object], store: Store, items: Sequence[Any]) -> list[str]:
    """What the check raises for any of the items. In parallel: a version with many deltas has hundreds."""

    def failure(item: Any) -> str | None:
        try:
            check(store, item)
        except VectormillError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [found for found in pool.map(failure, items) if found is not None]


def _check_segments(manifest: Manifest) -> list[str]:
    """Row ids go on from segment to segment; a bitmap is there where rows are deleted; what is left is ntotal."""
    problems = []
    next_row_id = 0
    for segment in manifest.segments:
        if segment.first_row_id != next_row_id:
            problems.append(
                f"row ids of segment {segment.name} begin at {segment.first_row_id}, expected {next_row_id}, where the segment"
                " before it ends: a segment is missing, or two have the same rows"
            )
        next_row_id = segment.first_row_id + segment.num_rows
        if segment.deleted is not None and not segment.num_deleted:
            problems.append(f"segment {segment.name} has a bitmap though no row of it is deleted")
    live = sum(segment.num_live for segment in manifest.segments)
    if live != manifest.ntotal:
        problems.append(f"segments hold {live} rows that are not deleted, the manifest says ntotal {manifest.ntotal}")
    return problems
