"""What the commands print: rich text for people, plain JSON for machines. Both on standard output."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from typer.exceptions import TyperException

    from pipelines.build import BuildResult
    from pipelines.demo import Demo

TEXT_LINES = 2
SHOWN_PROBLEMS = 3
HISTORY_WIDTH = 150
SHOWN_DELTAS = 5
CHANGED = ("added", "edited", "deleted", "revived")
INTERRUPTED_EXIT_CODE = 130


@contextmanager
def clean_stdout() -> Iterator[None]:
    """Send what libraries print to standard error for the block: Ray reports its workers' troubles by print()."""
    with redirect_stdout(sys.stderr):
        yield


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), flush=True)


def build_facts(result: BuildResult, root: str) -> dict[str, Any]:
    """What `build --json` prints."""
    manifest = result.manifest
    return {
        "root": root,
        "version": manifest.version,
        "published": result.published,
        "ntotal": manifest.ntotal,
        "num_docs": manifest.num_docs,
        "rows": manifest.rows,
        "nlist": manifest.nlist,
        "M": manifest.M,
        "nbits": manifest.nbits,
        "nprobe": manifest.quality["nprobe"],
        "recall@10": manifest.quality["recall@10"],
        "model": manifest.model,
        "content_digest": manifest.content_digest,
        "pieces_encoded": result.pieces_encoded,
        "pieces_resumed": result.pieces_resumed,
        "seconds": result.seconds,
    }


def show_build(facts: dict[str, Any], next_commands: Sequence[str] = ()) -> None:
    """Summary of a build, and what to try next."""
    console = Console(highlight=False)
    if facts["published"]:
        console.print(Text(f"{facts['version']} is published at {facts['root']}", style="bold green"))
    else:
        console.print(
            Text(f"{facts['root']} is up to date: {facts['version']} was built from exactly this", style="bold green")
        )
    table = pairs()
    table.add_row("documents", f"{facts['num_docs']:,} of {rows_text(facts['rows'])}")
    table.add_row("vectors", f"{facts['ntotal']:,}")
    if facts["published"]:
        kept = f", {facts['pieces_resumed']} kept from an interrupted run" if facts["pieces_resumed"] else ""
        table.add_row("pieces", f"{facts['pieces_encoded']} encoded{kept}")
    table.add_row("encoder", encoder_text(facts["model"]))
    table.add_row("index", f"nlist {facts['nlist']}, M {facts['M']}, nbits {facts['nbits']}")
    table.add_row("recall@10", f"{facts['recall@10']:.4f} against exact search, at nprobe {facts['nprobe']}")
    table.add_row("content_digest", facts["content_digest"])
    table.add_row("seconds", seconds_text(facts["seconds"]))
    console.print(table)
    show_next(next_commands or [f'{program()} search {shlex.quote(facts["root"])} "your question"'])


def show_next(commands: Sequence[str]) -> None:
    """Commands to copy, one a line."""
    console = Console(highlight=False, soft_wrap=True)
    console.print("try next:")
    for command in commands:
        console.print(Text(f"  {command}", style="cyan"))


def rows_text(rows: dict[str, Any]) -> str:
    """`10 rows read, 2 rejected (null_text 2), 1 dropped (no_text 1)`."""
    parts = [f"{rows['read']:,} rows read"]
    for outcome in ("rejected", "dropped"):
        reasons = rows[outcome]
        if reasons:
            named = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
            parts.append(f"{sum(reasons.values()):,} {outcome} ({named})")
    return ", ".join(parts)


def encoder_text(model: dict[str, Any]) -> str:
    """`all-MiniLM-L6-v2, bfloat16, packed; cosine to float32 0.9999 (least 0.9996 of 32 texts)`."""
    said = f"{model['name']}, {model['precision']}"
    parity = model.get("parity")  # an index written before the check was added has none
    if parity:
        said += f", {parity['attention']}"
    if parity and parity["num_vectors"]:
        said += (
            f"; cosine to float32 {parity['cosine_mean']:.4f}"
            f" (least {parity['cosine_min']:.4f} of {parity['num_vectors']} chunks)"
        )
    return said


def seconds_text(seconds: dict[str, float]) -> str:
    stages = sorted(seconds.items(), key=lambda stage: -stage[1])
    named = ", ".join(f"{name} {took:.1f}" for name, took in stages if took >= 0.05)
    return f"{math.fsum(seconds.values()):.1f}" + (f" ({named})" if named else "")


def show_results(results: Sequence[dict[str, Any]]) -> None:
    """Each query as a heading, each hit in about three lines."""
    console = Console(highlight=False)
    for number, result in enumerate(results):
        if number:
            console.print()
        console.print(Text(result["query"], style="bold"))
        if not result["hits"]:
            console.print("  no hits")
        for hit in result["hits"]:
            heading = Text(f"{hit['rank']:>3}  {hit['score']:.3f}  ", style="green")
            heading.append(hit["doc_id"], style="bold cyan")
            heading.append(f"  chunk {hit['chunk_no']}" if hit["chunk_no"] else "", style="dim")
            console.print(heading, overflow="ellipsis", no_wrap=True)
            text = Text(" ".join(hit["text"].split()))
            # A little short of the full lines: words do not break at the margin.
            text.truncate(max(20, TEXT_LINES * (console.width - 5) - 12), overflow="ellipsis")
            console.print(Padding(text, (0, 0, 0, 5)))


def show_evaluation(facts: dict[str, Any]) -> None:
    """The index's numbers beside those of exact search."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for name in ("", "nDCG@10", "recall@100"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("index", f"{facts['ndcg@10']:.4f}", f"{facts['recall@100']:.4f}")
    table.add_row("exact search", f"{facts['exact_ndcg@10']:.4f}", f"{facts['exact_recall@100']:.4f}")
    console.print(table)
    console.print(
        f"recall@10 of the index against exact search, chunks: {facts['index_recall@10']:.4f}\n"
        f"{facts['queries']:,} queries, {facts['version']}, nprobe {facts['nprobe']},"
        f" refine_factor {facts['refine_factor']}, {facts['seconds']:.1f} s"
    )
    if not facts["exact_recall@100"]:
        console.print("No judged document was found at all: are these judgements of this corpus, and by the same ids?")


def point_text(point: dict[str, Any]) -> str:
    """An operating point on a line."""
    return (
        f"recall {point['recall']:g}: nprobe {point['nprobe']}, refine_factor {point['refine_factor']}"
        f" (measured {point['recall@10']:.4f}, p50 {point['p50_ms']:.2f} ms, p99 {point['p99_ms']:.2f} ms)"
    )


def show_operating_points(facts: dict[str, Any]) -> None:
    """What reaches each recall, and what none does."""
    console = Console(highlight=False, soft_wrap=True)
    for point in facts["points"]:
        console.print(point_text(point))
    for missed in facts["unreached"]:
        console.print(
            f"recall {missed['recall']:g}: not reached, the best of all settings is {missed['best_recall@10']:.4f}"
        )
    console.print(
        f"recall@10 against exact search, {facts['queries']:,} queries of the stored sample, {facts['version']};"
        f" latency of single queries without encoding, {facts['threads']} thread(s); {facts['seconds']:.1f} s."
        "\nStored: `search --recall` and `serve --recall` use them."
    )


def show_info(facts: dict[str, Any]) -> None:
    """Facts of a version as a table."""
    console = Console(highlight=False)
    table = pairs()
    after = f", after {facts['parent']}" if facts["parent"] else ""
    table.add_row("version", f"{facts['version']}{after}")
    table.add_row("made", f"{facts['created_at']} ({facts['kind']})")
    if facts["changes"]:
        table.add_row("changes", changes_text(facts["changes"]))
    sources = facts["sources"]
    table.add_row(
        "from",
        f"{', '.join(sources['arguments'])} ({sources['num_objects']:,} objects, {bytes_text(sources['size_bytes'])})",
    )
    model = facts["model"]
    table.add_row("model", f"{model['name']}, fingerprint {model['fingerprint'][:12]}")
    table.add_row("documents", f"{facts['num_docs']:,} of {rows_text(facts['rows'])}")
    table.add_row("ntotal", f"{facts['ntotal']:,} vectors, d {facts['d']}, metric {facts['metric']}")
    table.add_row("encoder", encoder_text(facts["model"]))
    table.add_row("index", f"nlist {facts['nlist']}, M {facts['M']}, nbits {facts['nbits']}")
    table.add_row("size", f"{facts['bytes_per_vector']:,.0f} bytes per vector, text and vectors included")
    table.add_row(
        "search",
        f"nprobe {facts['nprobe']}, refine_factor {facts['refine_factor']}: recall@10 {facts['recall@10']:.4f} against exact",
    )
    points = facts["operating_points"]
    for point in points["points"] if points else []:
        inherited = f", on {points['version']}" if points["version"] != facts["version"] else ""
        table.add_row("", f"{point_text(point)}{inherited}")
    if facts["num_deltas"] or facts["num_deleted"]:
        deleted = f"{facts['num_deleted']:,} deleted rows ({facts['deleted_share']:.2%})"
        table.add_row("segments", f"base and {facts['num_deltas']} delta(s), {deleted}")
    for number, segment in enumerate(facts["segments"]):
        if 0 < number < len(facts["segments"]) - SHOWN_DELTAS:
            continue
        held = f"{segment['num_rows']:,} vectors in {segment['parts']} part(s), {bytes_text(segment['size_bytes'])}"
        deleted = f", {segment['num_deleted']:,} deleted" if segment["num_deleted"] else ""
        table.add_row("delta" if number else "base", f"{segment['name']}: {held}{deleted}")
    if facts["num_deltas"] > SHOWN_DELTAS:
        table.add_row("", f"and {facts['num_deltas'] - SHOWN_DELTAS} earlier deltas (--json lists them)")
    table.add_row("content_digest", facts["content_digest"])
    console.print(table)


def changes_text(changes: dict[str, Any]) -> str:
    """`167 added, 166 edited, 167 deleted`: the documents that an update changed, in its counts."""
    documents = changes.get("documents", {})
    named = [f"{documents[what]:,} {what}" for what in CHANGED if documents.get(what)]
    return ", ".join(named) or "no documents"


def show_verification(facts: dict[str, Any], root: str) -> None:
    """What was read, or the list of what is wrong."""
    console = Console(highlight=False, soft_wrap=True)
    version = facts["version"] or "the published version"
    if facts["ok"]:
        read = f"{facts['objects']} objects, {bytes_text(facts['bytes'])}, {facts['seconds']:.1f} s"
        console.print(Text(f"{version} at {root} is whole ({read})", style="bold green"))
        return
    console.print(Text(f"{version} at {root} is damaged:", style="bold red"))
    for problem in facts["problems"]:
        console.print(Text(f"  - {problem}"))


def show_history(facts: dict[str, Any]) -> None:
    """A line a version, the newest first, and what is wrong."""
    # Nothing is cut where the output is a pipe or the window narrow: the terminal wraps.
    console = Console(highlight=False, soft_wrap=True, width=max(HISTORY_WIDTH, Console().width))
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


def show_demo(shown: Demo, folder: str, documents: int) -> None:
    """Three answers, the build's summary, and what to try next."""
    root, vectormill = shlex.quote(shown.root), program()
    Console().print()
    show_results(shown.results)
    Console().print()
    facts = build_facts(shown.built, shown.root)
    show_build(
        facts,
        [
            f'{vectormill} search {root} "your own question"',
            f"{vectormill} info {root}",
            f"{vectormill} verify {root}",
            f"{vectormill} demo --out {shlex.quote(folder)} --documents {documents}   # again: nothing is encoded twice",
            f"{vectormill} build --help   # an index of your own files",
        ],
    )


def program() -> str:
    """How this program can be called from here: its name if it is on the PATH, else its path."""
    beside = Path(sys.executable).with_name("vectormill")
    if shutil.which("vectormill") or not beside.exists():
        return "vectormill"
    here = Path.cwd()
    return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))


def fail(kind: str, message: str, exit_code: int, as_json: bool) -> int:
    """`exit_code`, after one line on standard error; with --json also an object on standard output."""
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": line, "exit_code": exit_code}}))
    return exit_code


def usage_message(error: TyperException) -> str:
    """What is wrong with the command line, and whose help says how it is right."""
    context: Any = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "vectormill"
    return f"{error.format_message().rstrip('.')}; see {command} --help"


def storage_message(error: BaseException, arguments: Sequence[str]) -> str:
    """What went wrong and where: the file that the error names, else the locations of the command line."""
    places = [str(place) for name in ("filename", "filename2") if (place := getattr(error, name, None))]
    if not places:
        places = [argument for argument in arguments if "://" in argument]
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    where = ", ".join(places) or " ".join(arguments)
    with contextlib.suppress(AttributeError):
        reason = f"{reason} ({error.__cause__.response['Error']['Code']})"  # type: ignore[union-attr]
    return (
        f"storage failed at {where}: {reason}; check the location, the credentials and the space left, then run again"
    )


def is_interrupt(error: BaseException | None) -> bool:
    """Whether the error came of Ctrl-C: a second one, in the clean-up of a lock, ends as a RuntimeError of the lock."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def interrupted() -> int:
    """The exit code, after saying what is kept."""
    print("\ninterrupted; what was committed is kept: run the same command again to resume", file=sys.stderr)
    return INTERRUPTED_EXIT_CODE


def bytes_text(size_bytes: float) -> str:
    """`5.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.1f} {unit}" if unit != "bytes" else f"{size_bytes:.0f} bytes"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def pairs() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table
