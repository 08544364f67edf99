"""Whole commands through storage that fails: the same versions as without faults, and an end in bounded time without any."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from operators.storage import retrying_s3
from pipelines import cli
from tests.faults.bad_storage import BadStorage, disturb, down_from
from tests.faults.faulty_s3 import faulty_s3

DEADLINE_S = 1.0


@pytest.fixture
def storage(s3: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BadStorage]:
    with faulty_s3(s3, slow_s=0.2, seed=4) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setattr(retrying_s3, "MAX_BACKOFF_S", 0.3)
        yield BadStorage(f"{bucket}/run", s3, proxy, documents=15)


def test_all_commands_end_the_same_with_one_request_in_ten_failing_and_after_an_outage(
    storage: BadStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_state(1)
    with monkeypatch.context() as patch:
        patch.setattr(retrying_s3, "REQUEST_DEADLINE_S", DEADLINE_S)
        patch.setattr(retrying_s3, "DOWN_DEADLINE_S", 0.2)
        since = down_from(storage.proxy, 40)
        down = storage.run("build", storage.root)
        assert since() < 5 * DEADLINE_S  # a request's, and little for those that still come after it
        storage.proxy.up_again()
    assert down.code == cli.STORAGE_EXIT_CODE
    assert len(down.err.strip().splitlines()) == 1
    assert f"error: storage failed at {storage.root}/" in down.err
    faults = 0
    for step, bad, good in disturb(storage, str(tmp_path / "clean"), rate=0.1):
        assert good, f"{step}: {bad.err}"
        faults += sum(count for kind, count in bad.done.items() if kind != "passed")
    assert faults > 30
