"""The demo's corpus: real text that every machine has, the docstrings of the installed Python packages.

Source files are parsed, never imported: importing would take minutes and run other people's code. A name that a
package re-exports is written the short way, `numpy.linalg.norm` and not `numpy.linalg._linalg.norm`; what a private
module defines and nothing public re-exports is left out.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from operators.errors import SourceError

MIN_CHARS = 200
MAX_CHARS = 4000
# Documents of each package in a corpus of 4000: several subjects, none of which drowns the others. A package that has
# fewer leaves the rest to the others, in this order.
SHARES = {"numpy": 800, "torch": 850, "transformers": 250, "pyarrow": 100, "ray": 400, "faiss": 100, "fsspec": 100}
STDLIB = "the standard library"
STDLIB_SHARE = 1400
# Of packages with thousands of files: the parts that their users know, after the files of the package's own folder.
PARTS = {
    "torch": ("nn", "linalg", "fft", "special", "optim", "utils/data", "autograd", "distributions", "cuda", "amp"),
    "transformers": ("generation", "pipelines", "data", "utils"),
    "ray": ("_private", "data", "train", "tune", "serve", "util"),
}
# Bounds the time, whatever is installed.
MAX_FILES_PER_PACKAGE = 600
# Not documentation, or the same text many times (the hundreds of models of transformers).
SKIPPED_FOLDERS = {
    "tests",
    "test",
    "testing",
    "models",
    "templates",
    "thirdparty_files",
    "site-packages",
    "__pycache__",
}
SKIPPED_FOLDERS |= {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}

SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])


def write_demo_corpus(out_path: Path, max_documents: int = 4000) -> int:
    """Number of documents written to `out_path`: zstd Parquet with the columns id, title, text.

    `id` is the unique qualified name ("numpy.linalg.norm"), `title` names module and object ("numpy.linalg: norm"),
    `text` is the cleaned docstring, 200 to 4000 characters, no two alike. Deterministic for the same installed
    packages. SourceError if there is no docstring at all.
    """
    documents = collect_documents(max_documents)
    if not documents:
        raise SourceError(
            f"the demo needs installed Python packages with docstrings, found none of {', '.join(SHARES)} nor "
            f"{STDLIB} as source files (python {sysconfig.get_python_version()}): run it in the project's .venv"
        )
    out_path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": doc.name, "title": doc.title, "text": doc.text} for doc in documents]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), out_path, compression="zstd")
    return len(rows)


@dataclass(frozen=True)
class Document:
    """One docstring and where its object is found."""

    name: str
    title: str
    text: str
    is_method: bool


def collect_documents(max_documents: int = 4000) -> list[Document]:
    """At most `max_documents` documents, ids and texts unique, package after package. Deterministic."""
    found = {package: deque[Document]() for package in (*SHARES, STDLIB)}
    names: set[str] = set()
    texts: set[str] = set()
    for package, docs in found.items():
        # Modules, functions and classes first: better known than methods. The sort keeps the order of the files.
        for doc in sorted(_package_documents(package), key=lambda doc: doc.is_method):
            if doc.name not in names and doc.text not in texts:
                names.add(doc.name)
                texts.add(doc.text)
                docs.append(doc)
    chosen: list[Document] = []
    for package, docs in found.items():
        share = max(1, SHARES.get(package, STDLIB_SHARE) * max_documents // (sum(SHARES.values()) + STDLIB_SHARE))
        chosen += [docs.popleft() for _ in range(min(share, len(docs)))]
    for docs in found.values():
        while docs and len(chosen) < max_documents:
            chosen.append(docs.popleft())
    return chosen[:max_documents]


def _package_documents(package: str) -> Iterator[Document]:
    """Documents of one package, files near its root first; nothing if it is not installed."""
    root = _source_root(package)
    if root is None:
        return
    base = root if package == STDLIB else root.parent
    library = Library(base)
    folders = [root / part for part in PARTS[package]] if package in PARTS else _folders_in(root)
    files = [*sorted(root.glob("*.py")), *(file for folder in folders for file in _source_files(folder))]
    for file in files[:MAX_FILES_PER_PACKAGE]:
        yield from library.documents(file)


def _source_root(package: str) -> Path | None:
    if package == STDLIB:
        return _stdlib_root()
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _stdlib_root() -> Path | None:
    return Path(sysconfig.get_paths()["stdlib"])


def _source_files(folder: Path) -> Iterator[Path]:
    """Python files of a folder in a fixed order, those of its sub-folders after its own."""
    yield from sorted(folder.glob("*.py"))
    for inner in _folders_in(folder):
        yield from _source_files(inner)


def _folders_in(folder: Path) -> list[Path]:
    folders = (
        [entry for entry in folder.iterdir() if entry.is_dir() and entry.name.isidentifier()] if folder.is_dir() else []
    )
    return sorted(entry for entry in folders if entry.name not in SKIPPED_FOLDERS)


@dataclass
class Module:
    """What one parsed file says: its docstrings and the names that it takes from elsewhere."""

    name: str
    docstrings: list[tuple[str, str, str]] = field(default_factory=list)  # (defining module, object, docstring)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)  # name here -> (module, name there)
    stars: list[str] = field(default_factory=list)  # modules of `from m import *`


@dataclass
class Library:
    """Parsed modules below one folder, by dotted name; each file is parsed once, when first asked for."""

    base: Path
    modules: dict[str, Module] = field(default_factory=dict)

    def documents(self, file: Path) -> Iterator[Document]:
        """Documents of one file under their public names."""
        parts = file.relative_to(self.base).with_suffix("").parts
        for module, name, docstring in self.module(".".join(parts).removesuffix(".__init__")).docstrings:
            if len(docstring.strip()) < MIN_CHARS or any(part.startswith("_") for part in name.split(".")):
                continue
            home = self.public_home(module, name.split(".")[0])
            if home is not None:
                yield Document(
                    name=f"{home}.{name}" if name else home,
                    title=f"{home}: {name}" if name else home,
                    text=docstring[:MAX_CHARS].strip(),
                    is_method="." in name,
                )

    def public_home(self, module: str, name: str) -> str | None:
        """Shortest public package that exports the object, else the module itself if that is public, else None."""
        parts = module.split(".")
        if name:
            for package in (".".join(parts[:size]) for size in range(1, len(parts))):
                if any(part.startswith("_") for part in package.split(".")):
                    break
                if self.exports(package, name, module, set()):
                    return package
        return None if any(part.startswith("_") for part in parts) else module

    def exports(self, module: str, name: str, origin: str, seen: set[tuple[str, str]]) -> bool:
        """Whether `module.name` is the object called `name` that `origin` defines."""
        if module == origin:
            return True
        if (module, name) in seen:
            return False
        seen.add((module, name))
        source = self.module(module)
        if name in source.imported:
            return self.exports(*source.imported[name], origin, seen)
        return any(self.exports(star, name, origin, seen) for star in source.stars)

    def module(self, name: str) -> Module:
        """The module of that dotted name; empty if it is not a Python file below `base` or cannot be parsed."""
        if not SKIPPED_FOLDERS.isdisjoint(name.split(".")):
            return Module(name)
        if name not in self.modules:
            path = self.base.joinpath(*name.split("."))
            package = path / "__init__.py"
            self.modules[name] = _parse(package if package.is_file() else path.with_suffix(".py"), name)
        return self.modules[name]


def _parse(file: Path, name: str) -> Module:
    module = Module(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return module
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    module.docstrings.append((name, "", ast.get_docstring(tree) or ""))
    _read_body(tree.body, "", package, module)
    return module


def _read_body(body: list[ast.stmt], prefix: str, package: str, module: Module) -> None:
    """Adds the docstrings of what a body defines, and the names that it imports, to `module`."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}.{node.name}".lstrip(".")
            module.docstrings.append((module.name, name, ast.get_docstring(node) or ""))
            if isinstance(node, ast.ClassDef):
                _read_body(node.body, name, package, module)
        elif isinstance(node, (ast.If, ast.Try)):
            handlers = [handler.body for handler in node.handlers] if isinstance(node, ast.Try) else []
            for branch in (node.body, *handlers, node.orelse):
                _read_body(branch, prefix, package, module)
        elif isinstance(node, ast.ImportFrom) and not prefix:
            _read_import(node, package, module)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
            _read_docstring_call(node.value.func.id, node.value.args, module)


def _read_import(node: ast.ImportFrom, package: str, module: Module) -> None:
    ancestors = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
    source = ".".join([*ancestors, *([node.module] if node.module else [])])
    for alias in node.names:
        if alias.name == "*":
            module.stars.append(source)
        else:
            module.imported[alias.asname or alias.name] = (source, alias.name)


def _read_docstring_call(function: str, arguments: list[ast.expr], module: Module) -> None:
    """Adds the docstring that NumPy or torch gives to a compiled object by a call when the module runs."""
    match function, arguments:
        case "add_newdoc", [ast.Constant(str(place)), ast.Constant(str(name)), ast.Constant(str(text))]:
            pass
        case "add_newdoc", [
            ast.Constant(str(place)),
            ast.Constant(str(kind)),
            ast.Tuple([ast.Constant(str(method)), ast.Constant(str(text))]),
        ]:
            name = f"{kind}.{method}"
        case "add_docstr", [ast.Attribute(owner, str(name)), ast.Constant(str(text))]:
            place = ast.unparse(owner)
        case "add_docstr", [
            ast.Attribute(owner, str(name)),
            ast.Call(ast.Attribute(ast.Constant(str(template)), "format")),
        ]:
            place = ast.unparse(owner)
            # The values are known only when torch runs; the name of an argument says enough.
            text = re.sub(r"\{(\w+)\}", r"\1", template).replace("{{", "{").replace("}}", "}")
        case _:
            return
    if place.split(".")[0] == module.name.split(".")[0]:
        module.docstrings.append((place, name, inspect.cleandoc(text)))
