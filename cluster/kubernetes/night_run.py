"""What a CronJob's pod does: make the night's RayJob, follow it, and end as it ended.

    python -m cluster.kubernetes.night_run /etc/vectormill/rayjob.yaml

The RayJob is named after the pod's Job (not like it: KubeRay makes a Job with the RayJob's name) and belongs to it. So a pod that takes the place of one that was lost follows
the same RayJob, and Kubernetes deletes the RayJob with the Job. While another RayJob works at the same index root, none is
made. Exit codes: 0 done; 1 the RayJob failed; 3 another one is at work; 4 Kubernetes' API cannot be reached or refuses.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
DONE, FAILED, OTHER_AT_WORK, NO_API = 0, 1, 3, 4
# jobDeploymentStatus of a RayJob that will not change any more.
ENDED = {"Complete": DONE, "Failed": FAILED, "ValidationFailed": FAILED}
ROOT_LABEL = "vectormill/root"
RUN_SUFFIX = "-run"
POLL_S = 10.0
API_PATIENCE_S = 600.0  # the API server may be replaced meanwhile
REQUEST_TIMEOUT_S = 30.0


class ApiError(Exception):
    """Kubernetes' API refused a request, or was not to be reached for too long."""


class NotFound(ApiError):
    """There is no such resource."""


class AlreadyThere(ApiError):
    """A resource of that name exists."""


@dataclass
class RayJobs:
    """The RayJobs of a namespace, through Kubernetes' API. Requests are repeated while the API is away."""

    server: str
    namespace: str
    token_file: Path
    tls: ssl.SSLContext | None = None
    patience_s: float = API_PATIENCE_S

    def create(self, job: dict[str, Any]) -> None:
        """Raises AlreadyThere for a name that is taken."""
        self._request("POST", "", job)

    def get(self, name: str) -> dict[str, Any]:
        """Raises NotFound."""
        return self._request("GET", f"/{name}")

    def at_root(self, root_label: str) -> list[dict[str, Any]]:
        """Those that work at the index root of this label, ended or not."""
        found: list[dict[str, Any]] = self._request("GET", f"?labelSelector={ROOT_LABEL}%3D{root_label}")["items"]
        return found

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        url = f"{self.server}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs{path}"
        deadline, wait = time.monotonic() + self.patience_s, 1.0
        while True:
            # The token is replaced from time to time.
            headers = {"Authorization": f"Bearer {self.token_file.read_text().strip()}", "Accept": "application/json"}
            data = None
            if body is not None:
                data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
            request = urllib.request.Request(url, data, headers, method=method)
            try:
                with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S, context=self.tls) as answer:
                    parsed: dict[str, Any] = json.load(answer)
                    return parsed
            except urllib.error.HTTPError as error:
                problem = f"{method} {path or '/'} was answered {error.code}: {_message(error)}"
                if error.code < 500 and error.code != 429:
                    raise {404: NotFound, 409: AlreadyThere}.get(error.code, ApiError)(problem) from None
            except (OSError, ValueError) as error:
                problem = f"{method} {path or '/'} failed: {error}"
            if time.monotonic() + wait > deadline:
                raise ApiError(problem) from None
            time.sleep(wait)
            wait = min(2 * wait, 30.0)


def run_night(
    jobs: RayJobs,
    template: dict[str, Any],
    job_name: str,
    job_uid: str,
    say: Callable[[str], None],
    poll_s: float = POLL_S,
) -> int:
    """Exit code of the night: see the top of this file."""
    root_label = template["metadata"]["labels"][ROOT_LABEL]
    run_name = f"{job_name}{RUN_SUFFIX}"
    for other in jobs.at_root(root_label):
        name, status = other["metadata"]["name"], other.get("status", {})
        if name != run_name and status.get("jobDeploymentStatus", "") not in ENDED:
            say(f"RayJob {name} still works at this index root: none is started beside it; look at it, or delete it")
            return OTHER_AT_WORK
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job_name, "uid": job_uid, "controller": True}
    job = template | {"metadata": template["metadata"] | {"name": run_name, "ownerReferences": [owner]}}
    try:
        jobs.create(job)
        say(f"RayJob {run_name} is made")
    except AlreadyThere:
        say(f"RayJob {run_name} is there already: following it")
    return _follow(jobs, run_name, say, poll_s)


def _follow(jobs: RayJobs, name: str, say: Callable[[str], None], poll_s: float) -> int:
    said = ""
    while True:
        try:
            status = jobs.get(name).get("status", {})
        except NotFound:
            say(f"RayJob {name} was deleted before it ended")
            return FAILED
        state = status.get("jobDeploymentStatus", "") or "New"
        parts = [state, status.get("jobStatus", ""), status.get("reason", ""), status.get("message", "")]
        line = f"RayJob {name}: {' · '.join(part for part in parts if part)}"
        if failed := status.get("failed"):
            line += f" (attempts that failed: {failed})"
        if line != said:
            say(line)
            said = line
        if state in ENDED:
            if state == "Complete" and status.get("jobStatus") != "SUCCEEDED":
                return FAILED  # STOPPED: somebody ended it
            return ENDED[state]
        time.sleep(poll_s)


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason)


def main(arguments: list[str]) -> int:
    """Run the night for the pod that this is."""

    def say(line: str) -> None:
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}", flush=True)

    [template_file] = arguments
    template = yaml.safe_load(Path(template_file).read_text(encoding="utf-8"))
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    jobs = RayJobs(
        server=f"https://{f'[{host}]' if ':' in host else host}:{port}",
        namespace=(ACCOUNT / "namespace").read_text().strip(),
        token_file=ACCOUNT / "token",
        tls=ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")),
    )
    try:
        return run_night(jobs, template, os.environ["JOB_NAME"], os.environ["JOB_UID"], say)
    except ApiError as error:
        say(f"Kubernetes' API: {error}")
        return NO_API


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
