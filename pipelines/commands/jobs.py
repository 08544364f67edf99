"""The commands that run other commands as jobs on a Ray cluster: submit, jobs, logs, stop. See pipelines/cli.py."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipelines.commands.options import AsJson

if TYPE_CHECKING:
    from cluster.job_log import JobEnd
    from cluster.jobs import Jobs

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="The cluster's dashboard, http://HOST:8265. Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS."
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="What submit printed; `vectormill jobs` lists them.")]
INTERRUPTED = 130


def submit_command(
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND", help="build, update, compact, eval, drift, gc or verify, as it is given here."
        ),
    ],
    address: Address = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job to its end, or only submit it.")
    ] = True,
    code: Annotated[
        str, typer.Option(metavar="ship|image", help="Take this checkout along, or use what the nodes' image has.")
    ] = "ship",
    requirements: Annotated[
        str, typer.Option(metavar="none|pinned", help="The nodes have them, or install constraints.txt there first.")
    ] = "none",
    set_env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="Variable for driver and workers; may repeat. No credentials."),
    ] = None,
    submission_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Default: made from command and time.")
    ] = None,
    cpus: Annotated[
        float, typer.Option(metavar="N", help="CPU slots of the driver. With none of these three it is on the head.")
    ] = 0,
    gpus: Annotated[float, typer.Option(metavar="N", help="GPUs of the driver.")] = 0,
    memory_gb: Annotated[float, typer.Option(metavar="GB", help="Memory that Ray sets aside for the driver.")] = 0,
    shared_filesystem: Annotated[
        bool, typer.Option("--shared-filesystem", help="Local paths mean the same on all nodes and here.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a command as a job on a Ray cluster.

    The driver runs in the cluster; Ctrl-C leaves it running. The exit code is the command's own. Submit again after a
    failure: it goes on with what was committed. Of two at one root only one publishes.

    \b
    Example:
      vectormill submit --address http://head:8265 -- build s3://bucket/docs/ --out s3://bucket/index
      vectormill submit --no-wait -- update s3://bucket/docs/ --index s3://bucket/index
    """
    from cluster.job_log import follow
    from cluster.jobs import Jobs, Submission, find_address
    from operators.errors import ConfigError
    from pipelines.commands.output import print_json
    from pipelines.submission import job_variables, new_submission_id, prepare_command

    for name, value, allowed in (("code", code, ("ship", "image")), ("requirements", requirements, ("none", "pinned"))):
        if value not in allowed:
            raise ConfigError(f"--{name} must be {' or '.join(allowed)}, got {value!r}")
    given = _parse(context, command)
    prepared = prepare_command(command, given, shared_filesystem=shared_filesystem)
    if requirements == "pinned" and code == "image":
        raise ConfigError(
            "pinned requirements are those of the code that is shipped (--code ship); an image has its own"
        )
    if prepared.files and code == "image":
        raise ConfigError(f"local files travel with the code only (--code ship), got {', '.join(prepared.files)}")
    wanted = Submission(
        prepared.words,
        prepared.root,
        submission_id or new_submission_id(command[0]),
        ship_code=code == "ship",
        pinned_requirements=requirements == "pinned",
        files=prepared.files,
        variables=job_variables(set_env or [], os.environ),
        num_cpus=cpus,
        num_gpus=gpus,
        memory_bytes=int(memory_gb * 1e9),
        submitted_by=f"{getpass.getuser()}@{socket.gethostname()}",
    )
    jobs = Jobs(find_address(address))
    _warn_of_other_ray(jobs)
    jobs.submit(wanted)
    job_id = wanted.submission_id
    as_json = as_json or "--json" in command
    where = f" --address {address}" if address else ""
    if not wait:
        if as_json:
            print_json({"submission_id": job_id, "address": jobs.address, "command": prepared.words})
        else:
            print(f"submitted {job_id}; vectormill logs {job_id} --follow{where}")
        return
    _say(f"submitted {job_id} to {jobs.address}")
    with _left_running(job_id, where):
        end = follow(jobs, job_id, (_say if as_json else _print), _say)
    _finish(end, as_json)


def jobs_command(
    address: Address = None,
    everything: Annotated[bool, typer.Option("--all", help="Also jobs that are not vectormill's.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the jobs of a cluster, the newest first.

    \b
    Example:
      vectormill jobs --address http://head:8265
    """
    from cluster.jobs import Jobs, find_address
    from pipelines.commands.jobs_output import job_facts, show_jobs
    from pipelines.commands.output import print_json

    found = Jobs(find_address(address)).list(others=everything)
    if as_json:
        print_json([job_facts(job) for job in found])
    else:
        show_jobs(found)


def logs_command(
    job: JobId,
    address: Address = None,
    keep_on: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a job has written.

    With --follow the exit code is that of the job's command; Ctrl-C leaves the job running.

    \b
    Example:
      vectormill logs build-20261121-192500-3fa9 --follow
    """
    from cluster.job_log import follow
    from cluster.jobs import Jobs, find_address
    from pipelines.commands.jobs_output import job_facts
    from pipelines.commands.output import print_json

    jobs = Jobs(find_address(address))
    if keep_on:
        with _left_running(job, f" --address {address}" if address else ""):
            end = follow(jobs, job, (_say if as_json else _print), _say)
        _finish(end, as_json)
    elif as_json:
        print_json({**job_facts(jobs.get(job)), "log": jobs.log(job)})
    else:
        sys.stdout.write(jobs.log(job))


def stop_command(job: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """End a job; what it has committed is kept.

    \b
    Example:
      vectormill stop build-20261121-192500-3fa9
    """
    from cluster.jobs import Jobs, find_address
    from pipelines.commands.output import print_json

    jobs = Jobs(find_address(address))
    was_running = jobs.stop(job)
    state = jobs.get(job).state
    if as_json:
        print_json({"submission_id": job, "was_running": was_running, "state": state})
    elif was_running:
        print(f"{job} is being stopped; what was committed is kept, submit the same command again to resume")
    else:
        print(f"{job} was not running ({state})")


def _parse(context: typer.Context, command: list[str]) -> dict[str, Any]:
    """Values of the command's parameters. Wrong usage is found here, before anything is submitted."""
    from operators.errors import ConfigError
    from pipelines.submission import COMMANDS

    if command[0] not in COMMANDS:
        raise ConfigError(f"a job runs {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}, got {command[0]!r}")
    program: Any = context.find_root().command
    inner = program.get_command(context, command[0])
    given: dict[str, Any] = inner.make_context(command[0], command[1:], parent=context.find_root()).params
    if given.get("assignments") or given.get("config"):
        from pipelines.config import load_config

        load_config(given.get("config"), given.get("assignments") or [])
    return given


def _warn_of_other_ray(jobs: Jobs) -> None:
    from importlib.metadata import version

    ours, theirs = version("ray"), jobs.ray_version
    if theirs and theirs.split(".")[:2] != ours.split(".")[:2]:
        _say(f"the cluster runs Ray {theirs}, this program was tested with {ours}")


@contextmanager
def _left_running(job_id: str, where: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say(f"\nleft running: {job_id}")
        _say(f"  vectormill logs {job_id} --follow{where}")
        _say(f"  vectormill stop {job_id}{where}")
        _leave(INTERRUPTED)


def _leave(code: int) -> NoReturn:
    """Exit; not by typer.Exit when interrupted, for which pipelines/cli.py has words of its own."""
    raise SystemExit(code) if code == INTERRUPTED else typer.Exit(code)


def _finish(end: JobEnd, as_json: bool) -> None:
    """Tell the end, and exit as the command did."""
    from pipelines.commands.jobs_output import exit_code, job_facts
    from pipelines.commands.output import print_json

    code = exit_code(end)
    if as_json:
        error = {"error": {"message": end.error, "exit_code": code}} if end.error else {}
        print_json({**job_facts(end.job), **error, "result": end.result})
    if end.error is not None:
        print(f"error: {end.error}", file=sys.stderr)
        _leave(code)


def _print(line: str) -> None:
    print(line, flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
