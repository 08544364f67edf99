"""The command that writes Kubernetes resources: manifests. See pipelines/cli.py and docs/cluster.md."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import AsJson


def manifests_command(
    context: typer.Context,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="rayjob, cronjob or rayservice.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- OPTIONS", help="Further options of the job's command, or of serve."),
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; may repeat. See --keys.")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="The job's own settings: a TOML file.")
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List the settings, with defaults, and end.")] = False,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Default: standard output.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write KubeRay resources: a build, a nightly update, or the service.

    What is written holds no secret and can be kept in a repository; `kubectl apply -f` takes it. Sizes of pods come from
    the sizing code. docs/cluster.md goes through it from an empty cluster on.

    \b
    Example:
      vectormill manifests --kind rayjob --set image=registry/vectormill:1 --set sources=s3://bucket/docs/ \\
          --set root=s3://bucket/index -- --set index.nlist=65536
      vectormill manifests --kind rayservice --set image=registry/vectormill:1 --set root=s3://bucket/index \\
          --set bearer_token_secret=search-token -- --recall 0.95
    """
    from pathlib import Path

    from cluster.kubernetes.cluster_sizes import service_sizes
    from cluster.kubernetes.manifest_yaml import as_yaml
    from cluster.kubernetes.manifests import check_kind, job_manifests, service_manifests
    from pipelines.commands.output import print_json
    from pipelines.manifest_job import job_sizes_for, job_words, load_settings, service_fields, setting_lines

    if keys:
        print("\n".join(setting_lines()))
        return
    kind, settings = check_kind(kind), load_settings(assignments or [])
    if kind == "rayservice":
        from pipelines.serve import SERVE_ENVIRONMENT

        fields = service_fields(context, settings, config, options or [])
        resources = service_manifests(settings, service_sizes(settings), fields, SERVE_ENVIRONMENT)
    else:
        words, job = job_words(context, kind, settings, config, options or [])
        resources = job_manifests(kind, settings, job_sizes_for(settings, words[0], job), words)
    if out is not None:
        Path(out).write_text(as_yaml(resources), encoding="utf-8")
    if as_json:
        print_json({"kind": kind, "resources": resources, "out": out})
    elif out is None:
        print(as_yaml(resources), end="")
    else:
        print(f"{', '.join(resource['kind'] for resource in resources)} are in {out}")
