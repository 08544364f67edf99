"""What tests of versions share: a small version to copy, and an empty store of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from operators.storage.store import Store, open_store
from pipelines import gate
from tests.artifact_maker import Version
from tests.pipelines.copied_versions import make_template
from tests.pipelines.nightly_site import Site


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(
        str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("bucket") + "/root"
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model of 32 dimensions with random weights."""
    from tests.operators.encoding.tiny_models import save_family  # here: it loads torch

    return save_family("bert", tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture
def site(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """An index of three objects of eight documents each, published."""
    # So few documents lose more recall by chance; the gate has tests of its own.
    monkeypatch.setattr(gate, "MAX_RECALL_LOSS", 1.0)
    made = Site(tmp_path, tiny_model)
    made.put_three()
    made.build()
    return made
