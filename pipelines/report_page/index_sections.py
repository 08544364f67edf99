"""Sections about the index: recall, inverted lists, segments, and the versions before and after."""

from __future__ import annotations

from typing import Any

from pipelines.report_page.charts import Bar, Curve, curves, histogram, ranges
from pipelines.report_page.run_sections import chart
from pipelines.report_page.text import count, esc, plural, share, size, table

Facts = dict[str, Any]
SHOWN_VERSIONS = 20
SHOWN_SEGMENTS = 20
COLOURS = 6
EVEN = 1.5  # imbalance of lists up to which nothing is to be done; k-means on real embeddings gives 1.1 to 1.5


def recall_section(facts: Facts) -> str:
    """Recall by nprobe, and what it costs in latency where that was measured."""
    quality, points = facts["quality"], facts.get("operating_points")
    inherited = points is not None and points["version"] != facts["version"]
    # What an earlier version reached is no point of this one's curve.
    measured = [*quality.get("curve", []), *((points or {}).get("curve", []) if not inherited else [])]
    by_refine: dict[int, dict[int, float]] = {}
    for point in measured:
        by_refine.setdefault(point["refine_factor"], {})[point["nprobe"]] = point["recall@10"]
    lines = [
        Curve(f"refine factor {refine}", sorted(found.items()), place % COLOURS)
        for place, (refine, found) in enumerate(sorted(by_refine.items()))
    ]
    parts = []
    if max((len(line.points) for line in lines), default=0) > 1:
        chosen = (float(quality["nprobe"]), float(quality["recall@10"]), f"default: nprobe {quality['nprobe']}")
        key = "".join(f'<span><i class="c{line.colour}"></i>{esc(line.name)}</span>' for line in lines)
        hint = (
            "More lists searched (nprobe) find more and cost more. Past the bend more lists gain little; a curve that flattens"
            " below 1 is limited by the codes: a higher refine factor or M lifts it."
        )
        svg = curves(lines, "nprobe, inverted lists searched", "recall@10", chosen)
        parts.append(chart(f'{svg}<div class="key">{key}</div>', hint))
    else:
        parts.append(
            '<p class="hint">Recall was measured at one nprobe only: a version that keeps its parent\'s quantizer keeps its'
            f" nprobe, {quality['nprobe']}. The report of the version that trained the quantizer has the curve.</p>"
        )
    if points and points["points"]:
        rows = [
            [
                f"{p['recall']:.2f}",
                str(p["nprobe"]),
                str(p["refine_factor"]),
                f"{p['recall@10']:.4f}",
                f"{p['p50_ms']:.2f}",
                f"{p['p99_ms']:.2f}",
            ]
            for p in points["points"]
        ]
        head = ["Recall wanted", "nprobe", "Refine factor", "Recall measured", "p50, ms", "p99, ms"]
        slowest = max(p["p99_ms"] for p in points["points"])
        bars = [
            (f"recall {p['recall']:.2f}", p["p50_ms"] / slowest, p["p99_ms"] / slowest, f"{p['p50_ms']:.2f} ms, p99 {p['p99_ms']:.2f} ms")
            for p in points["points"]
        ]  # fmt: skip
        parts.append("<h3>Operating points: what a recall costs</h3>")
        if inherited:
            parts.append(
                f'<p class="hint">Measured on {esc(points["version"])}, which has the same quantizer, and inherited from it:'
                f" <code>vectormill eval {esc(facts['root'])}</code> measures this version.</p>"
            )
        parts.append(f'<div class="chart">{ranges(bars)}</div>{table(head, rows, numbers=range(6))}')
        parts.append(
            f'<p class="hint">Full colour up to the median, faint up to the 99th percentile. Latency of single vector queries with {points["threads"]} thread(s) of the machine that measured,'
            f" {esc(points['measured_at'])}, k {points['k']}, encoding of text not included.</p>"
        )
    else:
        parts.append(
            f'<p class="hint">No latencies were measured for this version: <code>vectormill eval {esc(facts["root"])} --version {esc(facts["version"])}</code> does that.</p>'
        )
    asked = f"Target {quality['target_recall']:g}, " if "target_recall" in quality else ""
    said = f"<p>{asked}reached {quality['recall@10']:.4f} on {count(quality.get('queries', 0))} queries drawn from the corpus, against exact search.</p>"
    return f"<section><h2>Recall</h2>{said}{''.join(parts)}</section>"


def lists_section(facts: Facts) -> str:
    """How entries spread over the inverted lists."""
    lists = facts["lists"]
    found = lists["histogram"]
    step = found["step"]
    bars = [
        Bar(number * step, (number + 1) * step, value, f"{number * step} to {(number + 1) * step - 1} entries: {value:,} lists")
        for number, value in enumerate(found["counts"])
    ]  # fmt: skip
    svg = histogram(bars, "entries of a list", "lists", [(lists["mean"], f"mean {count(lists['mean'])}")])
    beyond = ""
    if found["beyond"]:
        beyond = f" {plural(found['beyond'], 'longer list')}, up to that, {'is' if found['beyond'] == 1 else 'are'} not drawn."
    verdict = (
        "even enough"
        if lists["imbalance"] <= EVEN
        else "uneven: some searches take much longer than others, retraining may help"
    )
    hint = (
        f"A narrow hump is good: searches then cost the same. Imbalance {lists['imbalance']:.2f} (1 is perfectly even): {verdict}."
        f" {count(lists['empty'])} of {count(lists['num_lists'])} lists are empty; the longest has {count(lists['largest'])} entries.{beyond}"
    )
    return f"<section><h2>Inverted lists</h2>{chart(svg, hint)}</section>"


def segments_section(facts: Facts) -> str:
    """Base and deltas, and what their bytes are."""
    segments = facts["segments"]
    roles = sorted({role for segment in segments for role in segment["bytes"]})
    shown = segments if len(segments) <= SHOWN_SEGMENTS else [segments[0], *segments[-SHOWN_SEGMENTS + 1 :]]
    rows = [
        [
            "delta" if segment is not segments[0] else "base",
            f"<code>{esc(segment['name'])}</code>",
            f"{segment['num_rows']:,}",
            f"{segment['num_deleted']:,}",
            f"{segment['parts']:,}",
            *(size(segment["bytes"].get(role, 0)) for role in roles),
            size(segment["size_bytes"]),
        ]
        for segment in shown
    ]
    names = {"lists": "Codes", "rows": "Text, ids", "vectors": "Vectors"}
    head = ["", "Segment", "Rows", "Deleted", "Parts", *(names.get(role, esc(role)) for role in roles), "Bytes"]
    more = (
        f"<p>{len(segments) - len(shown)} deltas between these are not listed.</p>"
        if len(shown) < len(segments)
        else ""
    )
    hint = (
        f"Deleted rows ({share(facts['deleted_share'])} of all) are skipped by searches and take room until <code>vectormill compact</code>;"
        " each delta costs every query a little."
    )
    return f'<section><h2>Segments</h2>{table(head, rows, numbers=range(2, len(head)))}{more}<p class="hint">{hint}</p></section>'


def history_section(facts: Facts) -> str:
    """The versions that the root holds."""
    versions = facts["history"]
    if not versions:
        return ""
    rows = []
    for held in versions[-SHOWN_VERSIONS:][::-1]:
        if held["kind"] is None:
            rows.append([esc(held["version"]), *[""] * 7, "damaged"])
            continue
        changed = (held["changes"] or {}).get("documents", {})
        said = ", ".join(
            f"{changed[what]:,} {what}" for what in ("added", "edited", "deleted", "revived") if changed.get(what)
        )
        state = [held["state"]] if held["state"] != "whole" else []
        state += ["published"] if held["current"] else []
        state += ["this report"] if held["version"] == facts["version"] else []
        rows.append(
            [
                f"<b>{esc(held['version'])}</b>" if held["version"] == facts["version"] else esc(held["version"]),
                esc(held["kind"]),
                esc(held["created_at"]),
                f"{held['num_docs']:,}",
                f"{held['ntotal']:,}",
                f"{held['recall@10']:.4f}",
                size(held["bytes"]["own"] + held["bytes"]["shared"]),
                said,
                ", ".join(state),
            ]
        )
    head = ["Version", "Kind", "Made", "Documents", "Vectors", "recall@10", "Bytes", "Changes", ""]
    hint = "Newest first. Recall that falls from version to version says that the corpus moves away from its quantizer: <code>vectormill drift</code>."
    return f'<section><h2>Versions</h2>{table(head, rows, numbers=(3, 4, 5, 6))}<p class="hint">{hint}</p></section>'
