"""The Dockerfile, as far as that can be checked without Docker: what it copies, installs and runs as."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTIONS = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT"}
Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    """(instruction, its text) in their order, lines that continue joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [line.strip().partition(" ") for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    assert {name for name, _, _ in found} <= INSTRUCTIONS
    return [(name, rest.strip()) for name, _, rest in found]


def texts(wanted: str) -> list[str]:
    return [text for name, text in instructions() if name == wanted]


def copied() -> list[str]:
    """Sources of all COPY instructions."""
    return [source for text in texts("COPY") for source in shlex.split(text)[:-1]]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file out: the last pattern that fits it, or a folder above it, decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        negated, pattern = line.startswith("!"), line.removeprefix("!")
        parts = Path(path).parts
        heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        anywhere = pattern.removeprefix("**/")
        if any(
            fnmatch.fnmatchcase(head.rsplit("/", 1)[-1], anywhere)
            if pattern != anywhere
            else fnmatch.fnmatchcase(head, pattern)
            for head in heads
        ):
            ignored = not negated
    return ignored


def pip_commands() -> list[list[str]]:
    """Words of every `pip install` in RUN instructions, behind `install`."""
    found = re.findall(r"python -m pip install ([^&]*)", " && ".join(texts("RUN")))
    return [shlex.split(words) for words in found]


def test_what_is_copied_is_there_and_reaches_the_build() -> None:
    assert [source for source in copied() if not (ROOT / source).exists()] == []
    tracked = subprocess.run(["git", "ls-files", *copied()], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [path for path in tracked.stdout.splitlines() if is_ignored(path)] == []


def test_nothing_else_reaches_the_build() -> None:
    others = [
        ".git/HEAD",
        ".venv/bin/python",
        "tests/conftest.py",
        "kernels/__pycache__/x.cpython-311.pyc",
        "demo/a",
        "Makefile",
    ]
    assert [path for path in others if not is_ignored(path)] == []


def test_all_folders_of_the_distribution_are_copied() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [include] = re.findall(r"^include = (\[.*\])$", text, flags=re.MULTILINE)
    assert {name.removesuffix("*") for name in json.loads(include)} <= set(copied())


def test_it_runs_vectormill_and_not_as_root() -> None:
    order = [name for name, _ in instructions()]
    assert texts("ENTRYPOINT") == ['["vectormill"]']
    # By number: Kubernetes' runAsNonRoot cannot look a name up.
    assert texts("USER") == ["1000:1000"]
    assert order.index("USER") > max(place for place, name in enumerate(order) if name in ("RUN", "COPY"))
    assert "useradd --uid 1000" in texts("RUN")[0]
    assert "HF_HUB_OFFLINE=1" in texts("ENV")[0]


def test_dependencies_come_before_the_code_and_at_the_pinned_versions() -> None:
    order = instructions()
    dependencies = next(
        place for place, (name, text) in enumerate(order) if name == "RUN" and "-c constraints.txt" in text
    )
    code = next(place for place, (name, text) in enumerate(order) if (name, text) == ("COPY", "kernels kernels"))
    assert dependencies < code
    with_dependencies, without = pip_commands()
    assert with_dependencies[:3] == ["--no-cache-dir", "-c", "constraints.txt"]
    assert "--no-deps" in without
    # What is installed beside the project's own dependencies is pinned, too.
    named = [word for word in with_dependencies[3:] if not word.startswith(".")]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert [name for name in named if not re.search(rf"^{re.escape(name)}==", pins, flags=re.MULTILINE)] == []


def test_the_image_has_what_kuberay_and_ray_up_run_in_it() -> None:
    assert {"bash", "wget", "rsync", "openssh-client"} <= set(shlex.split(texts("RUN")[0]))


def test_its_python_is_one_that_is_supported() -> None:
    [base] = re.findall(r"PYTHON_IMAGE=python:(\d+)\.(\d+)-slim", texts("ARG")[0])
    assert tuple(map(int, base)) >= (3, 11)


@pytest.mark.slow
@pytest.mark.parametrize("extras", ["", "[gpu]"])
def test_pip_finds_every_package_at_a_pinned_version(extras: str, tmp_path: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).touch()
    words = [word.replace("${EXTRAS}", extras) for word in pip_commands()[0]]
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        str(report),
    ]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    normal = {
        re.sub(r"[-_.]+", "-", name).lower()
        for name in re.findall(r"^([\w.-]+)==", (tmp_path / "constraints.txt").read_text(), re.MULTILINE)
    }
    installed = [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]]
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in installed} - normal == {"vectormill"}


@pytest.mark.slow
def test_the_code_works_from_where_the_image_has_it(tmp_path: Path) -> None:
    """The folders that are copied, alone, installed as the image installs them."""
    app, environment = tmp_path / "app", tmp_path / "venv"
    app.mkdir()
    for source in copied():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, app / source)
        else:
            shutil.copy(ROOT / source, app)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    # The libraries are there already; what stands in for the checkout comes after the new environment's own.
    [folder] = environment.glob("lib/python3*/site-packages")
    (folder / "libraries.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n", encoding="utf-8")
    python = environment / "bin" / "python"
    words = pip_commands()[1]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *words], cwd=app, check=True)
    code = "import cluster, pipelines.service.page as page, pathlib; print(cluster.__file__, len(pathlib.Path(page.__file__).read_text()))"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(app))
    version = subprocess.run(
        [environment / "bin" / "vectormill", "--version"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert version.stdout.startswith("vectormill 0.")
