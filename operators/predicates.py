"""Plug-ins that say which rows to keep: `package.module:function`, a column expression over the rows."""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.acero as acero
import pyarrow.compute as pc

from operators.errors import ConfigError

_NAME = re.compile(r"(?!\d)\w+(\.(?!\d)\w+)*:(?!\d)\w+")


def reason_of(name: str) -> str:
    """The function's name, by which dropped rows are counted. Raises ConfigError unless `name` is module:function."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"clean.keep must name functions as package.module:function, got {name!r}")
    return name.partition(":")[2]


@dataclass(frozen=True)
class Predicate:
    """A loaded plug-in. `fingerprint` is the SHA-256 of the source of its module, and of that which defines it."""

    name: str
    reason: str
    function: Any
    fingerprint: str

    def keeps(self, rows: pa.Table) -> npt.NDArray[np.bool_]:
        """True for the rows (schemas.ROWS, at least one) to keep, bool [rows]; null counts as false.

        Raises ConfigError that names the plug-in when it fails or does not give one boolean a row.
        """
        try:
            found = self.function if isinstance(self.function, pc.Expression) else self.function(rows)
            if isinstance(found, pc.Expression):
                found = _evaluated(found, rows)
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(
                f"the plug-in {self.name} (clean.keep) failed on {rows.num_rows} rows from {rows.column('source')[0]}:"
                f" {type(error).__name__}: {first_line}"
            ) from error
        if isinstance(found, pa.ChunkedArray):
            found = found.combine_chunks()
        if not isinstance(found, pa.Array) or found.type != pa.bool_():
            got = f"{type(found).__name__} of {found.type}" if isinstance(found, pa.Array) else type(found).__name__
            raise ConfigError(
                f"the plug-in {self.name} (clean.keep) must give a pyarrow BooleanArray or a pyarrow.compute.Expression"
                f" of booleans, got {got}"
            )
        if len(found) != rows.num_rows:
            raise ConfigError(
                f"the plug-in {self.name} (clean.keep) must give one boolean for each of {rows.num_rows} rows, got {len(found)}"
            )
        return np.asarray(pc.fill_null(found, False).to_numpy(zero_copy_only=False), dtype=np.bool_)


def load_predicate(name: str) -> Predicate:
    """The plug-in that `package.module:function` names. Raises ConfigError when it cannot be imported or called."""
    reason = reason_of(name)
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"the module of the plug-in {name} (clean.keep) cannot be imported: {type(error).__name__}: {first_line};"
            " install it, or put its folder on PYTHONPATH, on every node"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function) and not isinstance(function, pc.Expression):
        raise ConfigError(
            f"the plug-in {name} (clean.keep) must be a function or a pyarrow.compute.Expression of module"
            f" {module_name}, got {function!r}"
        )
    defined_in = module_name if isinstance(function, pc.Expression) else getattr(function, "__module__", module_name)
    files = []
    for module_of in dict.fromkeys((module_name, defined_in or module_name)):
        file = getattr(sys.modules.get(module_of), "__file__", None)
        if file is None or not Path(file).is_file():
            raise ConfigError(
                f"the plug-in {name} (clean.keep) must lie in a file, whose content is part of the fingerprint;"
                f" module {module_of} has none"
            )
        files.append(Path(file).read_bytes())
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in files)).hexdigest()
    return Predicate(name, reason, function, digest)


def load_predicates(names: Sequence[str]) -> list[Predicate]:
    """Each named plug-in, in order."""
    return [load_predicate(name) for name in names]


def _evaluated(expression: pc.Expression, rows: pa.Table) -> pa.ChunkedArray:
    plan = acero.Declaration.from_sequence(
        [
            acero.Declaration("table_source", acero.TableSourceNodeOptions(rows)),
            acero.Declaration("project", acero.ProjectNodeOptions([expression], ["kept"])),
        ]
    )
    return plan.to_table(use_threads=False).column("kept")  # one thread: the rows keep their order
