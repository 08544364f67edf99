"""A few kills of the harness that `python -m tests.faults.kill_anything` drives with a hundred."""

from __future__ import annotations

import pytest

from tests.faults.kill_anything import Harness
from tests.faults.kill_corpus import KINDS, KillCorpus, Plan

MAX_SECONDS = 540.0


def assert_held(harness: Harness, num_kills: int) -> None:
    outcome = harness.run(num_kills, MAX_SECONDS)
    assert outcome.failures == []
    assert len(outcome.kills) == num_kills
    assert outcome.reader["rounds"] > 0


def test_updates_and_compactions_killed_at_random_end_with_the_bytes_of_undisturbed_ones(
    kill_corpus: KillCorpus,
) -> None:
    plans = [plan for plan in kill_corpus.plans(["update", "compact"]) if plan.where == "process"]
    assert_held(Harness(kill_corpus, plans, seed=5), 2)


def test_a_compaction_on_ray_with_random_processes_killed_ends_with_the_bytes_of_an_undisturbed_one(
    kill_corpus: KillCorpus,
) -> None:
    plan = Plan("compact", "ray", kill_corpus.updated, kill_corpus.content_digest("compact"))
    # The seed draws the raylet, a second after it is there, and then a worker.
    assert_held(Harness(kill_corpus, [plan], seed=38), 2)


@pytest.mark.slow
def test_every_command_on_ray_with_random_processes_killed_ends_with_the_bytes_of_an_undisturbed_one(
    kill_corpus: KillCorpus,
) -> None:
    plans = [plan for plan in kill_corpus.plans(KINDS) if plan.where == "ray"]
    assert_held(Harness(kill_corpus, plans, seed=5), 8)
