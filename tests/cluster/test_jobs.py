"""Commands as jobs on a cluster: what is refused before anything is sent, what travels, how a job's end is told."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs

from cluster.job_log import LogReader
from cluster.job_package import pinned_requirements, write_package
from operators.errors import ConfigError, IndexNotFoundError
from pipelines import cli
from pipelines.submission import job_variables, prepare_command
from tests.cluster.ray_nodes import RayNodes, free_port
from tests.cluster.submitted import submit

# Ray 2.60's client of the Jobs API, as the websocket library that it uses sees it.
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")
BUILD = ["build", "s3://b/docs/", "--out", "s3://b/root"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["submit", *BUILD], 2, "no cluster is named: give the address of its dashboard"),
        (["submit", "--", "build", "s3://b/docs/"], 2, "Missing option '--out'; see vectormill build --help"),
        (["submit", "--", "search", "s3://b/root", "q"], 2, "gc or verify, got 'search'"),
        (["submit", *BUILD, "--set", "index.nlists=4"], 2, "did you mean index.nlist?"),
        (["submit", "--", "build", "docs", "--out", "s3://b/root"], 2, "'docs' is a path of this machine"),
        (["submit", "--", "gc", "root"], 2, "'root' is a path of this machine"),
        (["submit", "--code", "image2", "--", *BUILD], 2, "--code must be ship or image, got 'image2'"),
        (["submit", "--set-env", "AWS_SECRET_ACCESS_KEY", "--", *BUILD], 2, "looks like a credential"),
        (["submit", "--set-env", "NOT_SET_HERE", "--", *BUILD], 2, "is not set here"),
        (["submit", "--address", "http://127.0.0.1:1", *BUILD], 8, "no answer from the Jobs API at http://127.0.0.1:1"),
        (["jobs", "--address", "127.0.0.1:1"], 8, "no answer from the Jobs API at 127.0.0.1:1"),
    ],
)
def test_what_cannot_run_is_one_line_before_anything_is_submitted(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    found = cli.run(words)
    captured = capsys.readouterr()
    assert (found, captured.out) == (code, "")
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_the_package_holds_the_four_packages_and_the_files_of_the_command_and_always_the_same_bytes(
    tmp_path: Path,
) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text("[chunk]\n")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_package(tmp_path / name, {"submitted/0-run.toml": settings})
    packed = {
        str(p.relative_to(tmp_path / "one")): p.read_bytes() for p in (tmp_path / "one").rglob("*") if p.is_file()
    }
    again = {str(p.relative_to(tmp_path / "two")): p.read_bytes() for p in (tmp_path / "two").rglob("*") if p.is_file()}
    assert packed == again
    assert {name.split("/")[0] for name in packed if not name.startswith("vectormill-")} == {
        *("kernels", "operators", "cluster", "pipelines"),
        *("pyproject.toml", "constraints.txt", "submitted"),
    }
    assert sum(len(content) for content in packed.values()) < 4 << 20
    assert not any("__pycache__" in name for name in packed)


def test_pinned_requirements_leave_ray_to_the_cluster() -> None:
    packages = pinned_requirements()["packages"]
    assert packages[0].startswith("# constraints.txt ")
    assert packages[1].startswith("-c ") and packages[1].endswith("/constraints.txt")
    assert "numpy>=2" in packages
    assert not any(package.startswith("ray") for package in packages)


def test_files_of_options_travel_and_shared_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run.toml", "gone.txt"):
        Path(name).touch()
    words = ["update", "docs", "--index=root", "--config", "run.toml", "--deletes=gone.txt", "--set", "a.b=docs"]
    given = {"sources": ["docs"], "index": "root", "config": "run.toml", "deletes": "gone.txt"}
    prepared = prepare_command(words, given, shared_filesystem=True)
    docs, root = str(tmp_path / "docs"), str(tmp_path / "root")
    assert prepared.words == [
        *("update", docs, f"--index={root}", "--config", "submitted/0-run.toml"),
        *("--deletes=submitted/1-gone.txt", "--set", "a.b=docs"),
    ]
    assert prepared.files == {"submitted/0-run.toml": Path("run.toml"), "submitted/1-gone.txt": Path("gone.txt")}
    assert prepared.root == root


def test_variables_are_sent_by_name_or_value_and_never_credentials() -> None:
    assert job_variables(["A", "B=2"], {"A": "1"}) == {"A": "1", "B": "2"}
    for name in ("AWS_ACCESS_KEY_ID=x", "HF_TOKEN", "RAY_AUTH_TOKEN", "DB_PASSWORD=y"):
        with pytest.raises(ConfigError, match="looks like a credential"):
            job_variables([name], dict.fromkeys(["HF_TOKEN", "RAY_AUTH_TOKEN"], "z"))


def test_a_log_in_any_pieces_gives_lines_result_and_error() -> None:
    text = (
        'x\tINFO -- Runtime env is setting up.\nlist sources 0.1 s\nerror: not the last\n{\n "a": 1\n}\nerror: it\nis'
    )
    for size in (1, 3, 1000):
        lines: list[str] = []
        reader = LogReader(lines.append)
        for begin in range(0, len(text), size):
            reader.feed(text[begin : begin + size])
        reader.end()
        assert lines == ["list sources 0.1 s", "error: not the last", "error: it", "is"]
        assert (reader.result, reader.error) == ({"a": 1}, None)
    reader = LogReader(lines.append)
    reader.feed('error: gone\n{"error": {"type": "ConfigError", "message": "gone", "exit_code": 2}}\n')
    reader.end()
    assert (reader.error, reader.result) == ("gone", None)


class Here:
    """The command line in this process, for somebody who works with the cluster."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str, code: int = 0) -> tuple[str, str]:
        """Standard output and standard error of a command that must end with that code."""
        try:
            found = cli.run(list(words))
        except SystemExit as exited:
            found = int(str(exited.code))
        out, err = self._capsys.readouterr()
        assert found == code, err
        return out, err

    def job(self, job_id: str) -> dict[str, Any]:
        """What `jobs --json` says of it."""
        return dict(next(job for job in json.loads(self("jobs", "--json")[0]) if job["submission_id"] == job_id))


@pytest.fixture
def here(ray_nodes: RayNodes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_nodes.address)
    return Here(capsys)


def test_a_job_ends_with_the_exit_code_and_the_error_line_of_its_command(here: Here, bucket: str) -> None:
    out, err = here("submit", "--", "gc", f"{bucket}/nothing", code=IndexNotFoundError.exit_code)
    assert out == ""
    told = f"error: no index is published at {bucket}/nothing"
    assert next(line for line in err.splitlines() if line.startswith("error: ")).startswith(told)
    listed = json.loads(here("jobs", "--json")[0])[0]
    assert (listed["root"], listed["state"], listed["exit_code"]) == (f"{bucket}/nothing", "FAILED", 9)
    assert listed["message"].startswith("no index is published at")
    shown = here("jobs")[0]
    assert listed["submission_id"] in shown
    assert "FAILED (9)" in shown
    assert told in here("logs", listed["submission_id"])[0]
    followed, _ = here("logs", listed["submission_id"], "--follow", "--json", code=9)
    assert json.loads(followed)["error"]["exit_code"] == 9


def test_a_job_that_is_interrupted_here_goes_on_there_until_it_is_stopped(
    here: Here, ray_nodes: RayNodes, bucket: str
) -> None:
    ray_nodes.only("one")
    s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).pipe(
        f"{bucket}/docs/a.jsonl", b'{"id": "a", "text": "one"}\n'
    )
    words = ["build", f"{bucket}/docs/", "--out", f"{bucket}/root", "--set", "cluster.wait_for_nodes_s=300"]
    job_id = f"job-{free_port()}"
    with submit(ray_nodes, *words, "--workers", "50", options=["--submission-id", job_id]) as followed:
        _wait_until(lambda: "waiting up to 300 s for nodes: 50 encoder worker(s)" in followed.stdout)
        os.kill(followed.pid, signal.SIGINT)
        assert followed.wait(30)
        assert followed.returncode == 130
        assert f"left running: {job_id}" in followed.stderr
        assert f"vectormill logs {job_id} --follow" in followed.stderr
        assert f"vectormill stop {job_id}" in followed.stderr
    assert here.job(job_id)["state"] == "RUNNING"
    out, err = here("submit", "--no-wait", "--submission-id", job_id, "--", *words, code=2)
    assert out == ""
    assert f"job '{job_id}' exists already" in err
    assert f"{job_id} is being stopped" in here("stop", job_id)[0]
    _wait_until(lambda: here.job(job_id)["state"] == "STOPPED")
    assert f"{job_id} was not running (STOPPED)" in here("stop", job_id)[0]
    assert "submit the same command again to resume" in here("logs", job_id, "--follow", code=130)[1]


def test_a_cluster_asks_for_its_token(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = os.environ["RAY_AUTH_TOKEN"]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    _, wrong = here("jobs", code=2)
    assert "asks for its token, and the token given here is not the cluster's" in wrong
    # As for somebody who never heard of tokens: no variable, no file.
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    _, missing = here("jobs", code=2)
    assert "asks for its token, and none was given: put it into RAY_AUTH_TOKEN" in missing
    assert len(wrong.splitlines()) == len(missing.splitlines()) == 1
    # The file of a token is enough.
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(token)
    here("jobs")


def test_an_unknown_job_is_named(here: Here) -> None:
    for command in ("logs", "stop"):
        assert "there is no job 'nobody' at" in here(command, "nobody", code=2)[1]


def _wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
