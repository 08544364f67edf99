"""A build killed with SIGKILL at many places, one after the other, ends with the bytes of a build that was not."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from operators.artifact.manifest import open_current, read_current
from operators.storage.store import Store, open_store
from pipelines.demo_corpus import collect_documents
from tests.pipelines.build_corpus import build_arguments, build_json, run_cli, write_corpus

# In the order in which a build passes them. Each run is killed at one, the next goes on from what that left.
CRASH_POINTS = [
    "piece.before_data:1",  # in a piece: encoded, nothing written
    "piece.before_record:2",  # between data and commit record
    "piece.after_record:1",
    "sample.before_record:1",
    "checkpoint.before_record:3",  # in training
    "checkpoint.after_record:5",
    "train.before_record:1",
    "run.before_finish:1",  # in a shard: streams open
    "shard.before_record:1",
    "part.before_record:1",  # in a merge
    "part.after_record:2",
    "manifest.before:1",
    "publish.before:1",
    "publish.after:1",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    documents = collect_documents(240)
    lines = [(d.name, d.title, d.text) for d in documents]
    lines[100] = (lines[3][0], "a duplicate id", "that the merge must leave out")
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "docs.parquet", lines))


@pytest.fixture(scope="module")
def undisturbed(corpus: str, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The build that was never interrupted, by one worker."""
    return build_json([corpus], str(tmp_path_factory.mktemp("undisturbed")), ray_address=ray_cluster, workers=1)


def committed_pieces(store: Store) -> int:
    return sum("/pieces/" in key and key.endswith(".json") for key in store.list_keys("runs"))


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_build_killed_again_and_again_ends_with_the_same_bytes(
    where: str, corpus: str, undisturbed: dict[str, object], ray_cluster: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path / "root") if where == "local" else request.getfixturevalue("bucket") + "/root"
    # On S3 a choice of them: every kind of commit, and around the publish.
    points = CRASH_POINTS if where == "local" else [CRASH_POINTS[i] for i in (1, 4, 8, 9, 13)]
    store = open_store(root)
    arguments = build_arguments([corpus], root)
    for point in points:
        before = read_current(store)
        assert before is None, f"something was published before {point}"
        killed = run_cli(*arguments, ray_address=ray_cluster, crash_at=point)
        assert killed.returncode == -signal.SIGKILL, f"{point} was never passed: {killed.stdout} {killed.stderr}"
    assert open_current(store).content_digest == undisturbed["content_digest"]  # killed right after the publish
    done = run_cli(*arguments, ray_address=ray_cluster)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["content_digest"] == undisturbed["content_digest"]
    assert store.list_keys("runs") == []
    verified = run_cli("verify", root, "--json")
    assert verified.returncode == 0, verified.stdout


def test_a_resumed_run_encodes_only_what_was_not_committed(corpus: str, ray_cluster: str, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    arguments = build_arguments([corpus], root)
    run_cli(*arguments, ray_address=ray_cluster, crash_at="piece.after_record:3")
    committed = committed_pieces(open_store(root))
    assert committed >= 1
    resumed = build_json([corpus], root, ray_address=ray_cluster)
    assert resumed["pieces_resumed"] == committed
    assert resumed["pieces_encoded"] == 6 - committed


def test_a_finished_build_run_again_does_nothing(corpus: str, undisturbed: dict[str, object], ray_cluster: str, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    first = build_json([corpus], root, ray_address=ray_cluster)
    again = build_json([corpus], root, ray_address=ray_cluster)
    assert first["content_digest"] == again["content_digest"] == undisturbed["content_digest"]
    assert (first["published"], again["published"]) == (True, False)
    assert first["version"] == again["version"]


def test_changed_settings_refuse_to_resume_and_name_the_field(corpus: str, ray_cluster: str, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    run_cli(*build_arguments([corpus], root), ray_address=ray_cluster, crash_at="piece.after_record:1")
    refused = run_cli(*build_arguments([corpus], root, "chunk.mode=truncate"), ray_address=ray_cluster)
    assert refused.returncode == 6
    assert "chunk.mode: was 'window', now 'truncate'" in refused.stderr
    assert "--fresh" in refused.stderr
    fresh = run_cli(*build_arguments([corpus], root, "chunk.mode=truncate"), "--fresh", ray_address=ray_cluster)
    assert fresh.returncode == 0, fresh.stderr
