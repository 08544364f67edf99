"""What `build`, `search`, `eval`, `info`, `verify` and `demo` print."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipelines.commands.output import bytes_text, changes_text, pairs, program, rows_text, seconds_text, show_next

if TYPE_CHECKING:
    from pipelines.build import BuildResult
    from pipelines.demo import Demo

TEXT_LINES = 2
SHOWN_DELTAS = 5


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
