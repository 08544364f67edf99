"""What `update` prints."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console
from rich.text import Text

from pipelines.commands.output import pairs, program, rows_text, seconds_text, show_next
from pipelines.update import UpdateResult


def update_facts(result: UpdateResult, root: str) -> dict[str, Any]:
    """What `update --json` prints."""
    manifest = result.manifest
    return {
        "root": root,
        "version": manifest.version,
        "parent": manifest.parent,
        "published": result.published,
        "dry_run": result.dry_run,
        "objects": result.objects,
        "documents": result.changes,
        "texts_encoded": result.texts_encoded,
        "cost": result.cost,
        "ntotal": manifest.ntotal,
        "num_docs": manifest.num_docs,
        "rows": manifest.rows,
        "segments": len(manifest.segments),
        "recall@10": manifest.quality["recall@10"],
        "retrained": result.retrained,
        "content_digest": manifest.content_digest,
        "seconds": result.seconds,
    }


def show_update(facts: dict[str, Any]) -> None:
    """Summary of an update, or of what it would do."""
    console = Console(highlight=False)
    root, version = facts["root"], facts["version"]
    if facts["dry_run"]:
        headline = f"dry run: nothing was written at {root}; {version} is published there"
    elif facts["published"]:
        headline = f"{version} is published at {root}"
    else:
        headline = f"{root} is up to date: nothing changed, nothing was published, {version} stays"
    console.print(Text(headline, style="bold green"))
    objects, documents = facts["objects"], facts["documents"]
    table = pairs()
    table.add_row("objects", ", ".join(f"{count:,} {what}" for what, count in objects.items()))
    named = ("added", "edited", "deleted", "revived", "unchanged")
    table.add_row("documents", ", ".join(f"{documents[what]:,} {what}" for what in named))
    if facts["dry_run"]:
        cost = facts["cost"]
        table.add_row("would encode", f"{documents['texts_to_encode']:,} texts, about {cost['tokens']:,} tokens")
        took = "an unknown time" if cost["seconds"] is None else f"about {cost['seconds']:,.0f} s"
        table.add_row("would take", f"{took} of encoding and {cost['size_bytes'] / 1e6:,.1f} MB")
    elif facts["published"]:
        kept = documents["texts_to_encode"] - facts["texts_encoded"]
        again = f", {kept:,} kept from an interrupted run" if kept > 0 else ""
        table.add_row("encoded", f"{facts['texts_encoded']:,} text(s){again}")
        table.add_row(
            "index", f"{facts['ntotal']:,} vectors in {facts['segments']} segment(s); {rows_text(facts['rows'])}"
        )
        table.add_row("recall@10", f"{facts['recall@10']:.4f} against exact search on the query sample")
        if facts["retrained"]:
            table.add_row("retrained", facts["retrained"])
        table.add_row("content_digest", facts["content_digest"])
    elif objects["changed"] or objects["added"]:
        table.add_row("note", "objects with new etags hold the same documents; they are read again next time")
    table.add_row("seconds", seconds_text(facts["seconds"]))
    console.print(table)
    if facts["published"]:
        show_next([f"{program()} history {shlex.quote(root)}", f"{program()} rollback {shlex.quote(root)}"])
