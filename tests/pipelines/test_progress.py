"""Progress of a run: the same numbers as bars, lines and JSON, and that they are the manifest's."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster.parcels import PieceResult
from cluster.telemetry import Span, now
from operators.artifact.manifest import open_current
from operators.errors import ConfigError
from operators.sources.listing import SourceObject
from operators.sources.pieces import Piece
from operators.storage.store import open_store
from operators.storage.traffic import Traffic
from pipelines.telemetry import progress, progress_views
from pipelines.telemetry.piece_flow import PieceFlow, source_bytes
from pipelines.telemetry.progress import RunProgress
from pipelines.telemetry.progress_views import BarsView, JsonView, duration
from pipelines.telemetry.run_record import read_run_record
from pipelines.telemetry.time_bins import MAX_BINS, TimeBins
from tests.pipelines.build_corpus import build_arguments, run_cli

EVENTS = {"begin", "stage_begin", "progress", "stage_end", "message", "published", "end"}


def write_corpus_with_bad_rows(path: Path) -> None:
    lines = [json.dumps({"id": f"d{number}", "text": f"the wing of plane {number}"}) for number in range(40)]
    lines += [json.dumps({"id": f"e{number}", "text": ""}) for number in range(2)]
    path.write_text("\n".join([*lines, json.dumps({"id": "d0", "text": "the same id again"})]) + "\n")


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines_of_a_build_reconcile_with_the_manifest_and_with_its_stored_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus_with_bad_rows(tmp_path / "docs.jsonl")
    monkeypatch.setenv(progress.VARIABLE, "json")
    root = str(tmp_path / "root")
    given = [f"encode.model={tiny_model}", "encode.precision=float32", "chunk.overlap_tokens=8", "index.nlist=4"]
    given += ["read.max_reject_fraction=1", "read.piece_bytes=400"]
    done = run_cli(*build_arguments([str(tmp_path / "docs.jsonl")], root, *given))
    assert done.returncode == 0, done.stderr
    events = events_of(done.stderr)
    assert {event["event"] for event in events} <= EVENTS
    assert [events[0]["event"], events[-1]["event"]] == ["begin", "end"]
    assert all(earlier["at"] <= later["at"] for earlier, later in pairwise(events))
    begun = [event["stage"] for event in events if event["event"] == "stage_begin"]
    assert begun == [event["stage"] for event in events if event["event"] == "stage_end"]

    manifest = open_current(open_store(root))
    (published,) = [event for event in events if event["event"] == "published"]
    assert (published["version"], published["rows"]) == (manifest.version, manifest.rows)
    (encoded,) = [e for e in events if e["event"] == "stage_end" and e["stage"] == "encode pieces"]
    assert encoded["rows_read"] == manifest.rows["read"] == 43
    assert encoded["rejected"] == manifest.rows["rejected"]["empty_text"] == 2
    # The duplicate is found when rows are numbered, after the stream.
    assert encoded["documents"] == manifest.rows["indexed"] + 1
    assert encoded["source_bytes"] == encoded["source_bytes_total"] == manifest.sources["size_bytes"]
    assert encoded["done"] == encoded["total"] > 3
    assert 0 < encoded["busy_share"] <= 1

    run = read_run_record(open_store(root), manifest.version)
    assert run is not None
    pieces = run["pieces"]
    assert {name: pieces[name] for name in ("rows_read", "documents", "tokens")} == {
        name: encoded[name] for name in ("rows_read", "documents", "tokens")
    }
    assert sum(run["token_lengths"]["counts"].values()) == pieces["chunks"]
    assert pieces["rejected"] == {"empty_text": 2}
    assert [stage["name"] for stage in run["stages"]] == begun
    assert pieces["stages"]["read"]["bytes_read"] >= manifest.sources["size_bytes"]
    assert pieces["stages"]["commit"]["bytes_written"] > 0


def test_an_unknown_style_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"one of auto, bars, lines, json, got 'dots' \(--progress\)"):
        RunProgress(style="dots")
    monkeypatch.setenv(progress.VARIABLE, "dots")
    with pytest.raises(ConfigError, match=r"got 'dots' \(VECTORMILL_PROGRESS\)"):
        RunProgress()


def test_a_line_a_stage_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = RunProgress()
    with shown:
        shown.stage("list sources")
        shown.say("a [message]")
        shown.stage("encode", total=3, done=1)
        shown.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert lines == ["a [message]", "list sources 0.0 s", "encode failed after 0.0 s 1 resumed"]


def facts_of_an_encoding_stage(**more: Any) -> dict[str, Any]:
    rates = {"rows_per_s": 12_345.6, "tokens_per_s": 1_234_567.8, "busy_share": 0.974, "queue": 12.3}
    counted = {"done": 98_765, "total": 123_456, "resumed": 45_678, "seconds": 12_345.0}
    return {**counted, **rates, "retries": 12, "rejected": 345, "eta_s": 7_384.0, **more}


def test_bars_of_large_numbers_fit_80_columns() -> None:
    file = io.StringIO()
    view = BarsView(file)
    view._console.width = 80
    view._console._force_terminal = True
    view.start()
    view.begin("train quantizer", {"done": 0, "total": 1, "seconds": 0.0})
    view.end("train quantizer", {"done": 1, "total": 1, "seconds": 1.0}, False)
    view.begin("encode pieces", facts_of_an_encoding_stage())
    view.update("encode pieces", facts_of_an_encoding_stage())
    lines = [segment.rstrip() for segment in _plain(view)]
    view.stop(1.0, False)
    assert len(lines) == 3
    assert "98,765/123,456" in lines[1] and "eta 2:03:04" in lines[1]
    assert lines[2].strip().startswith("12,346 rows/s  1,234,568 tokens/s  encoders 97% busy  12.3 waiting")
    assert all(len(line) <= 80 for line in lines), lines


def _plain(view: BarsView) -> list[str]:
    """What the display shows now, without colours."""
    from rich.console import Console, Group

    console = Console(file=io.StringIO(), width=80)
    console.print(Group(*view._display.get_renderables()))
    shown = console.file
    assert isinstance(shown, io.StringIO)
    return shown.getvalue().splitlines()


def test_json_progress_is_told_when_it_changes_and_every_ten_seconds_when_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress_views.time, "monotonic", lambda: clock[0])
    file = io.StringIO()
    view = JsonView(file)
    view.begin("x", {"done": 0, "total": 5, "resumed": 0})
    for seconds, done in ((1, 0), (2, 1), (3, 1), (11, 1), (13, 1), (14, 2)):
        clock[0] = 100.0 + seconds
        view.update("x", {"done": done, "total": 5, "resumed": 0, "eta_s": None})
    assert [(e["done"], e["eta_s"]) for e in events_of(file.getvalue())[1:]] == [(1, None), (1, None), (2, None)]


def test_durations_read_well() -> None:
    assert [duration(s) for s in (0, 65, 3599, 3600, 7384, 200_000)] == [
        "0:00",
        "1:05",
        "59:59",
        "1:00:00",
        "2:03:04",
        "2d 07h",
    ]


def piece(number: int, start: int = 0, end: int = 100, kind: Any = "byte_range") -> Piece:
    obj = SourceObject(f"/docs/{number}", f"{number}", "etag", 1000, "jsonl")
    return Piece((obj,), kind, start, end)


def encoded(one: Piece, begin: float, seconds: float, worker: str = "h:1", wait: float = 0.0) -> PieceResult:
    spans = [
        Span("read", "h:9", begin - wait - 0.2, 0.1, Traffic(100, 0, 1, 0)),
        Span("chunk", "h:9", begin - wait - 0.1, 0.1),
        Span("encode", worker, begin, seconds),
        Span("commit", "h:9", begin + seconds, 0.1, Traffic(0, 50, 2, 1)),
    ]
    facts = {"num_rows_read": 10, "num_docs": 9, "num_chunks": 9, "num_tokens": 1000}
    return PieceResult(one, {**facts, "rejected": {"null_text": 1}, "dropped": {}}, None, spans)


def test_the_eta_goes_by_bytes_and_leaves_resumed_work_out(monkeypatch: pytest.MonkeyPatch) -> None:
    began = now()
    flow = PieceFlow(began)
    small, large = [piece(n) for n in range(6)], [piece(n, 0, 700) for n in range(6, 8)]
    flow.expect([*small, *large], [*small[2:], *large], 1, False)
    assert (flow.resumed, flow.bytes_resumed) == (2, 200)
    clock = [began]
    monkeypatch.setattr("pipelines.telemetry.piece_flow.now", lambda: clock[0])
    for number, one in enumerate(small[2:]):  # a piece of 100 bytes a second
        clock[0] = began + number + 1
        flow.add(encoded(one, began + number, 1.0))
    live = flow.live()
    assert live["eta_s"] == pytest.approx(14.0, rel=0.01)  # 1,400 bytes are left
    assert live["rows_per_s"] == pytest.approx(10.0, rel=0.01)
    assert live["tokens_per_s"] == pytest.approx(1000.0, rel=0.01)
    assert live["busy_share"] == pytest.approx(1.0, rel=0.01)
    assert live["retries"] == 4 and live["bytes_read"] == 400 and live["rejected"] == 4


def test_busy_share_and_queue_are_those_of_a_simulated_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two encoders, one busy all the time and one a half of it; every piece waits for 3 s."""
    began = now()
    clock = [began + 60.0]
    monkeypatch.setattr("pipelines.telemetry.piece_flow.now", lambda: clock[0])
    flow = PieceFlow(began)
    pieces = [piece(n) for n in range(60)]
    flow.expect(pieces, pieces, 2, False)
    results = [encoded(pieces[n], began + 10 + n, 1.0, "h:1", 3.0) for n in range(40)]
    results += [encoded(pieces[40 + n], began + 10 + 2 * n, 1.0, "h:2", 3.0) for n in range(20)]
    random.Random(0).shuffle(results)
    for result in results:
        flow.add(result)
    found = flow.to_json(began)
    assert [w["busy_share"] for w in found["workers"]] == pytest.approx([1.0, 0.5], abs=0.02)
    assert found["busy_share"] == pytest.approx(0.75, abs=0.02)
    series = flow.series(began)
    assert series["begin_s"] == pytest.approx(7.0)
    assert sum(series["queue"]) * series["step_s"] == pytest.approx(180.0)  # 60 pieces, 3 s each
    middle = slice(8, 40)
    assert sum(series["busy_share"][middle]) / 32 == pytest.approx(0.75, abs=0.02)
    assert sum(series["tokens_per_s"]) * series["step_s"] == pytest.approx(60_000, rel=0.01)


def test_pieces_share_the_bytes_of_their_object() -> None:
    groups = [piece(1, n, n + 1, "row_groups") for n in range(4)]
    assert list(source_bytes([*groups, piece(2, 100, 350)]).values()) == [250, 250, 250, 250, 250]


def test_a_series_keeps_its_sums_in_at_most_500_steps_however_long_and_unordered() -> None:
    random_of = random.Random(1)
    bins = TimeBins(("a", "b"), 1000.0)
    spans = [(1000.0 + random_of.uniform(0, 90_000), random_of.uniform(0, 200)) for _ in range(2000)]
    for begin, seconds in spans:
        bins.spread(begin, begin + seconds, a=2.0, b=seconds)
    assert len(bins.columns["a"]) == len(bins.columns["b"]) <= MAX_BINS
    assert sum(bins.columns["a"]) == pytest.approx(4000.0)
    assert sum(bins.columns["b"]) == pytest.approx(sum(seconds for _, seconds in spans))
    bins.spread(5.0, 6.0, a=1.0, b=1.0)  # a clock that is wrong: counted at the beginning
    assert sum(bins.columns["a"]) == pytest.approx(4001.0)


def test_commands_that_show_progress_load_no_torch_for_it() -> None:
    script = "import sys; import pipelines.telemetry.progress; sys.exit(', '.join({'torch', 'ray', 'faiss'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.stderr.strip() == ""
