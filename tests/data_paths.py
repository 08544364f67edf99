"""Where the real judged collections lie: beside the checkout, or where VECTORMILL_TEST_DATA points."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("VECTORMILL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def collection(name: str) -> Path:
    """Folder of a collection (cranfield, scifact, medquad, vectors-glove100d); skips the test where it is absent."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"real data '{name}' is not at {folder} (set VECTORMILL_TEST_DATA)")
    return folder
