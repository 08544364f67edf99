"""Sections about the run: its stages in time, throughput, encoders, rows, token lengths."""

from __future__ import annotations

from typing import Any

from pipelines.report_page.charts import Bar, Row, histogram, over_time, shares, stacked, timeline
from pipelines.report_page.text import count, esc, plural, share, span, table

Facts = dict[str, Any]
SHOWN_WORKERS = 24
SHOWN_BINS = 64
LEAST_BINS = 8
LEAST_STEPS = 4
REASONS = {  # what they mean, for readers who do not know the code
    "bad_csv": "the record is not CSV as the header has it",
    "bad_json": "the line is not JSON",
    "deleted_by_request": "its id was in a list of deletions",
    "duplicate_id": "another row has this id; the first one in the corpus counts",
    "duplicate_text": "another document has the same text",
    "empty_after_cleaning": "nothing but white space was left of the text",
    "empty_id": "the id is empty",
    "empty_text": "the text is empty",
    "invalid_utf8": "the bytes are not UTF-8",
    "no_tokens": "the tokenizer knows none of the characters",
    "null_id": "the id is null",
    "null_text": "the text is null",
    "too_large": "larger than the limit",
    "too_long": "more characters than clean.max_chars",
    "too_short": "fewer characters than clean.min_chars",
    "wrong_type": "a column is of a type that cannot be used",
}


def chart(svg: str, hint: str) -> str:
    """A chart with the sentence that says what to look for."""
    return f'<div class="chart">{svg}</div><p class="hint">{hint}</p>'


def timeline_section(facts: Facts) -> str:
    """When each stage ran."""
    run = facts["run"]
    if run is None:
        return _durations(facts)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for stage in run["stages"]:
        by_name.setdefault(stage["name"], []).append(stage)
    rows = []
    first_encode = run["pieces"]["encode_begin_s"]
    for name, stages in by_name.items():
        spans = []
        for stage in stages:
            begin, end = stage["begin_s"], stage["begin_s"] + stage["seconds"]
            if name == "encode pieces" and first_encode is not None and begin < first_encode < end:
                spans.append((begin, first_encode, "pale"))
                begin = first_encode
            spans.append((begin, end, "bad" if stage["failed"] else "c0"))
        rows.append(Row(name, spans, span(sum(stage["seconds"] for stage in stages))))
    svg = timeline(rows, run["seconds"])
    longest = max(by_name, key=lambda name: sum(stage["seconds"] for stage in by_name[name]))
    took = sum(stage["seconds"] for stage in by_name[longest])
    pale = " The pale part is the encoders' start: loading the model." if first_encode is not None else ""
    hint = (
        f"The longest bar is where a faster run begins: {esc(longest)}, {share(took / max(run['seconds'], 1e-9))} of the time.{pale}"
        " Gaps are work of the driver between stages."
    )
    return f"<section><h2>Timeline</h2>{chart(svg, hint)}</section>"


def _durations(facts: Facts) -> str:
    """Without telemetry the manifest still says how long stages took, not when."""
    seconds = facts["seconds"]
    if not seconds:
        return ""
    longest = max(seconds.values())
    rows = [
        (name, took / max(longest, 1e-9), span(took))
        for name, took in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    return f"<section><h2>Stages</h2>{chart(shares(rows), 'How long each stage took, the longest first.')}</section>"


def throughput_section(facts: Facts) -> str:
    """Tokens per second, busy encoders and waiting pieces over the run."""
    run = facts["run"]
    if run is None or not run["series"]["tokens_per_s"] or not run["pieces"]["encoded"]:
        return ""
    series, end = run["series"], run["seconds"]
    begin, step = series["begin_s"], series["step_s"]
    pieces = run["pieces"]
    mean = pieces["tokens"] / max(pieces["encode_seconds"], 1e-9)
    if len(series["tokens_per_s"]) < LEAST_STEPS:
        said = f"The encoders worked for {span(pieces['encode_seconds'])}, too short for a curve: {count(mean)} tokens/s in the mean."
        return f"<section><h2>Throughput</h2><p>{said}</p></section>"
    parts = [
        f"<h3>Tokens per second (mean {count(mean)})</h3>",
        f'<div class="chart">{over_time(begin, step, series["tokens_per_s"], end, "tokens per second", "", 0)}</div>',
        "<h3>Share of the encoders' time in which they encode</h3>",
        f'<div class="chart">{over_time(begin, step, series["busy_share"], end, "busy share", "%", 1.0)}</div>',
        "<h3>Pieces waiting for an encoder</h3>",
        chart(
            over_time(begin, step, series["queue"], end, "pieces waiting", "", 0 if any(series["queue"]) else 1.0),
            "Level is good. Where throughput drops while pieces wait, the encoders are what limits (long texts, a slow worker);"
            " where it drops and none wait, reading and tokenizing fell behind.",
        ),
    ]
    return f"<section><h2>Throughput</h2>{''.join(parts)}</section>"


def encoders_section(facts: Facts) -> str:
    """How busy each worker of the pool was."""
    run = facts["run"]
    if run is None or not run["pieces"]["workers"]:
        return ""
    pieces = run["pieces"]
    workers = pieces["workers"]
    shown = workers if len(workers) <= SHOWN_WORKERS else workers[: SHOWN_WORKERS // 2] + workers[-SHOWN_WORKERS // 2 :]
    rows = [(each["worker"], each["busy_share"] or 0.0, _worker_text(each)) for each in shown]
    some = (
        f" Of {len(workers)} the {len(shown) // 2} busiest and the {len(shown) // 2} least busy."
        if shown is not workers
        else ""
    )
    unseen = pieces["encoders"] - len(workers)
    idle = f" {unseen} more never got a piece." if unseen > 0 else ""
    work = sum(each["seconds"] for each in pieces["stages"].values())
    rest = ", ".join(
        f"{name} {share(each['seconds'] / max(work, 1e-9))}"
        for name, each in pieces["stages"].items()
        if name != "encode"
    )
    hint = (
        f"Equal bars near 100% are good; one short bar is a slow or late worker.{some}{idle} Of all work on pieces,"
        f" encoding was {share(pieces['stages']['encode']['seconds'] / max(work, 1e-9))} ({rest})."
    )
    return f"<section><h2>Encoders</h2>{chart(shares(rows), hint)}</section>"


def _worker_text(worker: dict[str, Any]) -> str:
    rate = count(worker["tokens"] / max(worker["busy_s"], 1e-9))
    said = f"{share(worker['busy_share'] or 0.0)}, {plural(worker['pieces'], 'piece')}, {rate} tokens/s"
    return said + (f", GPU {share(worker['gpu_utilisation'])}" if "gpu_utilisation" in worker else "")


def rows_section(facts: Facts) -> str:
    """What became of every row: read = indexed + rejected + dropped."""
    rows = facts["rows"]
    rejected, dropped = sum(rows["rejected"].values()), sum(rows["dropped"].values())
    bar = stacked([("indexed", rows["indexed"], "c0"), ("rejected", rejected, "bad"), ("dropped", dropped, "c1")])
    key = (
        f'<div class="key"><span><i class="c0"></i>indexed {count(rows["indexed"])}</span>'
        f'<span><i class="bad"></i>rejected {count(rejected)}</span><span><i class="c1"></i>dropped {count(dropped)}</span></div>'
    )
    sum_of = f"{rows['read']:,} read = {rows['indexed']:,} indexed + {rejected:,} rejected + {dropped:,} dropped"
    holds = (
        f"<p>{sum_of}: every row is accounted for.</p>"
        if rows["reconciles"]
        else f'<p class="warn wrong">{sum_of} does not hold: run <code>vectormill verify</code>.</p>'
    )
    lines = [
        [outcome, esc(reason), esc(REASONS.get(reason, "")), f"{number:,}", share(number / max(1, rows["read"]))]
        for outcome in ("rejected", "dropped")
        for reason, number in sorted(rows[outcome].items(), key=lambda item: -item[1])
    ]
    reasons = table(["Outcome", "Reason", "Meaning", "Rows", "Share"], lines, numbers=(3, 4)) if lines else ""
    hint = "Rejected rows are bad input, dropped ones were left out by rule. A reason that is new since the last version deserves a look."
    return f"<section><h2>Rows</h2>{holds}{chart(bar + key, hint)}{reasons}</section>"


def tokens_section(facts: Facts) -> str:
    """How long the encoded sequences are."""
    run = facts["run"]
    counts = {int(low): number for low, number in run["token_lengths"]["counts"].items()} if run else {}
    if not counts:
        return ""
    width = run["token_lengths"]["bin"]
    last = max(counts) + width
    while last / width > SHOWN_BINS:
        width *= 2
    merged: dict[int, int] = {}
    for low, number in counts.items():
        merged[low // width] = merged.get(low // width, 0) + number
    total = sum(counts.values())
    bars = []
    for place in range(max(LEAST_BINS, max(merged) + 1)):
        low, number = place * width, merged.get(place, 0)
        bars.append(Bar(low, low + width, number, f"{low} to {low + width - 1} tokens: {number:,} sequences"))
    half, seen = 0, 0
    for low in sorted(counts):
        seen += counts[low]
        if seen * 2 >= total:
            half = low
            break
    svg = histogram(bars, "tokens of a sequence", "sequences", [(half + run["token_lengths"]["bin"] / 2, "median")])
    over = facts["model"].get("over_length")
    of_all = "" if facts["kind"] == "build" else " of the whole index"
    longer = f" {plural(over, 'document')}{of_all} did not fit in one." if over else ""
    cut = facts["model"].get("truncated_tokens")
    lost = f" {count(cut)} tokens were cut off (chunk.mode truncate)." if cut else ""
    hint = (
        f"What the encoder computes on: {count(total)} sequences, half of them of at most about"
        f" {half + run['token_lengths']['bin']} tokens. A peak at the right end means texts that fill the model.{longer}{lost}"
    )
    return f"<section><h2>Token lengths</h2>{chart(svg, hint)}</section>"
