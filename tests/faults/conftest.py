"""What the tests of killed and overtaken commands share: a corpus that has changed, and roots to begin from."""

from __future__ import annotations

import pytest

from tests.faults.kill_corpus import KillCorpus


@pytest.fixture(scope="session")
def kill_corpus(tmp_path_factory: pytest.TempPathFactory) -> KillCorpus:
    return KillCorpus(tmp_path_factory.mktemp("kill") / "corpus")
