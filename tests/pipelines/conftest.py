"""What tests of versions share: a small version to copy, and an empty store of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from operators.storage.store import Store, open_store
from tests.artifact_maker import Version
from tests.pipelines.copied_versions import make_template


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(
        str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("bucket") + "/root"
    )
