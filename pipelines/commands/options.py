"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Root = Annotated[str, typer.Argument(metavar="ROOT", help="The index: a folder or s3://bucket/name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines; progress stays on standard error.")]
Nprobe = Annotated[
    int | None, typer.Option(metavar="N", help="Inverted lists to scan. Default: what the build measured.")
]
RefineFactor = Annotated[
    int | None,
    typer.Option(metavar="N", help="Candidates per hit scored again with stored vectors; 0: the codes alone."),
]
Model = Annotated[str | None, typer.Option(metavar="PATH", help="Where the index's model is now, if it was moved.")]
Version = Annotated[
    str | None,
    typer.Option(metavar="VERSION", help="Default: the published one. 'candidate': the last one that was refused."),
]
ConfigFile = Annotated[str | None, typer.Option("--config", metavar="FILE", help="Settings: a TOML file.")]
Assignments = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; may repeat.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Encoders. Default: as many as fit.")]
Threads = Annotated[int | None, typer.Option(metavar="T", help="CPU threads of each. Default: 1.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]
ProgressStyle = Annotated[
    str | None,
    typer.Option(
        "--progress",
        metavar="STYLE",
        help="bars, lines or json (docs/telemetry.md). Default: bars on a terminal, else lines.",
    ),
]
