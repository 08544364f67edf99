"""`unshare -rm sh -c 'mount -t tmpfs -o size=200m tmpfs DISK && python -m tests.faults.full_disk DISK DOCS'`.

Builds, updates and compacts an index on a file system that is too small for the next version, with more room each
time (`--factor`, twice unless told otherwise; `--steps` to leave commands out): each run must end with exit code 11 and one line that names the full disk, or succeed; the published version must stay whole. With
room enough the run goes on and ends with the content_digest of a run that was never disturbed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path

from pipelines import cli
from pipelines.demo_corpus import collect_documents
from tests.faults.bad_storage import Outcome, run_command
from tests.pipelines.build_corpus import IN_PROCESS, SMALL_UNITS

DOCUMENTS = 40
UNSHARE = ("unshare", "-rm")
FIRST_ROOM_BYTES = 16 << 10
MAX_STEPS = 13
SETTINGS = [word for setting in (*SMALL_UNITS, IN_PROCESS) for word in ("--set", setting)]


def mounting_is_allowed() -> bool:
    """Whether this user may mount a file system in a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    script = "mount -t tmpfs -o size=1m tmpfs /mnt"
    return subprocess.run([*UNSHARE, "sh", "-c", script], capture_output=True, check=False).returncode == 0


def main() -> None:
    """AssertionError when something is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("disk", type=Path, metavar="DISK", help="a mounted tmpfs of this process's own")
    parser.add_argument("docs", type=Path, metavar="DOCS", help="a folder elsewhere, for the corpus")
    parser.add_argument("--factor", type=int, default=2, help="by which the room grows from run to run")
    parser.add_argument("--steps", default="build,update,compact", help="commands whose runs are disturbed, in order")
    options = parser.parse_args()
    options.docs.mkdir(exist_ok=True)
    root, undisturbed = options.disk / "root", options.disk / "undisturbed"
    for state, kind in enumerate(("build", "update", "compact")):
        if state < 2:
            _write(options.docs, state)
        if kind not in options.steps.split(","):
            if kind == "build":
                assert run_command(*_arguments(kind, options.docs, root)).code == 0
            continue
        if root.exists():
            shutil.copytree(root, undisturbed)
        good = run_command(*_arguments(kind, options.docs, undisturbed))
        assert good.code == 0, good.err
        shutil.rmtree(undisturbed)
        failed = _until_it_fits(options.disk, root, _arguments(kind, options.docs, root), good, options.factor)
        print(f"{kind}: {failed} runs for want of room", flush=True)
        _resize(options.disk, 200 << 20)


def _arguments(kind: str, docs: Path, root: Path) -> list[str]:
    return {
        "build": ["build", str(docs), "--out", str(root), "--quiet", *SETTINGS],
        "update": ["update", str(docs), "--index", str(root), "--quiet", "--set", IN_PROCESS],
        "compact": ["compact", str(root), "--quiet", "--set", IN_PROCESS],
    }[kind]


def _until_it_fits(disk: Path, root: Path, arguments: list[str], good: Outcome, factor: int) -> int:
    """How many runs ended for want of room before one succeeded."""
    before = _published(root)
    used = _used(disk)
    for step in range(MAX_STEPS):
        _resize(disk, used + FIRST_ROOM_BYTES * factor**step)
        found = run_command(*arguments)
        if found.code == 0:
            assert found.facts["content_digest"] == good.facts["content_digest"]
            assert run_command("verify", str(root)).code == 0
            return step
        assert found.code == cli.STORAGE_EXIT_CODE, (found.code, found.err)
        lines = found.err.strip().splitlines()
        assert len(lines) == 1, found.err
        assert "disk full" in lines[0], found.err
        assert str(root) in lines[0], found.err
        assert not list(disk.rglob(".tmp-*")), "a file that was half written is left"
        assert _published(root) == before
        assert before is None or run_command("verify", str(root)).code == 0
    raise AssertionError(f"no room after {MAX_STEPS} steps")


def _published(root: Path) -> tuple[str, str] | None:
    """Version and manifest that CURRENT names, None where nothing is published."""
    current = root / "CURRENT"
    if not current.exists():
        return None
    body = json.loads(current.read_bytes())["body"]
    return body["version"], body["manifest"]


def _write(docs: Path, state: int) -> None:
    documents = [{"id": d.name, "text": d.text[:200]} for d in collect_documents(DOCUMENTS)]
    if state:
        documents = [{**d, "text": d["text"] + " Edited."} for d in documents[:10]] + documents[15:]
    (docs / "a.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))


def _used(disk: Path) -> int:
    return shutil.disk_usage(disk).used


def _resize(disk: Path, size_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_bytes}", str(disk)], check=True)


if __name__ == "__main__":
    main()
