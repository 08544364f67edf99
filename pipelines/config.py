"""The configuration of a run: sections of settings from their owners, a TOML file, --set, and command-line options.

Later sources win: defaults, then the file, then --set, then named options. Unknown keys are errors that name the
nearest valid one. Semantic fields are fingerprinted, operational ones may differ between attempts.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.session import ClusterConfig
from operators.chunker import ChunkConfig
from operators.cleaner import CleanConfig
from operators.encoding.encode_config import EncodeConfig
from operators.errors import ConfigError
from operators.index_config import IndexConfig
from operators.settings import semantic_fields
from operators.sources.read_config import ReadConfig


@dataclass(frozen=True)
class RunConfig:
    """All sections."""

    read: ReadConfig = field(default_factory=ReadConfig)
    clean: CleanConfig = field(default_factory=CleanConfig)
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def semantic(self, *sections: str) -> dict[str, Any]:
        """Semantic fields of the named sections (all: none named) as `section.field`."""
        chosen = {name: getattr(self, name) for name in sections or [f.name for f in dataclasses.fields(self)]}
        return {f"{name}.{key}": value for name, part in chosen.items() for key, value in semantic_fields(part).items()}

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON."""
        return dataclasses.asdict(self)


Change = tuple[str, Any, str]  # dotted key, value (text from --set is still to be parsed), where it came from


def load_config(
    file: str | None = None,
    assignments: Sequence[str] = (),
    options: dict[str, tuple[Any, str]] | None = None,
    base: RunConfig | None = None,
) -> RunConfig:
    """Configuration from a TOML file, `key=value` assignments and options {dotted key: (value, option name)}.

    What they do not name is as in `base`, or the default.
    Raises ConfigError naming the key, the value, where it came from and the nearest valid key.
    """
    changes: list[Change] = []
    if file is not None:
        changes += _file_changes(file)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, got {assignment!r}; for example --set chunk.mode=truncate")
        changes.append((key.strip(), text, "--set"))
    changes += [(key, value, origin) for key, (value, origin) in (options or {}).items()]
    by_section: dict[str, dict[str, Any]] = {}
    for key, value, origin in changes:
        section, name, converted = _checked(key, value, origin)
        by_section.setdefault(section, {})[name] = converted
    start = base or RunConfig()
    changed = {name: dataclasses.replace(getattr(start, name), **values) for name, values in by_section.items()}
    return dataclasses.replace(start, **changed)


def config_of_version(stored: dict[str, Any]) -> RunConfig:
    """The semantic settings that a version was made with, and its model; the operational ones are this machine's.

    stored: `Manifest.config`.
    """
    sections = {}
    for section in dataclasses.fields(RunConfig):
        kind = _section_type(section.name)
        semantic_names = {*semantic_fields(kind()), *(["model"] if section.name == "encode" else [])}
        values = {name: value for name, value in stored.get(section.name, {}).items() if name in semantic_names}
        sections[section.name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    return RunConfig(**sections)


def _section_type(name: str) -> Any:
    return typing.get_type_hints(RunConfig)[name]


def valid_keys() -> list[str]:
    """Every dotted key."""
    return [
        f"{s.name}.{f.name}" for s in dataclasses.fields(RunConfig) for f in dataclasses.fields(_section_type(s.name))
    ]


def _file_changes(file: str) -> list[Change]:
    try:
        content = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration file {file!r} does not exist (--config)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"configuration file {file!r} is not valid TOML: {error} (--config)") from None
    changes: list[Change] = []
    for section, values in content.items():
        if not isinstance(values, dict):
            changes.append((section, values, file))  # refused below: a key needs its section
            continue
        changes += [(f"{section}.{name}", value, file) for name, value in values.items()]
    return changes


def _checked(key: str, value: Any, origin: str) -> tuple[str, str, Any]:
    if key not in valid_keys():
        close = difflib.get_close_matches(key, valid_keys(), n=1, cutoff=0.5)
        ending = [k for k in valid_keys() if k.split(".", 1)[1] == key]
        hint = f"; did you mean {(ending or close)[0]}?" if ending or close else f"; sections: {', '.join(_sections())}"
        raise ConfigError(f"unknown setting {key!r} ({origin}){hint}")
    section, name = key.split(".", 1)
    wanted = typing.get_type_hints(_section_type(section))[name]
    return section, name, converted_value(key, value, wanted, origin)


def _sections() -> list[str]:
    return [f.name for f in dataclasses.fields(RunConfig)]


def converted_value(key: str, value: Any, wanted: Any, origin: str) -> Any:
    """`value` as the field's type; text from the command line is parsed, TOML values must fit."""
    from_text = origin == "--set"
    base = typing.get_origin(wanted) or wanted
    if isinstance(wanted, types.UnionType) or base is typing.Literal:
        base = str
    if from_text and base is not str:  # the space at the end of a prompt counts
        value = value.strip()
    try:
        if base is tuple:
            items = [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else list(value)
            if all(isinstance(item, str) for item in items):
                return tuple(items)
        elif base is bool:
            if isinstance(value, bool):
                return value
            if from_text and value.lower() in ("true", "false"):
                return value.lower() == "true"
        elif base is int and not isinstance(value, bool):
            if isinstance(value, int) or from_text:
                return int(str(value).replace("_", ""))
        elif base is float and not isinstance(value, bool):
            if isinstance(value, (int, float)) or from_text:
                return float(value)
        elif base is str and isinstance(value, str):
            return value
    except (ValueError, TypeError):
        pass
    raise ConfigError(f"{key} must be of type {getattr(base, '__name__', base)}, got {value!r} ({origin})")
