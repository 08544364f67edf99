"""Lists of document ids to delete."""

from __future__ import annotations

import json
import posixpath

from operators.errors import ConfigError
from pipelines.search import read_file, read_table_columns

ID_NAMES = ("_id", "id", "doc_id")
OPTION = "--deletes"


def read_ids(path: str) -> list[str]:
    """Ids of a file: .txt (one a line), .jsonl or .parquet (the first of _id, id, doc_id that it has).

    Blank lines are skipped. Raises ConfigError naming file and line for what is not an id.
    """
    suffix = posixpath.splitext(path)[1].lower()
    if suffix not in (".txt", ".jsonl", ".parquet"):
        raise ConfigError(f"a file of ids must end in .txt, .jsonl or .parquet, got {path!r} ({OPTION})")
    if suffix == ".parquet":
        return [str(value) for value in read_table_columns(path, ID_NAMES, OPTION)]
    try:
        lines = read_file(path, OPTION).decode().split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"a file of ids must be UTF-8, {path!r} is not at byte {error.start} ({OPTION})") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if suffix == ".txt":
        return [line.strip() for _, line in numbered]
    return [_id_of(line, number, path) for number, line in numbered]


def _id_of(line: str, number: int, path: str) -> str:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(
            f"a line of {path!r} must be a JSON object, line {number} is not: {error} ({OPTION})"
        ) from None
    named = [fields[name] for name in ID_NAMES if name in fields] if isinstance(fields, dict) else [fields]
    if not named or isinstance(named[0], (dict, list, bool, float)) or named[0] is None:
        raise ConfigError(
            f"a line of {path!r} must have an id in {' or '.join(ID_NAMES)}, line {number} has none ({OPTION})"
        )
    return str(named[0])
