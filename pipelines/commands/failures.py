"""How a command that fails ends: one line on standard error, an exit code, and with --json an object."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typer.exceptions import TyperException

INTERRUPTED_EXIT_CODE = 130


def fail(kind: str, message: str, exit_code: int, as_json: bool) -> int:
    """`exit_code`, after one line on standard error; with --json also an object on standard output."""
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": line, "exit_code": exit_code}}))
    return exit_code


def usage_message(error: TyperException) -> str:
    """What is wrong with the command line, and whose help says how it is right."""
    context: Any = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "vectormill"
    return f"{error.format_message().rstrip('.')}; see {command} --help"


def storage_message(error: BaseException, arguments: Sequence[str]) -> str:
    """What went wrong and where: the file that the error names, else the locations of the command line."""
    places = [str(place) for name in ("filename", "filename2") if (place := getattr(error, name, None))]
    if not places:
        places = [argument for argument in arguments if "://" in argument]
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    where = ", ".join(places) or " ".join(arguments)
    with contextlib.suppress(AttributeError):
        reason = f"{reason} ({error.__cause__.response['Error']['Code']})"  # type: ignore[union-attr]
    return (
        f"storage failed at {where}: {reason}; check the location, the credentials and the space left, then run again"
    )


def is_interrupt(error: BaseException | None) -> bool:
    """Whether the error came of Ctrl-C: a second one, in the clean-up of a lock, ends as a RuntimeError of the lock."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def interrupted() -> int:
    """The exit code, after saying what is kept."""
    print("\ninterrupted; what was committed is kept: run the same command again to resume", file=sys.stderr)
    return INTERRUPTED_EXIT_CODE
