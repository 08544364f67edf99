"""Requests that schemathesis makes from the service's own OpenAPI description: no fault, and every answer as described."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events

from pipelines.service.api import create_app
from pipelines.service.settings import ServiceSettings
from tests.pipelines.nightly_site import Site

TOKEN = "a-token-of-some-length"


def fuzz(settings: ServiceSettings, max_examples: int, seed: int, headers: dict[str, str]) -> Counter[tuple[str, int]]:
    """Number of answers by (operation, status). AssertionError with every check that failed and how to repeat it.

    The application is asked in this process, at its limits and with `max_examples` random requests a route, half of which
    break the description.
    """
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "headers": headers,
            "generation": {"max-examples": max_examples, "database": "none"},
            "continue-on-failure": True,
            "cache": {"enabled": False},
            # Refusals that no schema can state: recall beside nprobe, k * refine_factor, a recall that nothing reaches.
            "checks": {"positive_data_acceptance": {"enabled": False}},
            "phases": {"stateful": {"enabled": False}},
        }
    )
    described: Any = schemathesis.openapi.from_asgi(
        "/openapi.json", create_app(settings), config=config, headers=headers
    )
    answers: Counter[tuple[str, int]] = Counter()
    failures = []
    for event in engine.from_schema(described).execute():
        if isinstance(event, events.FatalError):
            raise event.exception
        if isinstance(event, events.NonFatalError):
            failures.append(f"{event.label}: {event.value!r}")
        if isinstance(event, events.ScenarioFinished):
            for interaction in event.recorder.interactions.values():
                assert interaction.response is not None
                answers[event.label or "", interaction.response.status_code] += 1
            for checks in event.recorder.checks.values():
                failed = [check.failure_info for check in checks if check.failure_info is not None]
                failures += [f"{event.label}: {info.failure}\n{info.code_sample}" for info in failed]
    assert not failures, "\n\n".join(failures[:10])
    return answers


def test_no_request_from_the_description_ends_in_a_fault(served_site: Site) -> None:
    answers = fuzz(ServiceSettings(served_site.root), 60, 1, {})
    assert answers["POST /v1/search", 200] >= 5 and answers["POST /v1/search", 422] >= 50, answers
    assert not [key for key in answers if key[1] >= 500]


def test_no_request_from_the_description_gets_past_the_token(
    served_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUZZ_TOKEN", TOKEN)
    settings = ServiceSettings(served_site.root, token_env="FUZZ_TOKEN")
    answers = fuzz(settings, 10, 2, {"Authorization": f"Bearer {TOKEN}"})
    assert answers["POST /v1/search", 401]  # schemathesis leaves the token out, and gives another


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4])
def test_thousands_of_requests_from_the_description_end_in_no_fault(served_site: Site, seed: int) -> None:
    answers = fuzz(ServiceSettings(served_site.root), 1000, seed, {})
    assert answers.total() > 1000
