"""The command lines of a job, as one line of shell that reaches `vectormill` word for word."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from cluster.kubernetes.manifest_settings import ManifestSettings
from operators.errors import ConfigError

DEFAULT_COMMAND = {"rayjob": "build", "cronjob": "update"}
ROOT_OPTION = {"build": "--out", "update": "--index"}  # for others ROOT is an argument


def job_command(kind: str, settings: ManifestSettings) -> list[str]:
    """Words behind `vectormill` that the settings stand for: the command, sources and root. ConfigError if some are missing."""
    command = settings.command or DEFAULT_COMMAND[kind]
    if not settings.root:
        raise ConfigError("root must be given: the s3:// URL of the index (--set root=s3://bucket/index)")
    if command not in ROOT_OPTION:
        if settings.sources:
            raise ConfigError(f"{command} takes no sources, got {', '.join(settings.sources)} (--set sources=)")
        return [command, settings.root]
    if not settings.sources:
        raise ConfigError(f"{command} needs sources: the s3:// URLs of the corpus (--set sources=s3://bucket/docs/)")
    return [command, *settings.sources, ROOT_OPTION[command], settings.root]


def entrypoint(steps: Sequence[Sequence[str]]) -> str:
    """RayJob's `entrypoint` for one command line of vectormill after the other, as long as they succeed.

    KubeRay makes the line a part of a shell script in the submitter's container; Ray quotes its words again for the
    shell on the head (`ray job submit`). Kubernetes puts $ for $$ in a container's arguments, and replaces $(NAME).
    Raises ConfigError for a line break or another control character: they would not survive.
    """
    for argument in (word for step in steps for word in step):
        if any(ord(character) < 32 or ord(character) == 127 for character in argument):
            raise ConfigError(f"an argument of a job must have no control characters, got {argument!r}")
    lines = [shlex.join(["vectormill", *step]) for step in steps]
    # More than one: a shell of their own, or the submitter would run all but the first.
    line = lines[0] if len(lines) == 1 else shlex.join(["sh", "-c", " && ".join(lines)])
    return line.replace("$", "$$")
