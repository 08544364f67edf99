"""Shows that training and encoding a file of vectors holds no more memory than the budget, however long the file is.

Makes .npy files of N and --factor times N float16 vectors, and for each file and budget starts a process that maps the
file into memory, trains a quantizer (kernels.ivfpq.train_ivfpq) and encodes all vectors (encode_blocks), whose codes it
counts and lets go. The peak is the kernel's own mark of the resident memory (VmHWM of /proc, set back before each step;
Linux only), with the mapped file's pages in it, less what the process held after its imports and a run of the same steps
on 2,000 vectors, which loads the libraries' and the compiled kernels' code. Before that counts: the codes of the blocks
must be those of the same vectors encoded in one go.

Printed for each budget and file, in MB: baseline, train_peak and encode_peak above it, and seconds; ratio of the longer
file's peaks to the shorter one's.
Floor: no peak above its budget; ratios of at most 1.1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.report import REPOSITORY, environment, write_report
from kernels.ivfpq import IvfPq, encode_blocks, train_ivfpq

MAX_RATIO = 1.1
WARM_ROWS = 2000
BLOCK_ROWS = 20_000


def main() -> None:
    args = _arguments()
    if args.measure is not None:
        print(json.dumps(_measured(args)))
        return
    say = (lambda line: None) if args.json else (lambda line: print(line, flush=True))
    budgets: dict[str, Any] = {str(budget_mib): {} for budget_mib in args.budget_mib}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for num_rows in (args.rows, args.factor * args.rows):
            file = Path(folder) / f"{num_rows}.npy"
            _make_file(file, num_rows, args.dims, args.seed)
            for budget_mib, found in budgets.items():
                found[str(num_rows)] = _in_a_process(file, int(budget_mib), args)
                say(f"{num_rows} x {args.dims}, budget {budget_mib} MiB: {found[str(num_rows)]}")
    for budget_mib, found in budgets.items():
        short, long = found.values()
        peaks = [one[step] for one in (short, long) for step in ("train_peak_mb", "encode_peak_mb")]
        found["train_ratio"] = round(long["train_peak_mb"] / short["train_peak_mb"], 3)
        found["encode_ratio"] = round(long["encode_peak_mb"] / short["encode_peak_mb"], 3)
        found["share_of_budget"] = round(max(peaks) * 1e6 / (int(budget_mib) << 20), 3)
    ratios = [found[name] for found in budgets.values() for name in ("train_ratio", "encode_ratio")]
    shares = [found["share_of_budget"] for found in budgets.values()]
    report = {
        "benchmark": "ivfpq_memory",
        "settings": {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS},
        "file_mb": {str(rows): rows * args.dims * 2 // 10**6 for rows in (args.rows, args.factor * args.rows)},
        "budget_mib": budgets,
        "floors": {
            "share_of_budget": {"at_most": 1.0, "worst": max(shares), "met": max(shares) <= 1.0},
            "ratio": {"at_most": MAX_RATIO, "worst": max(ratios), "met": max(ratios) <= MAX_RATIO},
        },
        "environment": environment(),
    }
    write_report(report, args.out)
    print(json.dumps(report, indent=None if args.json else 1))


_NOT_SETTINGS = ("json", "out", "scratch", "measure")


def _in_a_process(file: Path, budget_mib: int, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ivfpq_memory", f"--measure={file}", f"--budget-mib={budget_mib}"]
    command += [f"--{name}={getattr(args, name)}" for name in ("nlist", "m", "metric", "threads", "seed")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process with a budget of {budget_mib} MiB ended with {done.returncode}:\n{done.stderr}")
    return dict(json.loads(done.stdout))


def _measured(args: argparse.Namespace) -> dict[str, float]:
    """Peaks of training on and of encoding the mapped file, in this process."""
    torch.set_num_threads(args.threads)
    (budget_mib,) = args.budget_mib
    x_ND = np.load(args.measure, mmap_mode="r")
    few_ND = np.array(x_ND[:WARM_ROWS])
    warm = _train(few_ND, args, budget_mib)
    _count(few_ND, warm, budget_mib)
    del warm
    baseline = _status("VmRSS")
    found = {"baseline_mb": round(baseline / 1e6, 1)}
    _set_back_peak()
    began = time.perf_counter()
    quantizer = _train(x_ND, args, budget_mib)
    found["train_s"] = round(time.perf_counter() - began, 2)
    found["train_peak_mb"] = round((_status("VmHWM") - baseline) / 1e6, 1)
    _set_back_peak()
    began = time.perf_counter()
    num_rows, first = _count(x_ND, quantizer, budget_mib)
    found["encode_s"] = round(time.perf_counter() - began, 2)
    found["encode_peak_mb"] = round((_status("VmHWM") - baseline) / 1e6, 1)
    if num_rows != len(x_ND) or not np.array_equal(first, quantizer.encode(few_ND)[1][: len(first)]):
        raise SystemExit("the codes of the blocks must be those of one go")
    return found


def _train(x_ND: npt.NDArray[Any], args: argparse.Namespace, budget_mib: int) -> IvfPq:
    return train_ivfpq(
        x_ND, nlist=args.nlist, M=args.m, metric=args.metric, seed=args.seed, budget_bytes=budget_mib << 20
    )


def _count(x_ND: npt.NDArray[Any], quantizer: IvfPq, budget_mib: int) -> tuple[int, npt.NDArray[np.uint8]]:
    """Number of the vectors encoded, and the first codes."""
    num_rows, first = 0, np.empty((0, 0), np.uint8)
    for start, _, codes in encode_blocks(x_ND, quantizer, budget_bytes=budget_mib << 20):
        first = codes[:WARM_ROWS].copy() if start == 0 else first
        num_rows += len(codes)
    return num_rows, first


def _make_file(file: Path, num_rows: int, num_dims: int, seed: int) -> None:
    """Vectors around 1,000 centres, float16, written by blocks."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((1000, num_dims), dtype=np.float32)
    mapped = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(num_rows, num_dims))
    for start in range(0, num_rows, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, num_rows - start)
        spread = rng.standard_normal((rows, num_dims), dtype=np.float32)
        mapped[start : start + rows] = 0.05 * (centres[rng.integers(0, 1000, rows)] + spread)
    mapped.flush()


def _status(name: str) -> int:
    """Bytes of a field of this process's memory."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status must have {name}: this benchmark needs Linux")


def _set_back_peak() -> None:
    """Sets VmHWM back to what is resident now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ivfpq_memory", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000, help="vectors of the shorter file")
    parser.add_argument("--factor", type=int, default=10, help="how many times as many the longer one has")
    parser.add_argument("--dims", type=int, default=384)
    parser.add_argument("--nlist", type=int, default=1024)
    parser.add_argument("--m", type=int, default=48)
    parser.add_argument("--metric", choices=("l2", "ip"), default="l2")
    parser.add_argument("--budget-mib", type=int, nargs="+", default=[2048, 512])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", help="folder for the files (2 bytes a value); default: that for temporary files")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a file: measure it in this process
    parser.add_argument("--json", action="store_true", help="one line of JSON and nothing else")
    parser.add_argument("--out", help="also write the report to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
