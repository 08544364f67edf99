"""Help, wrong usage and files of queries: what the command line says before any work. Nothing here starts Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.errors import ConfigError
from pipelines import cli
from pipelines.commands.index_output import show_results, show_verification
from pipelines.commands.output import bytes_text, rows_text
from pipelines.search import Query, read_queries, write_results

COMMANDS = (
    "build",
    "search",
    "eval",
    "info",
    "verify",
    "history",
    "rollback",
    "gc",
    "update",
    "compact",
    "drift",
    "demo",
    "plan",
    "report",
    "submit",
    "jobs",
    "logs",
    "stop",
    "serve",
)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_json_and_an_example_in_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert f"Example:\n    vectormill {command} " in out
    assert "--json" in out


def test_the_program_names_its_commands_and_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "--help")
    assert code == 0
    assert all(f"\n  {command} " in out for command in COMMANDS)
    code, out, _ = _run(capsys, "--version")
    assert (code, out.split()[0]) == (0, "vectormill")


def test_help_loads_neither_torch_nor_ray_nor_faiss() -> None:
    script = (
        "import sys; from pipelines.cli import run; run(['build', '--help']);"
        "sys.exit(', '.join({'torch', 'ray', 'faiss', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert time.monotonic() - started < 5.0  # about 0.2 s on an idle machine


def test_the_module_runs_as_the_program_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "info", "nowhere/to/be/found"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 9
    assert done.stdout == ""
    assert done.stderr.startswith("error: no index is published at /")  # where it looked, in full
    assert "nowhere/to/be/found (no object CURRENT there)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing command; see vectormill --help"),
        (["bild"], 2, "No such command 'bild'"),
        (["build"], 2, "Missing argument 'SOURCE'"),
        (["build", "corpus.parquet"], 2, "Missing option '--out'; see vectormill build --help"),
        (["build", "x.parquet", "--out", "r", "--workers", "two"], 2, "Invalid value for '--workers'"),
        (["build", "x.parquet", "--out", "r", "--set", "chunk.mode"], 2, "--set takes key=value, got 'chunk.mode'"),
        (["build", "x.parquet", "--out", "r", "--set", "index.nlists=4"], 2, "did you mean index.nlist?"),
        (["build", "x.parquet", "--out", "r", "--config", "none.toml"], 2, "'none.toml' does not exist (--config)"),
        (["build", "x.parquet", "--out", "r", "--threads-per-worker", "0"], 2, "threads_per_worker must be at least 1"),
        (["search", "nowhere"], 2, "at least one query"),
        (["search", "nowhere", " "], 2, "a query must have text, got ' '"),
        (["search", "nowhere", "q", "--out", "hits.csv"], 2, "ends in .json, .jsonl, .parquet, got 'hits.csv' (--out)"),
        (["search", "nowhere", "q", "--out", "no/folder/hits.json"], 2, "folder of the results must exist"),
        (["search", "nowhere", "--queries", "q.csv"], 2, "must end in .txt, .jsonl or .parquet, got 'q.csv'"),
        (["search", "nowhere", "--queries", "q.txt"], 2, "file 'q.txt' does not exist"),
        (["search", "nowhere", "q"], 9, "no index is published at"),
        (["eval", "nowhere", "--queries", "q.parquet"], 2, "judged queries take --queries and --qrels, both"),
        (["eval", "nowhere", "--nprobe", "3"], 2, "--nprobe is for judged queries, got 3"),
        (["eval", "nowhere", "--recall", "1.5"], 2, "recall must be between 0 and 1, got 1.5 (--recall)"),
        (["eval", "nowhere"], 9, "no index is published at"),
        (["eval", "nowhere", "--queries", "q.parquet", "--qrels", "r.parquet"], 9, "no index is published at"),
        (["verify", "nowhere"], 9, "no index is published at"),
        (["verify", "nowhere", "--version", "v000009"], 9, "no version 'v000009'"),
        (["history", "nowhere"], 9, "no index is published at"),
        (["rollback", "nowhere"], 9, "no index is published at"),
        (["rollback", "nowhere", "v000009"], 9, "no version 'v000009'"),
        (["gc", "nowhere"], 9, "no index is published at"),
        (["gc", "nowhere", "--keep", "0"], 2, "must be at least 1, got 0 (--keep)"),
        (["gc", "nowhere", "--min-age", "1 day"], 2, "got '1 day' (--min-age)"),
        (["report", "nowhere"], 9, "no index is published at"),
        (["verify", "nowhere", "--progress", "dots"], 2, "one of auto, bars, lines, json, got 'dots' (--progress)"),
        (["info", "ftp://host/index"], 2, "must be a local path or start with s3://"),
        (["demo", "--documents", "0"], 2, "at least 1 document"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_its_own_exit_code(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = _run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (found, out, len(lines)) == (code, "", 1)
    assert message in lines[0]
    assert "Traceback" not in err


def test_with_json_a_mistake_is_also_a_json_object(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = _run(capsys, "info", str(tmp_path), "--json")
    error = json.loads(out)["error"]
    assert (error["type"], error["exit_code"], code) == ("IndexNotFoundError", 9, 9)
    assert err == f"error: {error['message']}\n"


def _raise(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from pipelines import info

    def fail(root: str, version: str | None) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(info, "info", fail)


def test_a_storage_failure_names_the_location(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _raise(monkeypatch, PermissionError(13, "Permission denied", "/locked/CURRENT"))
    code, out, err = _run(capsys, "info", "/locked")
    assert (code, out) == (11, "")
    assert err.startswith("error: storage failed at /locked/CURRENT: Permission denied")
    _raise(monkeypatch, OSError("Access\nDenied"))
    code, _, err = _run(capsys, "info", "s3://bucket/index")
    assert code == 11
    assert err.startswith("error: storage failed at s3://bucket/index: Access Denied;")


def test_missing_credentials_are_a_storage_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import NoCredentialsError

    _raise(monkeypatch, NoCredentialsError())
    code, _, err = _run(capsys, "info", "s3://bucket/index")
    assert code == 11
    assert "s3://bucket/index: Unable to locate credentials" in err


def test_an_interrupted_command_says_that_work_is_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _raise(monkeypatch, KeyboardInterrupt())
    code, out, err = _run(capsys, "info", "index")
    assert (code, out) == (130, "")
    assert err.strip() == "interrupted; what was committed is kept: run the same command again to resume"


def test_a_bug_of_ours_keeps_its_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _raise(monkeypatch, ZeroDivisionError("of ours"))
    code, _, err = _run(capsys, "info", "index")
    assert code == 1
    assert "Traceback" in err
    assert "ZeroDivisionError: of ours" in err


def test_queries_come_from_text_json_lines_and_parquet(tmp_path: Path) -> None:
    text = tmp_path / "q.txt"
    text.write_text("first\n\n  third line \n")
    assert read_queries(str(text)) == [Query("1", "first"), Query("3", "third line")]
    lines = tmp_path / "q.jsonl"
    lines.write_text('{"_id": "a", "text": "eins\u2028zwei"}\n{"text": "drei"}\n')
    assert read_queries(str(lines)) == [Query("a", "eins\u2028zwei"), Query("2", "drei")]
    table = tmp_path / "q.parquet"
    pq.write_table(pa.table({"_id": [7, 8], "text": ["x", "y"]}), table)
    assert read_queries(str(table)) == [Query("7", "x"), Query("8", "y")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", b"\n \n", "must hold at least one"),
        ("q.txt", b"caf\xe9", "must be UTF-8, .* is not at byte 3"),
        ("q.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not"),
        ("q.jsonl", b'{"question": "a"}', r"line 1 has \['question'\]"),
        ("q.jsonl", b'{"text": ""}', r"must have text, got '' \(query 1\)"),
        ("q.jsonl", b'{"_id": 1, "text": "a"}\n{"_id": 1, "text": "b"}', "ids must be unique, got '1' 2 times"),
        ("q.parquet", b"not parquet", "must be a Parquet file"),
    ],
)
def test_a_file_that_holds_no_queries_is_refused_by_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_queries(str(file))


RESULTS: list[dict[str, Any]] = [
    {"query": "q1", "hits": [{"rank": 1, "doc_id": "a", "chunk_no": 0, "score": 0.5, "text": "é [b]"}]},
    {"query": "q2", "hits": []},
]


def test_results_are_the_same_lines_in_every_format(tmp_path: Path) -> None:
    expected = [{"query_id": "1", "rank": 1, "doc_id": "a", "chunk_no": 0, "score": 0.5, "text": "é [b]"}]
    for name in ("hits.json", "hits.jsonl", "hits.parquet"):
        assert write_results(str(tmp_path / name), ["1", "2"], RESULTS) == 1
    assert json.loads((tmp_path / "hits.json").read_text()) == expected
    assert [json.loads(line) for line in (tmp_path / "hits.jsonl").read_text().splitlines()] == expected
    assert pq.read_table(tmp_path / "hits.parquet").to_pylist() == expected


def test_hits_are_shown_in_short_and_without_taking_text_for_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "80")
    text = "[bold]not markup[/bold] " + "word " * 200
    hit = {"rank": 1, "doc_id": "numpy.linalg.svd", "chunk_no": 2, "score": 0.71234, "text": text}
    show_results([{"query": "how [to]", "hits": [hit]}, RESULTS[1]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "how [to]"
    assert lines[1].split() == ["1", "0.712", "numpy.linalg.svd", "chunk", "2"]
    assert "[bold]not markup[/bold]" in lines[2]
    assert lines[3].rstrip().endswith("…")
    assert lines[4:] == ["", "q2", "  no hits"]


def test_rows_and_problems_are_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"read": 1400, "indexed": 1397, "rejected": {"empty_text": 2}, "dropped": {"no_tokens": 1}}
    assert rows_text(rows) == "1,400 rows read, 2 rejected (empty_text 2), 1 dropped (no_tokens 1)"
    assert [bytes_text(size) for size in (12, 5200, 5_200_000)] == ["12 bytes", "5.2 kB", "5.2 MB"]
    facts = {"version": None, "ok": False, "problems": ["CURRENT is damaged"]}
    show_verification(facts, "index")
    assert capsys.readouterr().out.splitlines() == [
        "the published version at index is damaged:",
        "  - CURRENT is damaged",
    ]
