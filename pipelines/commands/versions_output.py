"""What `history`, `rollback` and `gc` print."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.commands.output import WIDE, bytes_text, pairs, program, show_next

SHOWN_PROBLEMS = 3


def show_history(facts: dict[str, Any]) -> None:
    """A line a version, the newest first, and what is wrong."""
    # Nothing is cut where the output is a pipe or the window narrow: the terminal wraps.
    console = Console(highlight=False, soft_wrap=True, width=max(WIDE, Console().width))
    table = Table(box=None, pad_edge=False)
    numbers = ("vectors", "documents", "+/~/-", "deltas", "deleted", "recall@10", "own", "shared")
    for name in ("", "version", "kind", "parent", "created", *numbers, "state"):
        numeric = name in numbers
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for version in reversed(facts["versions"]):
        mark = "*" if version["current"] else ""
        if version["state"] == "damaged":
            cells = [""] * 11
        else:
            changed = version["changes"].get("documents", {})
            cells = [
                version["kind"],
                version["parent"] or "",
                version["created_at"],
                f"{version['ntotal']:,}",
                f"{version['num_docs']:,}",
                "/".join(f"{changed[what]:,}" for what in ("added", "edited", "deleted")) if changed else "",
                f"{version['num_deltas']:,}",
                f"{version['deleted_share']:.1%}" if version["num_deleted"] else "",
                f"{version['recall@10']:.4f}",
                bytes_text(version["bytes"]["own"]),
                bytes_text(version["bytes"]["shared"]),
            ]
        style = "bold" if version["current"] else "red" if version["state"] != "whole" else ""
        table.add_row(mark, version["version"], *cells, version["state"], style=style)
    if facts["versions"]:
        console.print(table)
    legend = "; +/~/-: documents added, edited and deleted since the parent; deleted: share of the rows held"
    console.print(f"* published: {facts['current'] or 'not known'}{legend}")
    for problem in facts["problems"]:
        console.print(Text(f"  - {problem}", style="red"))
    for version in reversed(facts["versions"]):
        for problem in version["problems"][:SHOWN_PROBLEMS]:
            console.print(Text(f"  - {version['version']}: {problem}", style="red"))
        more = len(version["problems"]) - SHOWN_PROBLEMS
        if more > 0:
            console.print(Text(f"  - {version['version']}: and {more} more (--json lists them)", style="red"))


def show_rollback(facts: dict[str, Any]) -> None:
    """What is published now, and how to go back again."""
    console = Console(highlight=False, soft_wrap=True)
    if not facts["changed"]:
        console.print(Text(f"{facts['version']} is published at {facts['root']} already; nothing was changed"))
        return
    before = f", instead of {facts['before']}" if facts["before"] else ""
    console.print(Text(f"{facts['version']} is published at {facts['root']}{before}", style="bold green"))
    if facts["before"]:
        show_next([f"{program()} rollback {shlex.quote(facts['root'])} {facts['before']}   # undo"])


def show_gc(facts: dict[str, Any]) -> None:
    """What goes, what stays and why, and how many bytes."""
    console = Console(highlight=False, soft_wrap=True)
    table = pairs()
    for name, kept in (("keep", facts["kept"]), ("keep run", facts["kept_runs"])):
        for what, why in kept.items():
            table.add_row(name, f"{what} ({why})")
    for what in facts["dropped"]:
        table.add_row("drop", what)
    for what in facts["dropped_runs"]:
        table.add_row("drop run", what)
    console.print(table)
    amount = f"{facts['num_objects']:,} objects, {bytes_text(facts['bytes'])}"
    if facts["deleted"]:
        console.print(Text(f"deleted {amount}", style="bold green"))
    elif facts["num_objects"]:
        console.print(Text(f"would delete {amount}; nothing was deleted: --delete does it (--json lists them)"))
    else:
        console.print(Text("nothing to delete", style="bold green"))
