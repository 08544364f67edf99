"""A build killed with SIGKILL at many places, one after the other, ends with the bytes of a build that was not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import s3fs

from operators.artifact.manifest import open_current, read_current
from operators.errors import FencedError
from operators.storage.fencing import take_epoch
from operators.storage.store import Store, open_store
from pipelines import publication
from pipelines.demo_corpus import collect_documents
from tests.pipelines.build_corpus import build_arguments, build_json, run_cli, write_corpus
from tests.pipelines.one_process import build_in_one_process

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
    lines = [(d.name, d.title, d.text[:400]) for d in collect_documents(119)]
    lines[50] = (lines[50][0], lines[50][1], lines[50][2] + " and so on" * 400)  # cut in windows
    lines.insert(100, (lines[3][0], "a duplicate id", "that the merge must leave out"))
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "docs.parquet", lines, row_group_size=20))


@pytest.fixture(scope="module")
def undisturbed(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The build that was never interrupted, in one process without Ray: the oracle of all others."""
    return build_json([corpus], str(tmp_path_factory.mktemp("undisturbed")))


def committed_pieces(store: Store) -> int:
    return sum("/pieces/" in key and key.endswith(".json") for key in store.list_keys("runs"))


def kill_and_resume(corpus: str, root: str, points: list[str], ray_address: str, *settings: str) -> str:
    """content_digest after a build that was killed at each point in turn, and run once more."""
    store = open_store(root)
    arguments = build_arguments([corpus], root, *settings)
    for point in points:
        assert read_current(store) is None, f"something was published before {point}"
        killed = run_cli(*arguments, ray_address=ray_address, crash_at=point)
        assert killed.returncode == -signal.SIGKILL, f"{point} was never passed: {killed.stdout} {killed.stderr}"
    if points[-1].startswith("publish.after"):
        killed_digest = open_current(store).content_digest
    done = run_cli(*arguments, ray_address=ray_address)
    assert done.returncode == 0, done.stderr
    digest = str(json.loads(done.stdout)["content_digest"])
    if points[-1].startswith("publish.after"):
        assert digest == killed_digest
    assert store.list_keys("runs") == []
    verified = run_cli("verify", root, "--json")
    assert verified.returncode == 0, verified.stdout
    return digest


def test_a_build_killed_at_every_point_ends_with_the_same_bytes(
    corpus: str, undisturbed: dict[str, object], tmp_path: Path
) -> None:
    assert kill_and_resume(corpus, str(tmp_path / "root"), CRASH_POINTS, "") == undisturbed["content_digest"]


def test_a_build_on_ray_and_s3_killed_in_workers_and_driver_ends_with_the_same_bytes(
    corpus: str, undisturbed: dict[str, object], ray_cluster: str, bucket: str
) -> None:
    # Corpus and root on S3; killed in a commit task, in a training task, in a merge task, and in the driver.
    s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).put_file(corpus, f"{bucket}/corpus/docs.parquet")
    points = ["piece.before_record:1", "checkpoint.before_record:3", "part.before_record:1", "publish.before:1"]
    digest = kill_and_resume(f"{bucket}/corpus/", f"{bucket}/root", points, ray_cluster)
    assert digest == undisturbed["content_digest"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_build_on_ray_killed_at_every_point_ends_with_the_same_bytes(
    where: str,
    corpus: str,
    undisturbed: dict[str, object],
    ray_cluster: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    root = str(tmp_path / "root") if where == "local" else request.getfixturevalue("bucket") + "/root"
    assert kill_and_resume(corpus, root, CRASH_POINTS, ray_cluster) == undisturbed["content_digest"]


@pytest.mark.slow
def test_one_and_two_workers_and_other_operational_settings_give_the_same_bytes(
    corpus: str, undisturbed: dict[str, object], ray_cluster: str, tmp_path: Path
) -> None:
    one = build_json([corpus], str(tmp_path / "one"), ray_address=ray_cluster, workers=1)
    # Six shards merged three at a time, in waves.
    settings = ("index.shard_rows=20", "index.merge_fan_in=3", "index.merge_buffer_bytes=5000")
    two = build_json([corpus], str(tmp_path / "two"), *settings, ray_address=ray_cluster, workers=2)
    assert one["content_digest"] == two["content_digest"] == undisturbed["content_digest"]
    again = build_json([corpus], str(tmp_path / "two"), *settings, ray_address=ray_cluster)
    assert (two["published"], again["published"]) == (True, False)
    assert (again["version"], again["content_digest"]) == (two["version"], two["content_digest"])


@pytest.mark.slow
def test_lists_found_on_two_levels_are_the_same_for_other_workers_shards_and_a_resumed_training(
    corpus: str, ray_cluster: str, tmp_path: Path
) -> None:
    two_level = ("index.assign_share=0.9", "index.nlist=24")
    # Killed in training, in one process; the others are not disturbed.
    resumed = kill_and_resume(corpus, str(tmp_path / "resumed"), ["checkpoint.before_record:3"], "", *two_level)
    settings = (*two_level, "index.shard_rows=60", "index.train_threads=1")
    one = build_json([corpus], str(tmp_path / "one"), *settings, ray_address=ray_cluster, workers=1)
    two = build_json([corpus], str(tmp_path / "two"), *two_level, ray_address=ray_cluster, workers=2)
    assert resumed == one["content_digest"] == two["content_digest"]
    manifests = [open_current(open_store(str(tmp_path / root))) for root in ("resumed", "one", "two")]
    assert manifests[0].assignment == manifests[1].assignment == manifests[2].assignment
    assert manifests[0].assignment["slack"] is not None
    assert manifests[0].assignment["share"] >= 0.9


def test_a_resumed_run_encodes_only_what_was_not_committed(corpus: str, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    run_cli(*build_arguments([corpus], root), crash_at="piece.after_record:3")
    assert committed_pieces(open_store(root)) == 3
    resumed = build_json([corpus], root)
    assert (resumed["pieces_resumed"], resumed["pieces_encoded"]) == (3, 3)


def test_changed_settings_refuse_to_resume_and_name_the_field(corpus: str, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    run_cli(*build_arguments([corpus], root), crash_at="piece.after_record:1")
    refused = run_cli(*build_arguments([corpus], root, "chunk.mode=truncate"))
    assert refused.returncode == 6
    assert "chunk.mode: was 'window', now 'truncate'" in refused.stderr
    assert "--fresh" in refused.stderr
    fresh = run_cli(*build_arguments([corpus], root, "chunk.mode=truncate"), "--fresh")
    assert fresh.returncode == 0, fresh.stderr


def test_a_build_that_lost_its_epoch_cannot_publish(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "root"))
    honest = publication.write_manifest

    def overtaken(*args: Any) -> str:
        take_epoch(store, "another-run")
        return honest(*args)

    monkeypatch.setattr(publication, "write_manifest", overtaken)
    with pytest.raises(FencedError, match="run another-run .* took it over; nothing was published"):
        build_in_one_process(monkeypatch, [corpus], str(tmp_path / "root"))
    assert read_current(store) is None
