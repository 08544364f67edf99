"""What tests of versions share: a small version to copy, and an empty store of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from operators.storage.store import Store, open_store
from pipelines import gate
from tests.artifact_maker import Version
from tests.pipelines.copied_versions import make_template
from tests.pipelines.nightly_site import Site

if TYPE_CHECKING:
    from tests.pipelines.chromium import Browser
    from tests.pipelines.running_service import Served


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


@pytest.fixture(scope="session")
def served_site(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """An index of the documents of running_service.py by the default model. Not to be changed."""
    from tests.pipelines.running_service import make_site  # here: it loads the service

    return make_site(tmp_path_factory.mktemp("served"), minilm)


@pytest.fixture(scope="session")
def served(served_site: Site) -> Iterator[Served]:
    """A service of served_site in this process."""
    from pipelines.service.settings import ServiceSettings
    from tests.pipelines.running_service import serving

    with serving(ServiceSettings(served_site.root, poll_s=0.1)) as service:
        yield service


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium; the test is skipped where there is none."""
    from tests.pipelines.chromium import Browser

    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
