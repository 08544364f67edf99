"""Who may import whom, read from the source, and what imports cleanly where Ray, faiss and cupy are absent."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# kernels <- operators <- pipelines, and cluster <- pipelines. cluster runs operators, so it may import them.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "operators": {"operators", "kernels"},
    "cluster": {"cluster", "operators", "kernels"},
    "pipelines": {"pipelines", "cluster", "operators", "kernels"},
    "benchmarks": {"benchmarks", "pipelines", "cluster", "operators", "kernels"},
}
OURS = {*MAY_IMPORT, "tests"}
# Anywhere in the folder, also inside functions.
NEVER = {"kernels": {"ray", "pyarrow"}, "operators": {"ray"}}
# At module level; inside a function they may be imported.
ONLY_LAZILY = {"kernels": {"faiss", "cupy"}}


def source_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_packages(file: Path, *, at_module_level: bool = False) -> Iterator[tuple[str, int]]:
    """First component of every imported name, with its line; optionally only what runs when the module is imported."""
    nodes: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"), filename=str(file))]
    while nodes:
        node = nodes.pop()
        if at_module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if at_module_level and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            own = file.relative_to(ROOT).parts[0]
            yield (own if node.level else (node.module or "").split(".")[0]), node.lineno
        nodes += ast.iter_child_nodes(node)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_lies_below_them(folder: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {package}"
        for file in source_files(folder)
        for package, line in imported_packages(file)
        if (package in OURS and package not in MAY_IMPORT[folder]) or package in NEVER.get(folder, ())
    ]
    assert not wrong


@pytest.mark.parametrize("folder", ONLY_LAZILY)
def test_optional_libraries_are_imported_inside_functions(folder: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {package} at module level"
        for file in source_files(folder)
        for package, line in imported_packages(file, at_module_level=True)
        if package in ONLY_LAZILY[folder]
    ]
    assert not wrong


def test_files_are_named_after_what_they_hold() -> None:
    forbidden = {"utils", "util", "helpers", "helper", "common", "misc"} | set(sys.stdlib_module_names)
    wrong = [
        str(path.relative_to(ROOT))
        for folder in OURS
        for file in source_files(folder)
        for path in (file, file.parent)
        if path.stem in forbidden - {"__future__"}
    ]
    assert not sorted(set(wrong))


def test_kernels_package_imports_nothing_and_stays_at_version_zero() -> None:
    file = ROOT / "kernels" / "__init__.py"
    assert not list(imported_packages(file))
    assert '__version__ = "0.0.0"' in file.read_text(encoding="utf-8")


def test_kernels_import_where_ray_pyarrow_faiss_and_cupy_are_absent() -> None:
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in source_files("kernels")]
    absent = ("ray", "pyarrow", "faiss", "cupy")
    code = f"import sys, importlib\nfor name in {absent}: sys.modules[name] = None\n"
    code += f"for name in {modules}: importlib.import_module(name.removesuffix('.__init__'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transformers_does_not_take_our_kernels_folder_for_its_own() -> None:
    code = "from transformers import AutoModel\nfrom transformers.utils import is_kernels_available\n"
    code += "import kernels\nassert kernels.__version__ == '0.0.0'\nassert not is_kernels_available()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
