"""The report of a version as one HTML page, from the facts of `pipelines.report.report`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipelines.report_page.index_sections import history_section, lists_section, recall_section, segments_section
from pipelines.report_page.run_sections import (
    encoders_section,
    rows_section,
    throughput_section,
    timeline_section,
    tokens_section,
)
from pipelines.report_page.style import STYLE
from pipelines.report_page.text import count, esc, plural, share, size, span

Facts = dict[str, Any]
DONE = {"build": "became an", "update": "are in the updated", "compact": "are in the compacted"}


def page(facts: Facts) -> str:
    """The page. Everything that came from data is escaped; it refers to nothing outside of itself and holds no script."""
    sections: list[Callable[[Facts], str]] = [
        _header,
        _tiles,
        _notes,
        timeline_section,
        throughput_section,
        encoders_section,
        rows_section,
        recall_section,
        lists_section,
        tokens_section,
        segments_section,
        _settings,
        history_section,
        _footer,
    ]
    body = "\n".join(filter(None, (section(facts) for section in sections)))
    title = f"{facts['version']}: {facts['kind']} report"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{esc(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def wall_seconds(facts: Facts) -> float | None:
    """Seconds of the run that made the version, as far as they are known."""
    if facts["run"] is not None:
        return float(facts["run"]["seconds"])
    return float(sum(facts["seconds"].values())) if facts["seconds"] else None


def _header(facts: Facts) -> str:
    after = f", after {esc(facts['parent'])}" if facts["parent"] else ""
    rows = facts["rows"]
    left_out = rows["read"] - rows["indexed"]
    took = wall_seconds(facts)
    run = facts["run"]
    again = " The run was interrupted and resumed." if run is not None and run["resumed"] else ""
    lost = f"{count(left_out)} of {count(rows['read'])} rows were left out." if left_out else "No row was left out."
    when = f", in {span(took)}" if took is not None else ""
    said = (
        f"{count(facts['num_docs'])} documents {DONE.get(facts['kind'], 'are in the')} index of {count(facts['ntotal'])}"
        f" vectors{when}. Searches find {facts['recall@10']:.1%} of the exact top 10 at nprobe {facts['nprobe']} of"
        f" {count(facts['nlist'])}. {lost}{again}"
    )
    return (
        f"<header><h1>{esc(facts['kind'].capitalize())} report: version {esc(facts['version'])}</h1>"
        f'<p class="where">{esc(facts["root"])} · made {esc(facts["created_at"])}{after}</p>'
        f'<p class="lead">{said}</p></header>'
    )


def _tiles(facts: Facts) -> str:
    run, took = facts["run"], wall_seconds(facts)
    pieces = run["pieces"] if run else {}
    rows = facts["rows"]
    left_out = rows["read"] - rows["indexed"]
    tiles = [
        ("Documents", count(facts["num_docs"]), f"of {count(rows['read'])} rows read"),
        ("Vectors", count(facts["ntotal"]), f"{facts['d']} dimensions, {esc(facts['metric'])}"),
        ("recall@10", f"{facts['recall@10']:.4f}", f"nprobe {facts['nprobe']}, refine {facts['refine_factor']}"),
        ("Time", span(took) if took is not None else "not known", f"{esc(facts['kind'])}, all stages"),
    ]
    if pieces.get("encode_seconds"):
        rate = pieces["tokens"] / pieces["encode_seconds"]
        tiles.append(("Throughput", f"{count(rate)}", "tokens/s while encoding"))
        tiles.append(("Encoders busy", share(pieces["busy_share"] or 0.0), plural(pieces["encoders"], "worker")))
    tiles.append(("Size", f"{count(facts['bytes_per_vector'])} B", "per vector, text included"))
    tiles.append(("Rows left out", count(left_out), share(left_out / max(1, rows["read"])) + " of those read"))
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{said}</small></dd></div>" for name, value, said in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _notes(facts: Facts) -> str:
    """What a reader must know to read the rest right."""
    notes = []
    run = facts["run"]
    if run is None:
        notes.append(
            '<p class="warn">There is no telemetry beside this version (<code>run.json</code>): it was made by an earlier'
            " vectormill, it is a candidate that was refused, or storing it failed. So its timeline and throughput are not shown.</p>"
        )
    elif run["resumed"]:
        pieces = run["pieces"]
        notes.append(
            f'<p class="warn">The run was interrupted and resumed. Times are those of the last attempt, which encoded'
            f" {count(pieces['encoded'])} of {count(pieces['total'])} pieces; {count(pieces['resumed'])} had been committed before.</p>"
        )
    return "".join(notes)


def _settings(facts: Facts) -> str:
    """What it was made with, and what that took: the numbers that costs are reckoned from."""
    model = facts["model"]
    sources = facts["sources"]
    pairs = [
        ("Sources", f"{esc(', '.join(sources['arguments']))} ({count(sources['num_objects'])} objects, {size(sources['size_bytes'])})"),
        ("Model", f"{esc(model['name'])}, {esc(model['precision'])}, fingerprint <code>{esc(model['fingerprint'][:12])}</code>"),
        ("Index", f"nlist {count(facts['nlist'])}, M {facts['M']}, nbits {facts['nbits']}, metric {esc(facts['metric'])}, d {facts['d']}"),
        ("Search", f"nprobe {facts['nprobe']}, refine factor {facts['refine_factor']}"),
        ("content_digest", f"<code>{esc(facts['content_digest'])}</code>"),
    ]  # fmt: skip
    return f"<section><h2>Made with</h2>{definitions(pairs)}{_cost(facts)}</section>"


def _cost(facts: Facts) -> str:
    run = facts["run"]
    if run is None:
        return ""
    pieces, storage = run["pieces"], run["storage"]
    pairs = [("Wall time", span(run["seconds"]))]
    if pieces["encoded"]:
        busy = pieces["stages"]["encode"]["seconds"]
        documents = max(1, pieces["documents"])
        held = pieces["encoders"] * pieces["encode_seconds"]
        pairs += [
            ("Encoders held", f"{span(held)} in all ({pieces['encoders']} for {span(pieces['encode_seconds'])}), {span(busy)} of it at work"),
            ("Per million documents", f"{held / documents * 1e6 / 3600:,.1f} encoder hours, {count(pieces['tokens'] / documents * 1e6)} tokens"),
            ("Encoded", f"{count(pieces['documents'])} documents in {count(pieces['chunks'])} chunks of {count(pieces['tokens'])} tokens, {count(pieces['encoded'])} pieces"),
        ]  # fmt: skip
    tasks = sum(stage["tasks"]["seconds"] for stage in run["stages"])
    pairs.append(("Other stages' tasks", f"{span(tasks)} of work"))
    pairs.append(
        ("Storage", f"{size(storage['bytes_read'])} read, {size(storage['bytes_written'])} written"
         + (f", {count(storage['requests'])} S3 requests" if storage["requests"] else "")
         + (f", {count(storage['retries'])} repeated" if storage["retries"] else ""))
    )  # fmt: skip
    return (
        f"<h3>What it took</h3>{definitions(pairs)}"
        '<p class="hint">Multiply encoder hours by the price of a worker: where they are far more than the hours at work, the'
        " workers waited, and fewer of them would cost less.</p>"
    )


def definitions(pairs: list[tuple[str, str]]) -> str:
    """Names and what they are, HTML already."""
    return f'<dl class="facts">{"".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in pairs)}</dl>'


def _footer(facts: Facts) -> str:
    return (
        f"<footer>vectormill {esc(facts['model'].get('vectormill', ''))} · run {esc(facts['run_id'])} ·"
        f" the same as JSON: <code>vectormill report {esc(facts['root'])} --version {esc(facts['version'])} --json</code></footer>"
    )
