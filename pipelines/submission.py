"""From a command line here to a job there: what is checked before it is submitted, and what travels with it."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.job_package import SHIPPED_FILES
from operators.errors import ConfigError

COMMANDS = ("build", "update", "compact", "eval", "drift", "gc", "verify")
# Options that name small local files, which travel with the job.
FILE_OPTIONS = ("--config", "--deletes", "--queries", "--qrels")
ROOT_PARAMETERS = ("out", "index", "root")
# Ray shows the variables of a job in its dashboard and writes them to its logs.
SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_?KEY|PRIVATE", re.IGNORECASE)


@dataclass(frozen=True)
class PreparedCommand:
    """A command line that can run in the cluster."""

    words: list[str]
    root: str
    files: dict[str, Path] = field(default_factory=dict)  # see cluster/job_package.py


def prepare_command(words: Sequence[str], given: Mapping[str, Any], *, shared_filesystem: bool) -> PreparedCommand:
    """The command line as the driver in the cluster gets it.

    given: the values of its parameters as its own parser found them. Local SOURCE and ROOT are refused, or made absolute
    where all nodes share them; files that options name are renamed to where they travel. Raises ConfigError.
    """
    places = [str(source) for source in given.get("sources") or []]
    roots = [str(given[name]) for name in ROOT_PARAMETERS if given.get(name)]
    local = [place for place in (*places, *roots) if "://" not in place]
    if local and not shared_filesystem:
        raise ConfigError(
            f"{local[0]!r} is a path of this machine, which the nodes of the cluster do not see: use object storage"
            " (s3://bucket/...), or, if every node and this machine have it mounted at the same place, --shared-filesystem"
        )
    renamed = {place: os.path.abspath(place) for place in local}
    files: dict[str, Path] = {}
    sent: list[str] = []
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        if option in FILE_OPTIONS:
            word = _travelling(word, files)
        elif equals and name in FILE_OPTIONS:
            word = f"{name}={_travelling(value, files)}"
        elif word in renamed:
            word = renamed[word]
        elif equals and f"--{name.lstrip('-')}" in ("--out", "--index") and value in renamed:
            word = f"{name}={renamed[value]}"
        option = word
        sent.append(word)
    root = renamed.get(roots[0], roots[0]) if roots else ""
    return PreparedCommand(sent, root, files)


def _travelling(path: str, files: dict[str, Path]) -> str:
    """Where a local file will lie for the driver; a path that is not one here stays as it is."""
    if "://" in path or not Path(path).is_file():
        return path
    name = f"{SHIPPED_FILES}/{len(files)}-{Path(path).name}"
    files[name] = Path(path)
    return name


def job_variables(given: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for the job from NAME (its value here) and NAME=VALUE. Raises ConfigError for secrets."""
    found: dict[str, str] = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--set-env takes NAME or NAME=VALUE, got {entry!r}")
        if SECRET.search(name):
            raise ConfigError(
                f"{name} looks like a credential, and Ray shows a job's variables to everybody who sees its dashboard or logs"
                " (--set-env): give the nodes their own (a role or service account, or a mounted secret; docs/cluster.md)"
            )
        if not equals and name not in environment:
            raise ConfigError(f"the variable {name} is not set here, so it cannot be passed on (--set-env)")
        found[name] = value if equals else environment[name]
    return found


def new_submission_id(command: str) -> str:
    """`build-20261121-192500-3fa9`: sorts by time in every list, and is not given twice."""
    return f"{command}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
