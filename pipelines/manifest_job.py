"""What `manifests` makes of its command line: settings, the job's words as its own parser takes them, sizes of pods."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from cluster.capacity.coefficients import measured
from cluster.capacity.pods import PodSizes
from cluster.capacity.workload import Workload
from cluster.kubernetes.cluster_sizes import job_sizes
from cluster.kubernetes.entrypoint import job_command
from cluster.kubernetes.manifest_settings import ManifestSettings
from operators.errors import ConfigError
from pipelines.config import RunConfig, converted_value, load_config
from pipelines.planning.plan_inputs import Asked, workload
from pipelines.service.settings import ServiceSettings, option

# Options of `serve` that are said otherwise here.
TOLD_BY_KEYS = {
    "host": "the service listens on its pod's address",
    "port": "Kubernetes' service has 8000",
    "replicas": "--set replicas=",
    "threads_per_replica": "--set cpus_per_replica=",
    "token_env": "--set bearer_token_secret=",
    "token_file": "--set bearer_token_secret=",
    "no_auth": "--set no_auth=true",
    "no_ray": "RayService runs on Ray",
    "as_json": "give --json before --",
}


def load_settings(assignments: Sequence[str]) -> ManifestSettings:
    """Settings from `key=value`. Raises ConfigError that names the nearest key, or the type that is wanted."""
    types = typing.get_type_hints(ManifestSettings)
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set takes key=value, got {assignment!r}; for example --set nodes=4")
        if key not in types:
            close = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
            job_setting = f"; settings of the job follow behind --: -- --set {assignment}" if "." in key else ""
            hint = job_setting or (f"; did you mean {close[0]}?" if close else "; --keys lists them all")
            raise ConfigError(f"unknown setting {key!r} (--set){hint}")
        values[key] = converted_value(key, text, types[key], "--set")
    return ManifestSettings(**values)


def setting_lines() -> list[str]:
    """Every key with its default and what it is."""
    return [
        f"{f'{field.name}={_as_text(field.default)}':<34} {field.metadata['doc']}"
        for field in dataclasses.fields(ManifestSettings)
    ]


def job_words(
    context: typer.Context, kind: str, settings: ManifestSettings, config: str | None, options: Sequence[str]
) -> tuple[list[str], RunConfig]:
    """The job's command line behind `vectormill`, and its own settings. Raises ConfigError, or the parser's own error, for wrong usage.

    Settings of a file go along as `--set`: pods do not see this machine's files.
    """
    words = [*job_command(kind, settings), *_settings_of_file(config), *options]
    given = _parsed(context, words)
    for name in ("config", "deletes", "queries", "qrels"):
        value = given.get(name)
        if value and "://" not in str(value):
            hint = "give it to manifests itself, before --" if name == "config" else "put it into object storage"
            raise ConfigError(f"--{name} {value} is a file of this machine, which pods do not see: {hint}")
    if given.get("fresh") and (kind == "cronjob" or settings.retries):
        raise ConfigError(
            "--fresh discards what was done, so that every attempt would begin anew: leave it out, or make a rayjob with"
            " --set retries=0"
        )
    assignments = given.get("assignments") or []
    named = {"encode.model": (given.get("model"), "--model"), "encode.workers": (given.get("workers"), "--workers")}
    job = load_config(None, assignments, {key: pair for key, pair in named.items() if pair[0] is not None})
    told = {assignment.partition("=")[0].strip() for assignment in assignments}
    told |= {key for key, (value, _) in named.items() if value is not None}
    on_gpus = settings.num_gpus > 0 and job.encode.device != "cpu" and job.encode.precision != "int8"
    if words[0] == "build" and on_gpus and job.encode.precision == "auto":
        # The driver runs on the head, which has no GPU to decide by.
        words += ["--set", "encode.precision=bfloat16"]
    # Idle nodes are given back before the driver asks for encoders: it must not take what is left for the whole cluster.
    wanted: dict[str, Any] = {}
    if words[0] in ("build", "update") and on_gpus:
        wanted["encode.device"] = "cuda"
    # An update on CPUs has the threads of the published version, which are not known here: its nodes stay.
    if words[0] == "build" or (words[0] == "update" and on_gpus):
        wanted["encode.workers"] = _workload(settings, job, on_gpus).most_encoders
    if words[0] != "verify":
        # A node that is lost is replaced by one that may have to be started first.
        wanted["cluster.wait_for_nodes_s"] = settings.max_start_minutes * 60
    for key, value in wanted.items():
        if key not in told:
            words += ["--set", f"{key}={value}"]
    return words, job


def service_fields(
    context: typer.Context, settings: ManifestSettings, config: str | None, options: Sequence[str]
) -> dict[str, Any]:
    """Fields of the service's settings that options of `serve` set. Raises ConfigError, or the parser's own error."""
    if config is not None:
        raise ConfigError("--config is for the settings of a job; options of the service follow behind --")
    words = ["serve", settings.root, *options]
    given, default = _parsed(context, words), _parsed(context, words[:2])
    changed = {name: value for name, value in given.items() if value != default[name]}
    for name in changed:
        if name in TOLD_BY_KEYS:
            raise ConfigError(f"{option(name)} is not for a manifest: {TOLD_BY_KEYS[name]}")
    if "row_cache_mb" in changed:
        changed["row_cache_bytes"] = changed.pop("row_cache_mb") << 20
    dataclasses.asdict(ServiceSettings(root=settings.root, **changed))  # says what cannot be
    return changed


def job_sizes_for(settings: ManifestSettings, command: str, job: RunConfig) -> PodSizes:
    """Sizes of a job's pods, from the sizing code (docs/capacity-planning.md) and the job's own settings."""
    work = _workload(settings, job, on_gpus=settings.num_gpus > 0)
    return job_sizes(settings, work, measured(), for_updates=command == "update")


def _workload(settings: ManifestSettings, job: RunConfig, on_gpus: bool) -> Workload:
    asked = Asked(
        docs=int(settings.docs),
        tokens_per_doc=settings.tokens_per_doc,
        bytes_per_doc=settings.bytes_per_doc or None,
        gpu=settings.gpu if on_gpus else "none",
        nodes=settings.nodes,
        cpus_per_node=settings.cpus_per_node,
        memory_per_node=1.0,  # what is asked for follows
        gpus_per_node=settings.num_gpus if on_gpus else 0,
    )
    return workload(asked, job, measured()["bytes_per_token"])


def _parsed(context: typer.Context, words: Sequence[str]) -> dict[str, Any]:
    program: Any = context.find_root().command
    inner = program.get_command(context, words[0])
    given: dict[str, Any] = inner.make_context(words[0], list(words[1:]), parent=context.find_root()).params
    return given


def _settings_of_file(file: str | None) -> list[str]:
    if file is None:
        return []
    load_config(file)  # says what is wrong with it
    content = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    pairs = [(f"{section}.{name}", value) for section, values in content.items() for name, value in values.items()]
    return [word for key, value in pairs for word in ("--set", f"{key}={_as_text(value)}")]


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return ",".join(value) if isinstance(value, (list, tuple)) else str(value)
