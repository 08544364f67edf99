"""A night's run on Kubernetes, against a server that answers as Kubernetes' API does: over HTTP, with conflicts, refusals and pauses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from cluster.kubernetes.night_run import ApiError, RayJobs, run_night

PREFIX = "/apis/ray.io/v1/namespaces/search/rayjobs"
TOKEN = "a-token"
TEMPLATE: dict[str, Any] = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "vectormill", "labels": {"vectormill/root": "0123456789abcdef"}},
    "spec": {"entrypoint": "vectormill update"},
}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}


class Api(ThreadingHTTPServer):
    """RayJobs by name. Each GET of one moves it on by one of its `steps`; `faults` are answered first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.steps: list[dict[str, Any]] = [{}, RUNNING, SUCCEEDED]
        self.faults: list[int] = []
        self.posts = 0


class _Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if self._refused():
            return
        if url.path == PREFIX:
            key, _, value = parse_qs(url.query)["labelSelector"][0].partition("=")
            items = [job for job in self.server.jobs.values() if job["metadata"]["labels"].get(key) == value]
            return self._answer(200, {"items": items})
        job = self.server.jobs.get(url.path.removeprefix(f"{PREFIX}/"))
        if job is None:
            return self._answer(404, {"message": "not found"})
        if self.server.steps:
            job["status"] = self.server.steps.pop(0)
        return self._answer(200, job)

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        self.server.posts += 1
        name = job["metadata"]["name"]
        if name in self.server.jobs:
            return self._answer(409, {"message": f"rayjobs {name} already exists"})
        self.server.jobs[name] = job
        return self._answer(201, job)

    def _refused(self) -> bool:
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer(401, {"message": "Unauthorized"})
            return True
        if self.server.faults:
            self._answer(self.server.faults.pop(0), {"message": "a fault"})
            return True
        return False

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def night(
    api: Api, tmp_path: Path, name: str = "vectormill-29112340", token: str = TOKEN, patience_s: float = 10.0
) -> tuple[int, list[str]]:
    """Exit code and lines of the pod of the Job `name`."""
    token_file = tmp_path / "token"
    token_file.write_text(token + "\n")
    said: list[str] = []
    jobs = RayJobs(f"http://127.0.0.1:{api.server_address[1]}", "search", token_file, patience_s=patience_s)
    return run_night(jobs, TEMPLATE, name, "uid-1", said.append, poll_s=0.01), said


def test_a_night_makes_its_job_and_ends_when_that_has_succeeded(api: Api, tmp_path: Path) -> None:
    code, said = night(api, tmp_path)
    assert code == 0
    [job] = api.jobs.values()
    # Not the name of the night's own Job: KubeRay gives the RayJob's name to the Job that submits it.
    assert job["metadata"]["name"] == "vectormill-29112340-run"
    # Deleted with the Job of the night, of which the CronJob keeps the last few.
    [owner] = job["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", "vectormill-29112340", "uid-1")
    assert [line.rpartition(": ")[2] for line in said[1:]] == ["New", "Running · RUNNING", "Complete · SUCCEEDED"]


@pytest.mark.parametrize(
    "end",
    [
        {
            "jobDeploymentStatus": "Failed",
            "jobStatus": "FAILED",
            "reason": "AppFailed",
            "message": "exit code 5",
            "failed": 3,
        },
        {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
        {"jobDeploymentStatus": "ValidationFailed", "message": "wrong"},
    ],
)
def test_a_night_whose_job_failed_or_was_stopped_fails_and_says_why(
    api: Api, tmp_path: Path, end: dict[str, Any]
) -> None:
    api.steps = [RUNNING, {"jobDeploymentStatus": "Retrying"}, end]
    code, said = night(api, tmp_path)
    assert code == 1
    assert all(str(value) in said[-1] for value in end.values())


def test_a_pod_that_takes_over_follows_the_same_job(api: Api, tmp_path: Path) -> None:
    api.steps = []
    api.jobs["vectormill-29112340-run"] = {
        **TEMPLATE,
        "metadata": {**TEMPLATE["metadata"], "name": "vectormill-29112340-run"},
        "status": SUCCEEDED,
    }
    code, said = night(api, tmp_path)
    assert (code, api.posts, len(api.jobs)) == (0, 1, 1)
    assert "following it" in said[0]


@pytest.mark.parametrize("status", [{}, RUNNING, {"jobDeploymentStatus": "Retrying"}])
def test_nothing_is_started_beside_a_job_at_the_same_root(api: Api, tmp_path: Path, status: dict[str, Any]) -> None:
    other = {**TEMPLATE, "metadata": {**TEMPLATE["metadata"], "name": "by-hand"}, "status": status}
    api.jobs["by-hand"] = other
    code, said = night(api, tmp_path)
    assert (code, list(api.jobs)) == (3, ["by-hand"])
    assert "by-hand still works at this index root" in said[-1]
    other["status"] = SUCCEEDED
    assert night(api, tmp_path)[0] == 0


def test_a_job_that_is_deleted_meanwhile_ends_the_night(api: Api, tmp_path: Path) -> None:
    api.steps = [RUNNING]
    real = _Handler.do_GET

    def vanishing(handler: _Handler) -> None:
        real(handler)
        if not api.steps:
            api.jobs.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Handler, "do_GET", vanishing)
        assert night(api, tmp_path)[0] == 1


def test_an_api_that_is_away_for_a_while_is_waited_for(api: Api, tmp_path: Path) -> None:
    api.faults = [503]
    assert night(api, tmp_path)[0] == 0
    assert api.posts == 1


def test_an_api_that_refuses_or_stays_away_is_an_error_that_says_so(api: Api, tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="was answered 401: Unauthorized"):
        night(api, tmp_path, token="another")
    api.faults = [500] * 5
    with pytest.raises(ApiError, match="was answered 500: a fault"):
        night(api, tmp_path, patience_s=0.0)
