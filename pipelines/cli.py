"""The command line. Commands import what they need when they run, so that help is there at once.

Exit codes: 0 done; 1 a bug; 2 wrong usage or settings; 3 to 10 the classes of operators/errors.py; 11 storage;
130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version as package_version
from typing import Annotated

import typer

from operators.errors import ConfigError, VectormillError
from pipelines.commands import index, jobs, manifests, nightly, plan, report, serve

STORAGE_EXIT_CODE = 11
# Raised by the S3 client for what s3fs does not turn into an OSError: no credentials, no such endpoint, refused calls.
STORAGE_MODULES = ("botocore", "aiobotocore", "aiohttp")

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turns a text corpus into a verified, searchable IVF-PQ index, on a laptop or a Ray cluster.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vectormill {package_version('vectormill')}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


COMMANDS: dict[str, Callable[..., None]] = {
    "build": index.build_command,
    "search": index.search_command,
    "eval": index.eval_command,
    "info": index.info_command,
    "verify": index.verify_command,
    "demo": index.demo_command,
    "update": nightly.update_command,
    "compact": nightly.compact_command,
    "drift": nightly.drift_command,
    "history": nightly.history_command,
    "rollback": nightly.rollback_command,
    "gc": nightly.gc_command,
    "plan": plan.plan_command,
    "jobs": jobs.jobs_command,
    "logs": jobs.logs_command,
    "stop": jobs.stop_command,
    "manifests": manifests.manifests_command,
    "report": report.report_command,
    "serve": serve.serve_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
# What follows the first word is the other command's, also where `--` is left out.
app.command("submit", context_settings={"allow_interspersed_args": False})(jobs.submit_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit. A user's mistake is one line on standard error; a traceback is a bug of ours."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Exit code of the command, whose output is on standard output and standard error."""
    from pipelines.commands.failures import (
        INTERRUPTED_EXIT_CODE,
        fail,
        interrupted,
        is_interrupt,
        storage_message,
        usage_message,
    )

    as_json = "--json" in arguments
    try:
        code = app(arguments, prog_name="vectormill", standalone_mode=False) or 0
    except VectormillError as error:
        return fail(type(error).__name__, str(error), error.exit_code, as_json)
    except typer.exceptions.TyperException as error:  # wrong usage
        return fail(ConfigError.__name__, usage_message(error), ConfigError.exit_code, as_json)
    except (KeyboardInterrupt, Exception) as error:
        if is_interrupt(error):
            return interrupted()
        if not isinstance(error, OSError) and not type(error).__module__.startswith(STORAGE_MODULES):
            traceback.print_exc()
            return 1
        return fail(type(error).__name__, storage_message(error, arguments), STORAGE_EXIT_CODE, as_json)
    return interrupted() if code == INTERRUPTED_EXIT_CODE else int(code)


if __name__ == "__main__":
    main()
