"""The service on Ray Serve: a real `serve` in processes of its own, a swap under load, a token, and an end that answers what is there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pipelines.rollback import rollback
from tests.pipelines.nightly_site import Site

TOKEN = "a-token-of-sixteen-or-more"
START_TIMEOUT_S = 180.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ask(port: int, path: str, body: dict[str, Any] | None = None, token: str | None = TOKEN) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers), timeout=30
        ) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.fixture
def two_versions(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    from pipelines import gate

    monkeypatch.setattr(gate, "MAX_RECALL_LOSS", 1.0)
    site = Site(tmp_path, tiny_model)
    site.put_three()
    site.build()
    site.change()
    site.update()
    return site


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model of 32 dimensions with random weights."""
    from tests.operators.encoding.tiny_models import save_family

    return save_family("bert", tmp_path_factory.mktemp("tiny_model"))


@pytest.mark.parametrize(
    "options", [["--replicas", "2"], pytest.param(["--proxy"], marks=pytest.mark.slow)], ids=["listening", "proxy"]
)
def test_serve_asks_for_its_token_swaps_without_a_failure_and_ends_when_told(
    two_versions: Site, options: list[str]
) -> None:
    port = _free_port()
    command = [sys.executable, "-m", "pipelines.cli", "serve", two_versions.root, "--port", str(port), "--json"]
    command += ["--token-env", "SERVE_TOKEN", "--poll-s", "0.1", *options]
    environment = {**os.environ, "SERVE_TOKEN": TOKEN}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    killer = threading.Timer(START_TIMEOUT_S, process.kill)
    killer.start()
    try:
        said = ""
        while not said.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, "".join(errors)
            said += line
        assert json.loads(said)["url"] == f"http://127.0.0.1:{port}"

        assert _ask(port, "/healthz", token=None) == (200, {"status": "ok"})
        assert _ask(port, "/readyz", token=None) == (200, {"status": "ready"})
        status, body = _ask(port, "/v1/index", token=None)
        assert (status, body["error"]["code"]) == (401, "unauthorized")
        status, body = _ask(port, "/v1/search", {"queries": ["a"]}, token="another-token-of-sixteen")
        assert (status, body["error"]["where"]) == (401, "header Authorization")
        status, body = _ask(port, "/v1/search", {"queries": ["a"], "k": 0})
        assert (status, body["error"]["where"]) == (422, "k")

        stop, ending, answers = threading.Event(), threading.Event(), []

        def load() -> None:
            while not stop.is_set():
                try:
                    found = _ask(port, "/v1/search", {"queries": ["a wing", "heat"], "k": 3})
                except (
                    urllib.error.URLError,
                    ConnectionError,
                    ValueError,
                ):  # nobody listens any more, or Ray's proxy answers
                    assert ending.is_set()
                    return
                if "--proxy" not in options or not ending.is_set():
                    answers.append(found)

        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for version in ("v000001", "v000002", "v000001"):
                rollback(two_versions.root, version)
                deadline = time.monotonic() + 30
                # Each of the replicas: connections go to either.
                while {_ask(port, "/v1/index")[1]["version"] for _ in range(8)} != {version}:
                    assert time.monotonic() < deadline, f"{version} is not served"
                    time.sleep(0.05)
            ending.set()
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        finally:
            stop.set()
        for thread in threads:
            thread.join(30)
        # What came after the end had begun may have found nobody; whatever was answered was answered well.
        assert {body["version"] for status, body in answers if status == 200} == {"v000001", "v000002"}
        assert all(status in (200, 503) for status, _ in answers)
        assert process.wait(60) == 0, "".join(errors)
    finally:
        killer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
        reader.join(10)
        process.stderr.close()


def _lifespan_code(args: dict[str, Any]) -> str:
    return f"""
import asyncio
from cluster.serving import ServingArgs, _Listening

async def app(scope, receive, send):
    await receive()
    await send({{"type": "lifespan.startup.complete"}})
    await receive()

async def main():
    listening = _Listening(app, ServingArgs(**{args!r}))
    started = asyncio.Event()

    async def receive():
        await asyncio.sleep(3600 if started.is_set() else 0)
        return {{"type": "lifespan.startup"}}

    async def send(message):
        started.set()

    running = asyncio.create_task(listening({{"type": "lifespan"}}, receive, send))
    await asyncio.wait([running, asyncio.create_task(started.wait())], return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        print("startup:", type(running.exception()).__name__)
        return
    listening.check()
    listening._task.cancel()
    await asyncio.wait([listening._task])
    try:
        listening.check()
    except RuntimeError as error:
        print("check:", error)
    running.cancel()

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"protocol": "cluster.serving:NoSuchProtocol"}, "startup: "),
        ({}, "check: the server of 127.0.0.1:"),
    ],
)
def test_a_replica_that_does_not_listen_fails_to_start_and_one_that_stops_listening_is_unhealthy(
    fields: dict[str, Any], said: str
) -> None:
    code = _lifespan_code({"root": "r", "listen": f"127.0.0.1:{_free_port()}", **fields})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(said), done.stdout + done.stderr


def test_the_builder_takes_the_arguments_of_a_serve_configuration(tmp_path: Path) -> None:
    code = (
        "import sys, json; from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call\n"
        "from ray.serve._private.utils import import_attr\n"
        "from ray._common.utils import import_attr\n"
        "app = call(import_attr('cluster.serving:build_app'), json.loads(sys.argv[1]))\n"
        "d = app._bound_deployment\n"
        "print(json.dumps([d.num_replicas, d.ray_actor_options['num_cpus'], d.init_args[0]['root']]))"
    ).replace("from ray.serve._private.utils import import_attr\n", "")
    given = {"root": "s3://bucket/index", "replicas": 3, "threads_per_replica": 2, "settings": {"max_k": 5}}

    def run(arguments: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, json.dumps(arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [3, 2, "s3://bucket/index"]
    done = run({**given, "replica": 3})
    assert done.returncode != 0 and "Extra inputs are not permitted" in done.stderr
