"""The commands that keep an index fresh and tidy: update, compact, drift, history, rollback, gc. See pipelines/cli.py."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import AsJson, Assignments, ConfigFile, ProgressStyle, Quiet, Root, Workers

IndexRoot = Annotated[str, typer.Option("--index", metavar="ROOT", help="The index: a folder or s3://bucket/name.")]


def update_command(
    index: IndexRoot,
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="SOURCE", help="The corpus as it is now: files, folders, globs, s3://."),
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="SOURCE lists only what is new or replaced.")] = False,
    deletes: Annotated[
        str | None, typer.Option(metavar="FILE", help="Ids to delete: .txt, .jsonl or .parquet (_id, id or doc_id).")
    ] = None,
    min_recall: Annotated[
        float, typer.Option(metavar="R", help="Least recall@10 on the query sample; below, nothing is published.")
    ] = 0.95,
    queries: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Your own queries to measure recall with: .txt, .jsonl, .parquet."),
    ] = None,
    max_deleted: Annotated[
        float,
        typer.Option(metavar="F", help="Most of the documents that may vanish at once (from 1,000 documents on)."),
    ] = 0.5,
    retrain: Annotated[
        str, typer.Option(metavar="WHEN", help="never, or auto: train the quantizer anew when `drift` says so.")
    ] = "never",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen and what it would cost.")] = False,
    config: ConfigFile = None,
    assignments: Assignments = None,
    model: Annotated[str | None, typer.Option(metavar="PATH", help="Where the index's model is now, if moved.")] = None,
    workers: Workers = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the work of unfinished updates first.")] = False,
    quiet: Quiet = False,
    style: ProgressStyle = None,
    as_json: AsJson = False,
) -> None:
    """Bring an index to the present state of its corpus, for the cost of what changed.

    Unchanged objects are not read, unchanged documents of changed objects are not encoded. Publishes a new version when
    its recall is good enough; the settings are those of the published one. Run it again after a crash: it goes on.

    \b
    Example:
      vectormill update s3://bucket/docs/ --index s3://bucket/index
      vectormill update today.jsonl --index index --append --deletes gone.txt
    """
    from pipelines.commands.output import clean_stdout, print_json

    with clean_stdout():
        from pipelines.commands.update_output import show_update, update_facts
        from pipelines.config import load_config
        from pipelines.deletes import read_ids
        from pipelines.search import read_queries
        from pipelines.telemetry.progress import RunProgress
        from pipelines.update import UpdateOptions, update

        given = {"encode.model": (model, "--model"), "encode.workers": (workers, "--workers")}
        named = {key: pair for key, pair in given.items() if pair[0] is not None}
        options = UpdateOptions(
            append=append,
            deletes=read_ids(deletes) if deletes is not None else None,
            min_recall=min_recall,
            max_deleted=max_deleted,
            queries=[query.text for query in read_queries(queries)] if queries is not None else (),
            retrain=retrain,
            dry_run=dry_run,
            fresh=fresh,
        )
        result = update(
            sources or [],
            index,
            lambda base: load_config(config, assignments or [], named, base),
            options,
            RunProgress(quiet=quiet, style=style),
        )
    facts = update_facts(result, index)
    (print_json if as_json else show_update)(facts)


def compact_command(
    root: Root,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the quantizer anew on the stored vectors; no text is encoded.")
    ] = False,
    min_recall: Annotated[
        float | None,
        typer.Option(
            metavar="R", help="Least recall@10 on the query sample. Default: as before; --retrain: as a build."
        ),
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the work of unfinished compactions first.")] = False,
    quiet: Quiet = False,
    style: ProgressStyle = None,
    as_json: AsJson = False,
) -> None:
    """Merge all segments into one and drop deleted rows.

    Streams in bounded memory, and publishes a new version with the same answers. Row ids change.

    \b
    Example:
      vectormill compact index
    """
    from pipelines.commands.output import clean_stdout, print_json

    with clean_stdout():
        from pipelines.commands.nightly_output import compact_facts, show_compact
        from pipelines.compact import compact
        from pipelines.config import load_config
        from pipelines.telemetry.progress import RunProgress

        result = compact(
            root,
            lambda base: load_config(config, assignments or [], {}, base),
            retrain=retrain,
            min_recall=min_recall,
            fresh=fresh,
            progress=RunProgress(quiet=quiet, style=style),
        )
    facts = compact_facts(result, root)
    (print_json if as_json else show_compact)(facts)


def drift_command(root: Root, style: ProgressStyle = None, as_json: AsJson = False) -> None:
    """Say how far the deltas have moved away from the base, and what to do about it.

    Quantisation error, list sizes, recall on the query sample, deleted rows: nothing, compact or retrain, and why.

    \b
    Example:
      vectormill drift index
    """
    from pipelines.commands.output import clean_stdout, print_json

    with clean_stdout():
        from pipelines.commands.nightly_output import show_drift
        from pipelines.drift import drift
        from pipelines.telemetry.progress import RunProgress

        facts = drift(root, progress=RunProgress(style=style))
    (print_json if as_json else show_drift)(facts)


def history_command(root: Root, as_json: AsJson = False) -> None:
    """List the versions that ROOT holds.

    Which one is published, which are whole, what each takes by itself and what it shares with others. Checks manifests
    and part records by checksum and all objects by size; `verify --version` reads everything.

    \b
    Example:
      vectormill history index
    """
    from pipelines.commands.output import clean_stdout, print_json
    from pipelines.commands.versions_output import show_history

    with clean_stdout():
        from pipelines.versions import history

        facts = history(root)
    (print_json if as_json else show_history)(facts)


def rollback_command(
    root: Root,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="Default: the parent of the published one.")
    ] = None,
    full: Annotated[bool, typer.Option("--verify", help="Read and check every byte of the version first.")] = False,
    style: ProgressStyle = None,
    as_json: AsJson = False,
) -> None:
    """Publish an earlier version again, or a later one.

    The version is checked first. A build that runs meanwhile ends without publishing. To go forward again, name the version.

    \b
    Example:
      vectormill rollback index
      vectormill rollback index v000007 --verify
    """
    from pipelines.commands.output import clean_stdout, print_json
    from pipelines.commands.versions_output import show_rollback

    with clean_stdout():
        from pipelines.rollback import rollback
        from pipelines.telemetry.progress import RunProgress

        facts = rollback(root, version, full=full, progress=RunProgress(quiet=not full, style=style))
    (print_json if as_json else show_rollback)(facts)


def gc_command(
    root: Root,
    keep: Annotated[int, typer.Option(metavar="N", help="Versions to keep: the N newest, and the published one.")] = 7,
    min_age: Annotated[
        str, typer.Option(metavar="AGE", help="Younger versions and objects stay: 90s, 30m, 12h, 1d.")
    ] = "1d",
    delete: Annotated[bool, typer.Option("--delete/--dry-run", help="Do it, or only say what would go.")] = False,
    style: ProgressStyle = None,
    as_json: AsJson = False,
) -> None:
    """Delete what no kept version and no living run needs.

    Says what would go unless told to --delete. May run beside a build, and may be killed: the next gc goes on.

    \b
    Example:
      vectormill gc index --keep 7 --min-age 1d
      vectormill gc index --keep 7 --min-age 1d --delete
    """
    from pipelines.commands.output import clean_stdout, print_json
    from pipelines.commands.versions_output import show_gc

    with clean_stdout():
        from pipelines.garbage import collect_garbage, parse_age
        from pipelines.telemetry.progress import RunProgress

        progress = RunProgress(quiet=not delete, style=style)
        facts = collect_garbage(root, keep, parse_age(min_age), delete=delete, progress=progress)
    (print_json if as_json else show_gc)(facts)
