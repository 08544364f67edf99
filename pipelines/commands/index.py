"""The commands that make one index and look into it: build, search, eval, info, verify, demo. See pipelines/cli.py."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from operators.errors import ConfigError, IntegrityError
from pipelines.commands.options import (
    AsJson,
    Assignments,
    ConfigFile,
    Model,
    Nprobe,
    ProgressStyle,
    Quiet,
    RefineFactor,
    Root,
    Threads,
    Version,
    Workers,
)


def build_command(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help="Files, folders, globs or s3:// prefixes.")],
    out: Annotated[str, typer.Option(metavar="ROOT", help="The index: a folder or s3://bucket/name.")],
    config: ConfigFile = None,
    assignments: Assignments = None,
    id_column: Annotated[
        str | None, typer.Option(metavar="C", help="Default: _id, id or doc_id, else numbered.")
    ] = None,
    text_column: Annotated[
        list[str] | None, typer.Option(metavar="C", help="May repeat (title, then text). Default: title and text.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder or hub name. Default: all-MiniLM-L6-v2.")
    ] = None,
    workers: Workers = None,
    threads_per_worker: Threads = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the work of unfinished runs and begin anew.")] = False,
    quiet: Quiet = False,
    style: ProgressStyle = None,
    as_json: AsJson = False,
) -> None:
    """Build an index, or go on with one that was interrupted.

    SOURCE: Parquet, JSONL and CSV (plain, .gz, .zst), and text files (one document a file). Nothing is published
    before everything was read back and checked; what was committed is never done twice.

    \b
    Example:
      vectormill build corpus.parquet --out index --text-column title --text-column text
      vectormill build s3://bucket/docs/ --out s3://bucket/index --set chunk.mode=truncate
    """
    from pipelines.commands.index_output import build_facts, show_build
    from pipelines.commands.output import clean_stdout, print_json

    with clean_stdout():
        from pipelines.build import build
        from pipelines.config import load_config
        from pipelines.telemetry.progress import RunProgress

        given = {
            "read.id_column": (id_column, "--id-column"),
            "read.text_columns": (tuple(text_column or ()) or None, "--text-column"),
            "encode.model": (model, "--model"),
            "encode.workers": (workers, "--workers"),
            "encode.threads_per_worker": (threads_per_worker, "--threads-per-worker"),
        }
        settings = load_config(
            config, assignments or [], {key: pair for key, pair in given.items() if pair[0] is not None}
        )
        result = build(sources, out, settings, fresh=fresh, progress=RunProgress(quiet=quiet, style=style))
    facts = build_facts(result, out)
    (print_json if as_json else show_build)(facts)


def search_command(
    root: Root,
    questions: Annotated[list[str] | None, typer.Argument(metavar="QUESTION", help="In quotes; may repeat.")] = None,
    k: Annotated[int, typer.Option("-k", metavar="K", help="Hits for each question.")] = 10,
    nprobe: Nprobe = None,
    refine_factor: RefineFactor = None,
    recall: Annotated[
        float | None, typer.Option(metavar="R", help="In place of both: what `eval` found to reach this recall@10.")
    ] = None,
    queries: Annotated[
        str | None, typer.Option(metavar="FILE", help="More questions: .txt, .jsonl or .parquet (text, optional _id).")
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the hits to .json, .jsonl or .parquet.")
    ] = None,
    model: Model = None,
    version: Version = None,
    as_json: AsJson = False,
) -> None:
    """Find what answers each QUESTION best.

    \b
    Example:
      vectormill search index "how do I sort a list" -k 3
      vectormill search index --queries questions.txt --out hits.parquet --recall 0.95
    """
    from pipelines.commands.index_output import show_results
    from pipelines.commands.output import clean_stdout, print_json

    with clean_stdout():
        from pipelines.search import Query, check_queries, check_results_path, read_queries, search, write_results

        asked = [Query(str(number), text) for number, text in enumerate(questions or [], 1)]
        if queries is not None:
            asked += read_queries(queries)
        check_queries(asked)
        if out is not None:
            check_results_path(out)
        results = search(root, [query.text for query in asked], k, nprobe, refine_factor, model, version, recall)
        num_hits = write_results(out, [query.query_id for query in asked], results) if out is not None else 0
    if as_json:
        print_json(results)
    elif out is not None:
        print(f"{num_hits:,} hits of {len(results):,} queries are in {out}")
    else:
        show_results(results)


def eval_command(
    root: Root,
    queries: Annotated[
        str | None, typer.Option(metavar="FILE", help="Judged queries: Parquet with the columns _id, text.")
    ] = None,
    qrels: Annotated[
        str | None, typer.Option(metavar="FILE", help="Parquet with the columns query_id, doc_id, score.")
    ] = None,
    recall: Annotated[
        list[float] | None, typer.Option(metavar="R", help="May repeat. Default: 0.90, 0.95 and 0.99.")
    ] = None,
    nprobe: Nprobe = None,
    refine_factor: RefineFactor = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first N judged queries.")] = None,
    model: Model = None,
    version: Version = None,
    style: ProgressStyle = None,
    as_json: AsJson = False,
) -> None:
    """Find what settings reach a recall, or measure the index on judged queries.

    Without judged queries: of every recall the nprobe and refine factor that reach it fastest on the query sample that
    is stored with the index. They are stored, for `search --recall` and `serve --recall`.
    With them: nDCG@10 and recall@100 of documents, through the index and by exact search, and recall@10 of its chunks.

    \b
    Example:
      vectormill eval index
      vectormill eval index --recall 0.97
      vectormill eval index --queries queries.parquet --qrels qrels.parquet
    """
    from pipelines.commands.index_output import show_evaluation, show_operating_points
    from pipelines.commands.output import clean_stdout, print_json

    with clean_stdout():
        from pipelines.evaluate import evaluate
        from pipelines.operating_points import RECALLS, measure_operating_points
        from pipelines.telemetry.progress import RunProgress

        if queries is None and qrels is None:
            for name, given in (
                ("--nprobe", nprobe),
                ("--refine-factor", refine_factor),
                ("--limit", limit),
                ("--model", model),
            ):
                if given is not None:
                    raise ConfigError(
                        f"{name} is for judged queries, got {given}; give --queries and --qrels, or leave it out"
                    )
            facts = measure_operating_points(root, recall or RECALLS, version, RunProgress(style=style))
            (print_json if as_json else show_operating_points)(facts)
            return
        if queries is None or qrels is None or recall:
            raise ConfigError(
                "judged queries take --queries and --qrels, both, and no --recall; for operating points give none of them"
            )
        facts = evaluate(root, queries, qrels, nprobe, refine_factor, model, limit, RunProgress(style=style), version)
    (print_json if as_json else show_evaluation)(facts)


def info_command(root: Root, version: Version = None, as_json: AsJson = False) -> None:
    """Say what is published at ROOT.

    Sizes, settings, rows, segments, when and from what it was built.

    \b
    Example:
      vectormill info index
    """
    from pipelines.commands.index_output import show_info
    from pipelines.commands.output import print_json
    from pipelines.info import info

    facts = info(root, version)
    (print_json if as_json else show_info)(facts)


def verify_command(
    root: Root,
    version: Version = None,
    style: ProgressStyle = None,
    as_json: AsJson = False,
) -> None:
    """Read everything again and check it.

    If something is damaged: a list of what is wrong, and exit code 5.

    \b
    Example:
      vectormill verify index
    """
    from pipelines.commands.index_output import show_verification
    from pipelines.commands.output import clean_stdout, print_json

    with clean_stdout():
        from pipelines.telemetry.progress import RunProgress
        from pipelines.verify import verify

        facts = verify(root, version, RunProgress(style=style))
    if as_json:
        print_json(facts)
    else:
        show_verification(facts, root)
    if not facts["ok"]:
        advice = "restore the objects from a copy, or build again with --fresh"
        print(f"error: {len(facts['problems'])} problem(s) found at {root}; {advice}", file=sys.stderr)
        raise typer.Exit(IntegrityError.exit_code)


def demo_command(
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the corpus and its index go.")] = "demo",
    documents: Annotated[int, typer.Option(metavar="N", help="Docstrings to index.")] = 4000,
    style: ProgressStyle = None,
    as_json: AsJson = False,
) -> None:
    """Index real text and answer three questions.

    The text is the docstrings of the installed Python packages. Takes about two minutes; run again, a few seconds.

    \b
    Example:
      vectormill demo --out demo --documents 1000
    """
    from pipelines.commands.index_output import build_facts, show_demo
    from pipelines.commands.output import clean_stdout, print_json

    with clean_stdout():
        from pipelines.demo import demo
        from pipelines.telemetry.progress import RunProgress

        shown = demo(out, documents, RunProgress(style=style))
    if as_json:
        print_json({"corpus": shown.corpus, "build": build_facts(shown.built, shown.root), "results": shown.results})
    else:
        show_demo(shown, out, documents)
