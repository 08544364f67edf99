"""`eval` without judged queries: the settings that reach a recall, against a search of all settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from operators.artifact.index import Index
from operators.errors import ConfigError, IntegrityError
from operators.storage.store import open_store
from pipelines import cli
from pipelines.compact import compact
from pipelines.garbage import collect_garbage
from pipelines.operating_points import (
    REFINE_FACTORS,
    measure_operating_points,
    operating_points_key,
    point_for,
    read_operating_points,
)
from pipelines.recall import intersection_recall
from pipelines.verify import verify
from tests.artifact_maker import Version, delete_rows, flip_bit, make_version
from tests.pipelines.nightly_site import Site, configured


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("points"), num_docs=1500, nlist=32, M=4, nbits=4)


def _recalls(version: Version) -> dict[tuple[int, int], float]:
    """recall@10 of every setting, against a search of all vectors written here."""
    index = Index(version.store, version.manifest)
    live = np.flatnonzero(version.live_N)
    products = version.corpus.queries_Qd @ version.corpus.vectors_Nd[live].astype(np.float32).T
    exact = live[np.argsort(-products, axis=1, kind="stable")[:, :10]]
    return {
        (nprobe, refine): intersection_recall(
            index.search(version.corpus.queries_Qd, 10, nprobe=nprobe, refine_factor=refine).row_ids_Qk, exact
        )
        for nprobe in range(1, version.manifest.nlist + 1)
        for refine in REFINE_FACTORS
    }


def test_points_reach_their_recall_with_the_least_nprobe_of_their_refine_factor(version: Version) -> None:
    recalls = _recalls(version)
    measured = measure_operating_points(version.store.url, (0.8, 0.9, 0.95))
    assert [point["recall"] for point in measured["points"]] == [0.8, 0.9, 0.95]
    for point in measured["points"]:
        setting = (point["nprobe"], point["refine_factor"])
        assert point["recall@10"] == pytest.approx(recalls[setting])
        assert recalls[setting] >= point["recall"]
        fewer = [recalls[nprobe, setting[1]] for nprobe in range(1, setting[0])]
        assert all(recall < point["recall"] for recall in fewer[:-1])  # bisection stops at a sixteenth
        assert 0 < point["p50_ms"] <= point["p99_ms"]
    assert {(p["nprobe"], p["refine_factor"]) for p in measured["curve"]} <= set(recalls)


def test_a_search_takes_the_lowest_point_that_suffices(version: Version) -> None:
    stored = measure_operating_points(version.store.url, (0.8, 0.95))["points"]
    for recall, place in ((0.5, 0), (0.8, 0), (0.81, 1), (0.95, 1)):
        point = stored[place]
        assert point_for(version.store, version.manifest, recall) == (point["nprobe"], point["refine_factor"])
    # Beyond them the manifest's own point, whose recall (1.0 in this manifest) was measured too.
    assert point_for(version.store, version.manifest, 0.99) == (4, 4)


def test_what_no_setting_reaches_is_said_and_not_stored(tmp_path: Path) -> None:
    version = make_version(tmp_path, num_docs=3000, nlist=8, M=2, nbits=4)  # codes of one byte
    version.manifest.quality["recall@10"] = 0.2
    measured = measure_operating_points(version.store.url, (0.2, 0.99))
    best = max(point["recall@10"] for point in measured["curve"])
    assert best < 0.99
    assert [point["recall"] for point in measured["points"]] == [0.2]
    assert measured["unreached"] == [{"recall": 0.99, "best_recall@10": best}]
    with pytest.raises(ConfigError, match=r"reaches recall 0\.99, known are 0\.2.*vectormill eval .* --recall 0\.99"):
        point_for(version.store, version.manifest, 0.99)


def test_deleted_rows_are_no_neighbours(tmp_path: Path) -> None:
    whole = make_version(tmp_path, num_docs=600, nlist=8)
    version = delete_rows(whole, range(0, 600, 2))
    recalls = _recalls(version)
    for point in measure_operating_points(version.store.url, (0.9,))["points"]:
        assert point["recall@10"] == pytest.approx(recalls[point["nprobe"], point["refine_factor"]])


def test_without_a_measurement_the_manifest_says_what_it_reaches(tmp_path: Path) -> None:
    version = make_version(tmp_path, num_docs=100, nlist=4)
    assert point_for(version.store, version.manifest, 0.95) == (4, 4)
    version.manifest.quality["recall@10"] = 0.93
    with pytest.raises(ConfigError, match=r"recall 0\.95, known are 0\.9300 \(--recall\); measure it with"):
        point_for(version.store, version.manifest, 0.95)
    with pytest.raises(ConfigError, match=r"between 0 and 1, got 95"):
        point_for(version.store, version.manifest, 95)


def test_damaged_points_are_an_error_that_says_to_measure_again(tmp_path: Path) -> None:
    version = make_version(tmp_path, num_docs=100, nlist=4)
    measure_operating_points(version.store.url, (0.5,))
    flip_bit(version.store, operating_points_key(version.manifest.version), 100)
    with pytest.raises(IntegrityError, match="measure again: vectormill eval"):
        point_for(version.store, version.manifest, 0.5)


def test_an_update_and_a_compaction_inherit_points_and_gc_deletes_them_with_their_version(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = measure_operating_points(site.root, (0.5,))
    site.change()
    updated = site.update().manifest
    compacted = compact(site.root, configured).manifest
    store = open_store(site.root)
    for later in (updated, compacted):
        assert later.version != measured["version"]
        inherited = read_operating_points(store, later.version)
        assert inherited is not None
        assert (inherited["points"], inherited["version"]) == (measured["points"], measured["version"])
    assert verify(site.root)["ok"]
    assert cli.run(["info", site.root]) == 0
    assert "recall 0.5: nprobe " in capsys.readouterr().out
    collect_garbage(site.root, keep=1, min_age_s=0, delete=True)
    assert read_operating_points(store, measured["version"]) is None
    assert read_operating_points(store, compacted.version) is not None


def test_search_by_recall_gives_what_the_point_s_settings_give(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    point = measure_operating_points(site.root, (0.9,))["points"][0]
    question = ["search", site.root, "heat in a nozzle", "--json"]
    assert cli.run([*question, "--recall", "0.9"]) == 0
    by_recall = capsys.readouterr().out
    settings = ["--nprobe", str(point["nprobe"]), "--refine-factor", str(point["refine_factor"])]
    assert cli.run([*question, *settings]) == 0
    assert capsys.readouterr().out == by_recall
    assert cli.run([*question, "--recall", "0.9", "--nprobe", "1"]) == 2
    assert "leave out --nprobe and --refine-factor" in capsys.readouterr().err
