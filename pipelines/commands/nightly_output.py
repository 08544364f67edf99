"""What `compact` and `drift` print: rich text for people, plain JSON for machines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from operators.artifact.manifest import Manifest
    from pipelines.compact import CompactResult


def compact_facts(result: CompactResult, root: str) -> dict[str, Any]:
    """What `compact --json` prints."""
    manifest = result.manifest
    return {
        "root": root,
        "version": manifest.version,
        "published": result.published,
        "retrained": manifest.quantizer["sha256"] != result.before.quantizer["sha256"],
        "before": _shape(result.before),
        "after": _shape(manifest),
        "ntotal": manifest.ntotal,
        "num_docs": manifest.num_docs,
        "nlist": manifest.nlist,
        "M": manifest.M,
        "nbits": manifest.nbits,
        "nprobe": manifest.quality["nprobe"],
        "recall@10": manifest.quality["recall@10"],
        "content_digest": manifest.content_digest,
        "seconds": result.seconds,
    }


def _shape(manifest: Manifest) -> dict[str, Any]:
    segments = manifest.segments
    parts = [part for segment in segments for part in segment.parts]
    return {
        "version": manifest.version,
        "segments": len(segments),
        "parts": len(parts),
        "rows": sum(segment.num_rows for segment in segments),
        "deleted": sum(segment.num_deleted for segment in segments),
        "bytes": sum(part.size_bytes for part in parts) + sum(entry["size_bytes"] for entry in manifest.small_objects),
        "recall@10": manifest.quality["recall@10"],
    }


def show_compact(facts: dict[str, Any]) -> None:
    """Summary of a compaction: what there was, what there is."""
    console = Console(highlight=False)
    before, after = facts["before"], facts["after"]
    if not facts["published"]:
        said = (
            f"{facts['root']} is compact: {facts['version']} has one segment and no deleted rows, nothing was written"
        )
        console.print(Text(said, style="bold green"))
        return
    console.print(Text(f"{facts['version']} is published at {facts['root']}", style="bold green"))
    table = Table.grid(padding=(0, 2))
    table.add_row("segments", f"{before['segments']} -> {after['segments']}")
    table.add_row("rows", f"{before['rows']:,} ({before['deleted']:,} deleted) -> {after['rows']:,}")
    table.add_row("bytes", f"{before['bytes']:,} -> {after['bytes']:,}")
    how = f"trained anew on {facts['ntotal']:,} vectors" if facts["retrained"] else "as it was"
    table.add_row("quantizer", f"{how}: nlist {facts['nlist']}, M {facts['M']}, nbits {facts['nbits']}")
    recall = f"{before['recall@10']:.4f} -> {after['recall@10']:.4f} against exact search, at nprobe {facts['nprobe']}"
    table.add_row("recall@10", recall)
    table.add_row("content_digest", facts["content_digest"])
    seconds = sorted(facts["seconds"].items(), key=lambda stage: -stage[1])
    named = ", ".join(f"{name} {took:.1f}" for name, took in seconds if took >= 0.05)
    table.add_row("seconds", f"{math.fsum(facts['seconds'].values()):.1f}" + (f" ({named})" if named else ""))
    console.print(table)


def show_drift(facts: dict[str, Any]) -> None:
    """The recommendation first, then what it rests on: the base and the deltas side by side."""
    console = Console(highlight=False)
    style = "bold green" if facts["recommendation"] == "nothing" else "bold yellow"
    console.print(Text(f"{facts['version']} at {facts['root']}: {facts['recommendation']}", style=style))
    console.print(Text(facts["reason"]))
    table = Table(box=None, padding=(0, 2), show_header=True)
    for name in ("", "base", "deltas"):
        table.add_column(name, justify="left" if not name else "right")
    base, delta = facts["base"], facts["delta"]
    lines = [
        ("rows stored", "rows", "{:,}"),
        ("rows sampled", "sampled_rows", "{:,}"),
        ("squared error of codes", "squared_error", "{:.5f}"),
        ("of the vectors' square", "relative_error", "{:.4f}"),
        ("imbalance of lists", "imbalance", "{:.3f}"),
        ("empty lists", "empty_lists", "{:.1%}"),
    ]
    for label, key, form in lines:
        cells = [form.format(side[key]) if side and side[key] is not None else "-" for side in (base, delta)]
        table.add_row(label, *cells)
    console.print(table)
    recall = facts["recall"]
    pairs = Table.grid(padding=(0, 2))
    pairs.add_row("deltas", f"{facts['deltas']} with {facts['delta_rows']:,} live rows of {facts['ntotal']:,}")
    pairs.add_row("imbalance", f"{facts['imbalance']:.3f} of all lists together")
    pairs.add_row("deleted", f"{facts['deleted_rows']:,} rows, {facts['deleted_share']:.1%} of those stored")
    pairs.add_row(
        "growth", f"{facts['growth']:.2f} times the {facts['trained_rows']:,} rows that the quantizer was trained for"
    )
    of_deltas = recall["delta_recall@10"]
    said = f"{recall['recall@10']:.4f} at nprobe {recall['nprobe']}" + (
        f", of neighbours in deltas {of_deltas:.4f}" if of_deltas is not None else ""
    )
    pairs.add_row("recall@10", f"{said}; {recall['trained_recall@10']:.4f} when trained")
    pairs.add_row("", f"measured {recall['measured']}")
    console.print(pairs)
