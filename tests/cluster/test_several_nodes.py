"""Jobs on a cluster of several nodes that share nothing but S3: nodes die, runs overlap, and the bytes stay the same."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import s3fs

from cluster.jobs import Jobs
from operators import crash_points
from operators.artifact.manifest import open_current
from operators.errors import FencedError, ResourceError
from operators.storage.store import open_store
from pipelines.commands.jobs_output import job_facts
from pipelines.demo_corpus import collect_documents
from tests.cluster.ray_nodes import RayNodes
from tests.cluster.submitted import SleepingPool, lose_node_of_stopped_worker, submit, wait_for_piece
from tests.pipelines.build_corpus import build_arguments, build_json, run_cli, write_corpus

# Ray 2.60's client of the Jobs API, as the websocket library that it uses sees it.
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")
END_TIMEOUT_S = 280.0
EDITED = 5
DOCS = "s3://several-nodes/docs"


@dataclass(frozen=True)
class Story:
    """What happened in the cluster: two overlapping builds, and a node lost in each."""

    root: str
    first_code: int | None
    first_said: str
    first_name: str
    built_by: str
    built: dict[str, Any]
    listed: list[dict[str, Any]]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The corpus, and what it is on the next day."""
    folder = tmp_path_factory.mktemp("corpora")
    documents = [(d.name, d.title, d.text[:400]) for d in collect_documents(119)]
    edited = [(name, title, f"Edited. {text}") for name, title, text in documents[:EDITED]]
    for day, lines in (("today", documents), ("tomorrow", [*edited, *documents[EDITED:-EDITED]])):
        (folder / day).mkdir()
        write_corpus(folder / day / "docs.parquet", lines, row_group_size=20)
    return folder / "today", folder / "tomorrow"


@pytest.fixture(scope="module")
def story(ray_nodes: RayNodes, s3: str, corpora: tuple[Path, Path]) -> Story:
    storage = s3fs.S3FileSystem(endpoint_url=s3)
    storage.mkdir("several-nodes")
    root = "s3://several-nodes/root"
    storage.put_file(str(corpora[0] / "docs.parquet"), f"{DOCS}/docs.parquet")
    words = build_arguments([f"{DOCS}/"], root)
    ray_nodes.only("one", "two")
    with submit(ray_nodes, *words, options=_stop_at("piece.before_record:1")) as first:
        lose_node_of_stopped_worker(ray_nodes, first)  # in the encoding stage: a piece is encoded, and not committed
        wait_for_piece(root, first)
        ray_nodes.only("one", "two")
        with submit(ray_nodes, *words, options=_stop_at("part.before_record:1")) as second:
            assert first.wait(END_TIMEOUT_S), first.dump()
            lose_node_of_stopped_worker(ray_nodes, second)  # in the merge
            assert second.wait(END_TIMEOUT_S), second.dump()
            assert second.returncode == 0, second.stderr
            built = json.loads(second.stdout)
        first_said, first_code = first.stderr, first.returncode
    listed = [job_facts(job) for job in Jobs(ray_nodes.address).list()]
    named = re.search(r"submitted (build-\S+) to", first_said)
    assert named is not None
    return Story(root, first_code, first_said, named[1], built["submission_id"], built["result"], listed)


def _stop_at(point: str) -> list[str]:
    return ["--set-env", f"{crash_points.STOP_VARIABLE}={point}"]


def test_a_build_that_lost_a_node_in_encoding_and_one_in_merging_has_the_bytes_of_one_process(
    story: Story, corpora: tuple[Path, Path], tmp_path: Path
) -> None:
    one_process = build_json([str(corpora[0])], str(tmp_path / "root"))
    assert story.built["content_digest"] == one_process["content_digest"]
    assert story.built["pieces_resumed"] > 0, "the second job goes on with the work of the first"


def test_of_two_overlapping_jobs_one_publishes_and_the_other_names_it(story: Story) -> None:
    assert story.first_code == FencedError.exit_code, story.first_said
    assert re.search(
        rf"error: .*no longer owns .* job {story.built_by}, .* took it over; nothing was published", story.first_said
    )
    versions = open_store(story.root).list_keys("versions")
    assert {key.split("/")[1] for key in versions} == {story.built["version"]}
    of_first = next(job for job in story.listed if job["submission_id"] == story.first_name)
    assert (of_first["state"], of_first["exit_code"], of_first["root"]) == ("FAILED", FencedError.exit_code, story.root)
    assert "took it over" in of_first["message"]


@pytest.mark.slow
def test_an_update_by_submit_has_the_bytes_of_one_process(
    story: Story, ray_nodes: RayNodes, s3: str, corpora: tuple[Path, Path], tmp_path: Path
) -> None:
    docs, root = str(tmp_path / "docs"), str(tmp_path / "root")
    shutil.copytree(corpora[0], docs)
    build_json([docs], root)
    shutil.copytree(corpora[1], docs, dirs_exist_ok=True)
    alone = run_cli("update", docs, "--index", root, "--json")
    s3fs.S3FileSystem(endpoint_url=s3).put_file(f"{docs}/docs.parquet", f"{DOCS}/docs.parquet")
    with submit(ray_nodes, "update", f"{DOCS}/", "--index", story.root, "--json") as job:
        assert job.wait(END_TIMEOUT_S), job.dump()
        assert job.returncode == 0, job.stderr
        updated = json.loads(job.stdout)["result"]
    assert updated["content_digest"] == json.loads(alone.stdout)["content_digest"]
    assert updated["content_digest"] != story.built["content_digest"]
    assert open_current(open_store(story.root)).version == updated["version"]


@pytest.mark.slow  # the small ones follow: all nodes lost, and none that could hold an encoder
def test_a_pool_that_lost_a_node_goes_on_with_the_encoders_that_there_is_room_for(ray_nodes: RayNodes) -> None:
    ray_nodes.only("one", "two")
    # Enough rows that some are left when the loss is noticed, whatever the machine does besides.
    job = SleepingPool(ray_nodes, rows=60, workers=3, wait_s=30)
    job.wait_for("row 4")
    # The node with two of the three encoders stays: they hold all of its slots, and none is left for the tasks.
    ray_nodes.kill(min(("one", "two"), key=lambda name: len(ray_nodes.pids(name, "ray::MapWorker"))))
    end = job.end()
    assert (end.error, end.job.exit_code) == (None, 0), job.lines
    assert any("room for 1 of 3 encoders" in line for line in job.lines), job.lines
    assert "all 60 rows" in job.lines


def test_a_pool_that_lost_all_nodes_ends_with_what_is_missing(ray_nodes: RayNodes) -> None:
    ray_nodes.only("one")
    job = SleepingPool(ray_nodes, rows=60, workers=1, wait_s=5)
    job.wait_for("row 1")
    ray_nodes.kill("one")
    began = time.monotonic()
    end = job.end()
    assert end.job.exit_code == ResourceError.exit_code, job.lines
    assert end.error is not None
    assert "each encoder takes 1 CPU slot of one node beside 1 CPU slot for reading and committing" in end.error
    assert "1 node(s) without CPU slots or GPUs; no node that could hold one came within 5 s" in end.error
    assert time.monotonic() - began < 60


def test_encoders_that_no_node_can_hold_end_with_what_is_missing_and_nodes_that_come_are_used(
    ray_nodes: RayNodes,
) -> None:
    ray_nodes.only("one")
    refused = SleepingPool(ray_nodes, rows=1, workers=1, wait_s=2, use_gpu=True).end()
    assert refused.job.exit_code == ResourceError.exit_code
    assert refused.error is not None and "no node has a GPU" in refused.error
    waiting = SleepingPool(ray_nodes, rows=4, workers=3, wait_s=120)
    while not any(line.startswith("waiting up to 120 s for nodes: 3 encoder worker(s)") for line in waiting.lines):
        time.sleep(0.2)
    ray_nodes.add("two")
    assert waiting.end().job.exit_code == 0, waiting.lines
    assert "all 4 rows" in waiting.lines
