"""Updates that are interrupted, and updates elsewhere: on Ray, on S3."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import s3fs

from operators.storage.store import open_store
from pipelines.verify import verify
from tests.pipelines.build_corpus import run_cli
from tests.pipelines.crashes import Killed, killed_at
from tests.pipelines.nightly_site import HERE, Site


def test_an_update_killed_at_every_point_in_turn_ends_with_the_same_digest(site: Site, tmp_path: Path) -> None:
    site.change()
    with killed_at(None) as passed:
        undisturbed = site.copied(tmp_path / "undisturbed").update().manifest
    points = list(dict.fromkeys(passed))
    assert {"scan.before_record", "take.before_data", "piece.before_record", "shard.before_record"} <= set(points)
    assert {"part.before_record", "manifest.before", "publish.before", "publish.after"} <= set(points)
    for point in points[: points.index("publish.after") + 1]:
        assert site.current.version == "v000001"
        with killed_at(point), pytest.raises(Killed):
            site.update()
    assert site.current.content_digest == undisturbed.content_digest
    last = site.update()
    assert (last.published, last.texts_encoded) == (False, 0)
    assert open_store(site.root).list_keys("runs") == []
    assert verify(site.root)["ok"]


def test_an_update_killed_with_sigkill_ends_with_the_same_digest(tiny_model: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, tiny_model)
    site.put_three()
    site.build("index.nlist=1")  # so few documents lose more recall by chance than the gate allows
    site.change()
    undisturbed = site.copied(tmp_path / "undisturbed").update().manifest
    arguments = ["update", str(site.docs), "--index", site.root, "--min-recall", "0", "--json"]
    for setting in HERE:
        arguments += ["--set", setting]
    killed = run_cli(*arguments, crash_at="publish.before:1")  # tests/faults kills everywhere
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert site.current.version == "v000001"
    done = run_cli(*arguments)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["content_digest"], facts["texts_encoded"]) == (undisturbed.content_digest, 0)


def test_ray_and_one_process_give_the_same_digest(site: Site, ray_cluster: str, tmp_path: Path) -> None:
    site.change()
    one = site.copied(tmp_path / "process").update().manifest
    result = site.update(settings=["cluster.where=ray", f"cluster.address={ray_cluster}"])
    assert result.published
    assert result.manifest.content_digest == one.content_digest


def test_an_index_and_a_corpus_on_s3_are_updated(tiny_model: Path, bucket: str, tmp_path: Path) -> None:
    site, corpus, store = (
        Site(tmp_path, tiny_model, root=f"{bucket}/root"),
        f"{bucket}/docs",
        s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]),
    )

    def upload() -> None:
        if store.exists(corpus):
            store.rm(corpus, recursive=True)
        store.put(f"{site.docs}/", f"{corpus}/", recursive=True)

    site.put_three()
    upload()
    site.build("index.nlist=1", source=corpus)
    assert not site.update(corpus).published
    site.change()
    upload()
    result = site.update(corpus)
    assert (result.texts_encoded, result.objects["unchanged"]) == (7, 1)
    upload()  # an S3 etag follows from the content: what is written again is unchanged
    assert site.update(corpus).objects == {"unchanged": 3, "changed": 0, "added": 0, "vanished": 0}
    assert verify(site.root)["ok"]
