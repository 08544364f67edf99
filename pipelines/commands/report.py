"""The command `report`. See pipelines/cli.py."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import AsJson, Root, Version


def report_command(
    root: Root,
    version: Version = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Where the page goes. Default: report.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about a version and the run that made it.

    Timeline, throughput, encoders, rows left out and why, recall by nprobe, list sizes, token lengths, cost. It refers to
    nothing outside of itself: mail it. With --json the facts are printed, and a page is only written where --out says so.

    \b
    Example:
      vectormill report index --out report.html
    """
    from pipelines.commands.output import bytes_text, clean_stdout, print_json

    with clean_stdout():
        from pipelines.report import report, write_report

        facts = report(root, version)
        target = out or (None if as_json else "report.html")
        size_bytes = write_report(facts, target) if target is not None else 0
    if as_json:
        print_json(facts)
    else:
        print(f"the report of {facts['version']} is in {target} ({bytes_text(size_bytes)}): open it in a browser")
