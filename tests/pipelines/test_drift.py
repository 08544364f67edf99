from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.pq import pq_decode
from operators.artifact.list_run import RunReader
from operators.artifact.manifest import read_part_record
from operators.drift import SampledSegment, code_error, spread
from operators.errors import IndexNotFoundError
from pipelines.commands.nightly_output import show_drift
from pipelines.drift import drift, recommendation
from tests.artifact_maker import Version, add_delta, make_version


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """A base, a delta like it, one of other clusters, and deleted rows."""
    made = make_version(tmp_path_factory.mktemp("drift"), num_docs=200, num_pieces=2, num_shards=1)
    return add_delta(add_delta(made, 60, delete=range(30)), 60, drifted=True)


def live_errors(made: Version, number: int) -> np.ndarray:
    """Squared error of the code of each live row of a segment: all of them, decoded here."""
    quantizer, errors = made.quantizer, []
    for ref in made.manifest.segments[number].parts:
        record = read_part_record(made.store, ref)
        reader = RunReader(made.store, "part", record.objects, record.facts)
        entries = reader.read_lists(ref.first_list, ref.first_list + ref.num_lists)
        kept = made.live_N[entries.row_ids]
        decoded = quantizer.centroids_Kd[entries.list_no] + pq_decode(entries.codes, quantizer.codebooks_MKd)
        errors.append(np.square(entries.vectors.astype(np.float64) - decoded).sum(axis=1)[kept])
    return np.concatenate(errors)


def test_the_error_of_a_whole_sample_is_that_of_all_live_rows(version: Version) -> None:
    for number, segment in enumerate(version.manifest.segments):
        expected = live_errors(version, number)
        found = code_error(version.quantizer, [SampledSegment(version.store, segment)], 10_000, seed=1)
        assert found is not None
        assert found.num_rows == segment.num_live == len(expected)
        assert found.squared_error == pytest.approx(expected.mean(), rel=1e-5)
        assert found.relative_error == pytest.approx(expected.mean(), rel=1e-2)  # vectors of unit length


@pytest.mark.parametrize("whole_entries", [0, 10**6])
def test_a_sample_is_even_and_without_deleted_rows(
    version: Version, monkeypatch: pytest.MonkeyPatch, whole_entries: int
) -> None:
    monkeypatch.setattr("operators.drift.WHOLE_ENTRIES", whole_entries)
    monkeypatch.setattr("operators.drift.RUN_ENTRIES", 4)
    segment = version.manifest.segments[0]
    sampled = SampledSegment(version.store, segment)
    errors = [code_error(version.quantizer, [sampled], 80, seed=seed) for seed in range(60)]
    assert errors[0] == code_error(version.quantizer, [SampledSegment(version.store, segment)], 80, seed=0)
    rows = [error.num_rows for error in errors if error is not None]
    assert 60 <= np.mean(rows) <= 88
    expected = live_errors(version, 0)
    mean = np.mean([error.squared_error for error in errors if error is not None])
    # The mean of 60 samples: its own error is a few percent of the spread of single errors.
    assert mean == pytest.approx(expected.mean(), abs=4 * expected.std() / np.sqrt(60 * 40))


def test_the_imbalance_of_few_entries_is_not_that_of_chance() -> None:
    rng = np.random.default_rng(0)
    weights = rng.random(64) ** 2
    weights /= weights.sum()
    expected = 64 * (weights**2).sum()
    few = [spread(rng.multinomial(100, weights)).imbalance for _ in range(400)]
    assert np.mean(few) == pytest.approx(expected, rel=0.02)
    sizes = rng.multinomial(1_000_000, weights)
    many = spread(sizes)
    assert many.imbalance == pytest.approx(64 * (sizes.astype(float) ** 2).sum() / 1e12, rel=1e-3)  # faiss's
    assert spread(np.array([5, 5, 0, 0])).empty_share == 0.5
    assert spread(np.zeros(4, np.int64)).imbalance == 1.0


def test_drift_sets_the_deltas_against_the_base(version: Version, capsys: pytest.CaptureFixture[str]) -> None:
    facts = drift(version.store.url)
    base, delta = facts["base"], facts["delta"]
    deleted = sum(segment.num_deleted for segment in version.manifest.segments)
    assert (facts["deltas"], facts["deleted_rows"], facts["ntotal"]) == (2, deleted, version.manifest.ntotal)
    assert facts["trained_rows"] == version.manifest.segments[0].num_rows
    assert base["squared_error"] == pytest.approx(live_errors(version, 0).mean(), rel=1e-5)
    of_deltas = np.concatenate([live_errors(version, 1), live_errors(version, 2)]).mean()
    assert delta["squared_error"] == pytest.approx(of_deltas, rel=1e-5)
    assert delta["squared_error"] > base["squared_error"]
    assert facts["recall"]["measured"].startswith("now, against exact search over all live rows")
    assert 0 <= facts["recall"]["delta_recall@10"] <= 1
    assert drift(version.store.url)["delta"] == delta
    show_drift(facts)
    shown = capsys.readouterr().out
    assert shown.startswith(f"{facts['version']} at")
    assert facts["recommendation"] in shown


def test_without_deltas_there_is_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_version(tmp_path, num_docs=600, num_pieces=1, num_shards=1)
    facts = drift(str(tmp_path))
    assert (facts["recommendation"], facts["delta"], facts["growth"]) == ("nothing", None, 1.0)
    assert facts["imbalance"] == facts["base"]["imbalance"]
    show_drift(facts)
    assert made.manifest.version in capsys.readouterr().out


def test_recall_of_a_large_version_is_that_of_its_publication(
    version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.drift.EXACT_BYTES", 0)
    recall = drift(version.store.url)["recall"]
    assert recall["recall@10"] == version.manifest.quality["recall@10"]
    assert recall["measured"].startswith("when the version was published")


def test_drift_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(IndexNotFoundError, match="no index is published"):
        drift(str(tmp_path))


HEALTHY: dict[str, Any] = {
    "ntotal": 105_000,
    "deltas": 5,
    "delta_rows": 8_000,
    "deleted_rows": 3_000,
    "deleted_share": 0.03,
    "trained_rows": 100_000,
    "growth": 1.05,
    "imbalance": 1.5,
    "base": {"squared_error": 0.2, "imbalance": 1.4},
    "delta": {"squared_error": 0.22, "imbalance": 3.0},
    "recall": {"recall@10": 0.985, "trained_recall@10": 0.99},
}


def test_a_healthy_version_needs_nothing() -> None:
    assert recommendation(HEALTHY)[0] == "nothing"
    assert recommendation({**HEALTHY, "delta": None, "deltas": 0, "delta_rows": 0})[0] == "nothing"


@pytest.mark.parametrize(
    ("change", "what", "why"),
    [
        ({"recall": {"recall@10": 0.965, "trained_recall@10": 0.99}}, "retrain", "0.0250 under the 0.9900"),
        (
            {"growth": 4.0, "ntotal": 400_000},
            "retrain",
            "400,000 rows are searched with a quantizer trained for 100,000",
        ),
        ({"delta": {"squared_error": 0.31, "imbalance": 1.0}}, "retrain", "1.55 times the squared error"),
        ({"imbalance": 2.2}, "retrain", "the imbalance of all is 2.20, that of the base alone 1.40"),
        ({"deltas": 30}, "compact", "there are 30 deltas"),
        ({"deleted_share": 0.21, "deleted_rows": 28_000}, "compact", "28,000 rows, 21% of those stored"),
    ],
)
def test_the_recommendation_says_why_with_numbers(change: dict[str, Any], what: str, why: str) -> None:
    found, reason = recommendation({**HEALTHY, **change})
    assert found == what
    assert why in reason


def test_few_rows_in_deltas_or_in_training_are_no_reason_to_retrain() -> None:
    drifted = {"delta": {"squared_error": 0.9, "imbalance": 9.0}}
    assert recommendation({**HEALTHY, **drifted})[0] == "retrain"
    assert recommendation({**HEALTHY, **drifted, "delta_rows": 5_000})[0] == "nothing"
    assert recommendation({**HEALTHY, **drifted, "trained_rows": 10_000})[0] == "nothing"
