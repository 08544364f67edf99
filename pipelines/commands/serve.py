"""The command that serves an index over HTTP. See pipelines/cli.py."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from pipelines.commands.options import AsJson, Model, Nprobe, RefineFactor, Root


def serve_command(
    root: Root,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="0: any that is free (--no-ray only).")] = 8000,
    replicas: Annotated[int, typer.Option(metavar="N", help="Processes that each hold the index open.")] = 1,
    threads_per_replica: Annotated[int, typer.Option(metavar="T", help="CPU threads of each.")] = 1,
    token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the bearer token to ask for.")
    ] = None,
    token_file: Annotated[str | None, typer.Option(metavar="FILE", help="File with the bearer token.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let others in without a token.")] = False,
    recall: Annotated[
        float | None, typer.Option(metavar="R", help="In place of the two below: the operating point for it (eval).")
    ] = None,
    nprobe: Nprobe = None,
    refine_factor: RefineFactor = None,
    model: Model = None,
    max_k: Annotated[int, typer.Option(metavar="K", help="Most hits for a query.")] = 1000,
    max_batch: Annotated[int, typer.Option(metavar="N", help="Most queries of a request.")] = 256,
    max_nprobe: Annotated[int, typer.Option(metavar="N", help="Most lists that a request may have scanned.")] = 1024,
    max_refine_factor: Annotated[int, typer.Option(metavar="N", help="Largest refine factor of a request.")] = 64,
    max_hits: Annotated[int, typer.Option(metavar="N", help="Most hits of a request, over all its queries.")] = 10_000,
    max_candidates: Annotated[
        int, typer.Option(metavar="N", help="Most candidates of a query that are scored again: k * refine factor.")
    ] = 20_000,
    max_query_chars: Annotated[int, typer.Option(metavar="N", help="Longest query text.")] = 8192,
    max_body_bytes: Annotated[int, typer.Option(metavar="B", help="Largest request.")] = 8 << 20,
    max_queue: Annotated[int, typer.Option(metavar="N", help="Queries of a replica that may wait.")] = 512,
    deadline_s: Annotated[float, typer.Option(metavar="S", help="After it a request is refused.")] = 5.0,
    drain_s: Annotated[float, typer.Option(metavar="S", help="For requests in flight when the service ends.")] = 15.0,
    row_cache_mb: Annotated[int, typer.Option(metavar="MB", help="Decoded rows that a replica keeps.")] = 256,
    poll_s: Annotated[float, typer.Option(metavar="S", help="Between two looks for a new version.")] = 1.0,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="One replica in this process, without Ray.")] = False,
    proxy: Annotated[
        bool, typer.Option("--proxy", help="Let Ray Serve's HTTP proxy listen, not the replicas themselves. Slower.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Serve the published version over HTTP.

    Follows CURRENT: a new version is opened beside the old one and takes its place with no failed request. On loopback
    unless told otherwise. POST /v1/search, GET /v1/index, /healthz, /readyz, /metrics, /openapi.json, and a page at /.

    \b
    Example:
      vectormill serve index
      vectormill serve s3://bucket/index --host 0.0.0.0 --token-env TOKEN --replicas 4 --recall 0.95
    """
    from operators.errors import ConfigError
    from pipelines.commands.output import clean_stdout, print_json

    if no_ray and replicas != 1:
        raise ConfigError(f"--no-ray is one process, got --replicas {replicas}; leave one of them out")
    if port == 0 and not no_ray:
        raise ConfigError("Ray Serve needs a port, got 0 (--port)")

    out = sys.stdout

    def ready(facts: dict[str, object]) -> None:
        with contextlib.redirect_stdout(out):
            if as_json:
                print_json(facts)
            else:
                print(f"serving {facts['version']} of {facts['root']} at {facts['url']} ({facts['how']})", flush=True)

    with clean_stdout():
        from pipelines.serve import plan_serve, serve_in_process, serve_on_ray
        from pipelines.service.settings import ServiceSettings

        settings = ServiceSettings(
            root=root,
            model=model,
            nprobe=nprobe,
            refine_factor=refine_factor,
            recall=recall,
            threads=threads_per_replica,
            max_k=max_k,
            max_nprobe=max_nprobe,
            max_refine_factor=max_refine_factor,
            max_batch=max_batch,
            max_hits=max_hits,
            max_candidates=max_candidates,
            max_query_chars=max_query_chars,
            max_body_bytes=max_body_bytes,
            max_queue=max_queue,
            deadline_s=deadline_s,
            drain_s=drain_s,
            row_cache_bytes=row_cache_mb << 20,
            poll_s=poll_s,
            token_env=token_env,
            token_file=token_file,
        )
        plan = plan_serve(settings, host, port, replicas, no_auth=no_auth)
        if no_ray:
            serve_in_process(plan, ready)
        else:
            serve_on_ray(plan, ready, proxy=proxy)
