"""What travels with a submitted job: the code of this checkout, files that the command names, pinned requirements."""

from __future__ import annotations

import hashlib
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.session import REPOSITORY
from operators.errors import ConfigError

PACKAGES = ("kernels", "operators", "cluster", "pipelines")
PROJECT_FILES = ("pyproject.toml", "constraints.txt")
SHIPPED_FILES = "submitted"  # folder for the files that the command names
MAX_FILES_BYTES = 64 << 20  # Ray keeps packages in the memory of the head node and refuses those over 512 MB
# Ray puts it in place of this when it installs the requirements, on every node.
_WORKING_DIR = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"


def write_package(folder: Path, files: Mapping[str, Path]) -> None:
    """Copy what a job needs into the empty `folder`: Ray's working_dir. Same code and files, same bytes.

    files: paths relative to `folder`, and the local files that go there. Raises ConfigError when they are too large, or
    when this program does not run from a checkout.
    """
    missing = [name for name in (*PACKAGES, *PROJECT_FILES) if not (REPOSITORY / name).exists()]
    if missing:
        raise ConfigError(
            f"to ship the code vectormill must run from a checkout, but {REPOSITORY} lacks {', '.join(missing)}; run it from"
            " one, or use what the cluster's image has (--code image)"
        )
    for package in PACKAGES:
        shutil.copytree(
            REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
        )
    for name in PROJECT_FILES:
        shutil.copyfile(REPOSITORY / name, folder / name)
    version = _project()["version"]
    # Versions are read from an installed distribution's metadata, which the nodes may not have.
    metadata = folder / f"vectormill-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vectormill\nVersion: {version}\n")
    size = sum(path.stat().st_size for path in files.values())
    if size > MAX_FILES_BYTES:
        raise ConfigError(
            f"the files that a job takes along must be at most {MAX_FILES_BYTES >> 20} MB, got {size / (1 << 20):.0f} MB"
            f" ({', '.join(str(path) for path in files.values())}); put them into object storage"
        )
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def pinned_requirements() -> dict[str, Any]:
    """Ray's `pip` field: what vectormill needs at the versions of constraints.txt, Ray itself apart (the cluster's is used)."""
    needed = [line for line in _project()["dependencies"] if not line.startswith("ray[")]
    # Nodes keep what they installed by these lines, so other constraints must make other lines.
    digest = hashlib.sha256((REPOSITORY / "constraints.txt").read_bytes()).hexdigest()
    return {
        "packages": [f"# constraints.txt {digest[:16]}", f"-c {_WORKING_DIR}/constraints.txt", *needed],
        "pip_check": False,
    }


def _project() -> dict[str, Any]:
    return dict(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"])
