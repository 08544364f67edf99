"""The report: its numbers are the manifest's and the run's, its page is one safe file, and it does without what is not there."""

from __future__ import annotations

import html.parser
import json
import math
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from operators.artifact.index import Index
from operators.errors import IndexNotFoundError, IntegrityError
from operators.storage.store import open_store
from pipelines import cli, gate
from pipelines.compact import compact
from pipelines.garbage import collect_garbage
from pipelines.info import info
from pipelines.operating_points import measure_operating_points, operating_points_key
from pipelines.report import report, write_report
from pipelines.report_page.page import page
from pipelines.report_page.text import count, esc, share, size, span, ticks
from pipelines.telemetry.run_record import read_run_record, run_record_key
from tests.pipelines.build_corpus import run_cli
from tests.pipelines.nightly_site import HERE, UNITS, A, Site, configured


@pytest.fixture(scope="module")
def built(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A published index. Not to be changed."""
    made = Site(tmp_path_factory.mktemp("report"), tiny_model)
    made.put_three()
    made.build()
    return made


@pytest.fixture
def site(built: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A copy of it, to be changed."""
    monkeypatch.setattr(gate, "MAX_RECALL_LOSS", 1.0)  # so few documents lose more by chance
    return built.copied(tmp_path / "root")


class Outline(html.parser.HTMLParser):
    """Checks that elements nest, and keeps their names, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def headings(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


def check_page(text: str) -> Outline:
    """One well-formed file that loads nothing, runs nothing and draws nothing outside of its charts."""
    outline = Outline(text)
    names = {tag for tag, _ in outline.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "use", "image", "a", "form"}
    for _, attributes in outline.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "src", "xlink:href")]
    assert "://" not in text and "url(" not in text and "@import" not in text
    numbers = [
        float(value)
        for tag, attributes in outline.tags
        if tag in ("rect", "circle", "line", "text")
        for name, value in attributes.items()
        if name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "width", "height") and value is not None
    ]
    assert all(math.isfinite(number) and -20 <= number <= 1000 for number in numbers)
    assert "nan" not in text.lower().replace("nano", "") and ">None<" not in text
    return outline


def test_a_build_is_told_in_full(site: Site, tmp_path: Path) -> None:
    facts = report(site.root)
    manifest = site.current
    run = facts["run"]
    assert run["version"] == facts["version"] == manifest.version
    assert run["pieces"]["rows_read"] == facts["rows"]["read"] == 24
    assert facts["rows"]["reconciles"]
    assert sum(run["token_lengths"]["counts"].values()) == manifest.ntotal
    assert facts["lists"]["entries"] == manifest.ntotal
    assert sum(facts["lists"]["histogram"]["counts"]) + facts["lists"]["histogram"]["beyond"] == manifest.nlist
    assert facts["quality"]["curve"][-1]["recall@10"] <= 1
    path = tmp_path / "report.html"
    assert write_report(facts, str(path)) == path.stat().st_size
    text = path.read_text()
    outline = check_page(text)
    sections = ["Timeline", "Throughput", "Encoders", "Rows", "Recall", "Inverted lists", "Token lengths", "Segments"]
    assert headings(text) == [*sections, "Made with", "Versions"]
    assert "24 read = 24 indexed + 0 rejected + 0 dropped: every row is accounted for." in outline.words
    assert json.loads(json.dumps(facts, allow_nan=False)) == json.loads(json.dumps(facts))


def test_updates_compactions_and_versions_without_telemetry_are_told_too(site: Site) -> None:
    site.change()
    site.update()
    updated = report(site.root)
    assert (updated["kind"], updated["run"]["kind"]) == ("update", "update")
    assert updated["run"]["pieces"]["documents"] == 7
    assert [segment["num_rows"] for segment in updated["segments"]] == [24, 7]
    check_page(page(updated))
    compact(site.root, configured)
    compacted = report(site.root)
    assert compacted["run"]["pieces"]["encoded"] == 0
    text = page(compacted)
    check_page(text)
    assert "Throughput" not in headings(text) and "Timeline" in headings(text)
    assert "40 added" not in text

    store = open_store(site.root)
    store.delete(run_record_key(site.current.version))
    bare = report(site.root)
    assert bare["run"] is None
    text = page(bare)
    check_page(text)
    assert "There is no telemetry beside this version" in text
    assert "Stages" in headings(text)
    # Everything else works without it.
    assert info(site.root)["version"] == bare["version"]
    assert site.live()
    assert [held["kind"] for held in bare["history"]] == ["build", "update", "compact"]
    first = report(site.root, "v000001")
    assert first["run"]["kind"] == "build"
    # gc takes a version's telemetry with it.
    collect_garbage(site.root, 1, 0.0, delete=True)
    assert read_run_record(store, "v000001") is None


def test_a_damaged_run_record_is_named(site: Site) -> None:
    store = open_store(site.root)
    key = run_record_key(site.current.version)
    store.put(key, store.read(key).replace(b"build", b"guild"))
    with pytest.raises(IntegrityError, match=r"versions/v000001/run\.json is damaged"):
        report(site.root)


def test_what_a_killed_attempt_committed_is_told_as_resumed(tmp_path: Path, tiny_model: Path) -> None:
    site = Site(tmp_path, tiny_model)
    site.put("a.jsonl", A)
    given = [argument for setting in (*UNITS, *HERE, f"encode.model={tiny_model}") for argument in ("--set", setting)]
    killed = run_cli("build", str(site.docs), "--out", site.root, *given, crash_at="publish.before:1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # The attempt left its record beside a manifest that was never published.
    store = open_store(site.root)
    assert store.list_keys("versions") == ["versions/v000001/manifest.json", run_record_key("v000001")]
    site.build()
    assert store.list_keys("versions") == ["versions/v000002/manifest.json", run_record_key("v000002")]
    facts = report(site.root)
    pieces = facts["run"]["pieces"]
    assert facts["run"]["resumed"]
    assert pieces["encoded"] == 0 and pieces["resumed"] == pieces["total"] > 2
    # Known from the commit records of earlier attempts.
    assert sum(facts["run"]["token_lengths"]["counts"].values()) == facts["ntotal"]
    text = page(facts)
    check_page(text)
    assert "The run was interrupted and resumed" in text


def test_text_of_data_stays_text(site: Site) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    facts = report(site.root)
    facts["root"] = facts["sources"]["arguments"][0] = facts["model"]["name"] = evil
    facts["created_at"] = facts["parent"] = evil
    facts["rows"]["rejected"] = {evil: 3}
    for worker in facts["run"]["pieces"]["workers"]:
        worker["worker"] = evil
    for stage in facts["run"]["stages"]:
        stage["name"] = evil
    for segment in facts["segments"]:
        segment["name"] = evil
    for held in facts["history"]:
        held["version"] = held["created_at"] = evil
    text = page(facts)
    check_page(text)
    assert "<script" not in text and "<img" not in text
    assert text.count(esc(evil)) > 8


def test_operating_points_are_told_with_their_latencies(site: Site) -> None:
    measure_operating_points(site.root, (0.5, 0.9))
    text = page(report(site.root))
    check_page(text)
    assert "Operating points: what a recall costs" in text
    assert open_store(site.root).size_bytes(operating_points_key(site.current.version))


def test_many_workers_long_series_and_rows_that_do_not_add_up_still_make_a_page(site: Site) -> None:
    facts = report(site.root)
    run = facts["run"]
    pieces = run["pieces"]
    pieces["workers"] = [
        {"worker": f"node-{n}:1", "pieces": 10, "tokens": 5_000_000, "busy_s": 90.0, "busy_share": 0.9 - n / 1000}
        | {"gpu_utilisation": 0.8, "gpu_memory_bytes": 1 << 33}
        for n in range(500)
    ]
    pieces["encoders"] = 512
    steps = 500
    run["seconds"] = 180_000.0
    run["series"] = {
        "begin_s": 60.0,
        "step_s": 256.0,
        "rows_per_s": [1e5] * steps,
        "tokens_per_s": [1e7 + n for n in range(steps)],
        "busy_share": [0.5] * steps,
        "queue": [40.0] * steps,
    }
    facts["rows"] = {
        "read": 10**9,
        "indexed": 10**9 - 5,
        "rejected": {"null_text": 4},
        "dropped": {},
        "reconciles": False,
    }
    text = page(facts)
    check_page(text)
    assert "does not hold" in text
    assert "Of 500 the 12 busiest and the 12 least busy." in text
    assert "12 more never got a piece" in text
    assert len(text) < 300_000


def test_the_command_writes_a_page_or_prints_the_facts(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report", site.root]) == 0
    assert "open it in a browser" in capsys.readouterr().out
    check_page((tmp_path / "report.html").read_text())
    assert cli.run(["report", site.root, "--json", "--version", "v000001"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["version"] == "v000001"
    assert cli.run(["report", site.root, "--out", "no/folder/x.html"]) == 2
    assert "the folder of the report must exist" in capsys.readouterr().err
    assert cli.run(["report", str(tmp_path / "nowhere")]) == IndexNotFoundError.exit_code


def test_list_sizes_are_those_of_the_index(site: Site) -> None:
    index = Index(open_store(site.root), site.current)
    sizes_L = np.concatenate([part.list_sizes_L for part in index.parts])
    lists = report(site.root)["lists"]
    assert (lists["num_lists"], lists["largest"], lists["empty"]) == (len(sizes_L), sizes_L.max(), (sizes_L == 0).sum())
    assert lists["imbalance"] == pytest.approx(len(sizes_L) * (sizes_L**2).sum() / sizes_L.sum() ** 2)


def test_numbers_read_well() -> None:
    assert [count(v) for v in (0, 0.25, 3, 12.34, 1234, 5_000_000, 2e9)] == [
        "0",
        "0.25",
        "3",
        "12.3",
        "1,234",
        "5.00 M",
        "2.00 G",
    ]
    assert [span(s) for s in (0.031, 8.23, 99.96, 185, 7620, 200_000)] == [
        "0.03 s",
        "8.2 s",
        "1 min 40 s",
        "3 min 05 s",
        "2 h 07 min",
        "2 d 07 h",
    ]
    assert [size(b) for b in (12, 5200, 5.2e12)] == ["12 bytes", "5.2 kB", "5.2 TB"]
    assert [share(v) for v in (0, 0.003, 0.97)] == ["0%", "0.3%", "97%"]
    assert ticks(87) == [0, 20, 40, 60, 80, 100]
    assert ticks(1, 4, whole=True) == [0, 1]
