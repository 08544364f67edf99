"""Kernels on a CUDA device: checked against the reference, then timed against floors of the same run.

Claims: `pool_normalize` moves its bytes at 0.7 or more of the device's copy bandwidth; `assign_nearest` in bf16 (10
million rows x 768 against 65,536 centroids) multiplies at 0.6 or more of the rate of a bf16 matrix product; `pq_encode`
with residuals (M = 96, nbits 8) takes a third or less of the time of the same steps written in CuPy.

    python -m benchmarks.gpu_kernels --json [--out FILE] [--rows 10000000]

Needs numpy, torch, cupy and kernels/. Every section runs in a process of its own, so that a fault of one leaves the
others' results; each measures the floors again beside its kernel. Times are CUDA events around the whole call, its
checks included, the best of several after a warm-up. Keys of a section: `checked` (against what, and the outcome),
`seconds`, `floors` (`copy_gb_per_s`: bytes read and written; `matrix_tflops`: torch.mm of 8192^3 bf16 random numbers)
and its measures; `targets` has every claim with its `value`, `at_least` and `met`.

`assign_nearest` has two paths for bf16, each a section. The target counts the faster of those whose lists are right;
without an argument the kernel takes the tiled one.

Exit codes: 0 all targets met, 1 one missed or a section failed (the report says which), 2 no CUDA device or no cupy.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu_clock import SEED, floors, normal, seconds_of
from benchmarks.report import commit, write_report
from kernels import reference

SECTIONS = ("pool", "assign_tiled", "assign_fused", "pq", "others")


def pool(arguments: argparse.Namespace) -> dict[str, Any]:
    import cupy

    from kernels.cuda.pool import pool_normalize

    lengths = np.random.default_rng(SEED).integers(32, 225, 120 if arguments.quick else 60_000)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    on_device = cupy.asarray(offsets)
    measured: dict[str, Any] = {}
    for num_dims, dtype in ((384, "float16"), (768, "float16"), (768, "float32")):
        states = normal((int(offsets[-1]), num_dims), dtype)
        for mode, out in (("mean", "float32"), ("mean", "int8"), ("mean", "binary"), ("max", "float32")):
            found = pool_normalize(states, on_device, mode=mode, dtype=out)
            found = found[0] if out == "int8" else found
            small, part = offsets[:101], states[: int(offsets[100])].get()
            expected = reference.pool_normalize(part, small, mode=mode, dtype=out)
            expected = expected[0] if out == "int8" else expected
            tolerance = {"float32": 1e-5, "int8": 1.0, "binary": 255.0}[out]
            difference = np.abs(found[:100].get().astype(np.float64) - expected).max()
            assert difference <= tolerance, f"pool_normalize {mode} {out}: {difference}"
            best = seconds_of(partial(pool_normalize, states, on_device, mode=mode, dtype=out))
            rate = (states.nbytes + offsets.nbytes + found.nbytes) / best / 1e9
            measured[f"{num_dims}-{dtype}-{mode}-{out}"] = {"seconds": best, "gb_per_s": round(rate, 1)}
        del states
    floor = floors()
    for result in measured.values():
        result["share_of_copy"] = round(result["gb_per_s"] / floor["copy_gb_per_s"], 3)
    worst = min(result["share_of_copy"] for result in measured.values())
    config = {"segments": len(lengths), "tokens": int(offsets[-1])}
    return {"config": config, "floors": floor, "cases": measured, "worst_share_of_copy": worst}


def assign(arguments: argparse.Namespace, path: str) -> dict[str, Any]:
    import cupy

    from kernels.cuda.assign import assign_nearest, fused_agrees
    from kernels.cuda.assign_fused import COMPUTE_CAPABILITY

    device = cupy.cuda.Device()
    if path == "fused" and device.compute_capability != COMPUTE_CAPABILITY:
        return {"skipped": f"the fused kernel is for compute capability 9.0, not {device.compute_capability}"}
    agrees = fused_agrees() if path == "fused" else True
    num_rows, num_dims, num_centroids = arguments.rows, 768, 512 if arguments.quick else 65_536
    x_ND = normal((num_rows, num_dims), "float16")
    centroids_KD = normal((num_centroids, num_dims), "float32") * 0.5
    sample = x_ND[:: max(1, num_rows // 4096)][:4096]
    exact = assign_nearest(sample, centroids_KD, metric="l2").get()
    few = reference.assign_nearest(sample[:8].get(), centroids_KD.get(), metric="l2")
    assert (exact[:8] == few).all(), "assign_nearest float32 differs from the reference"
    found = assign_nearest(sample, centroids_KD, metric="l2", precision="bf16", path=path).get()
    share = float((found == exact).mean())
    best = seconds_of(lambda: assign_nearest(x_ND, centroids_KD, metric="l2", precision="bf16", path=path), 1)
    floor = floors()
    rate = 2.0 * num_rows * num_dims * num_centroids / best / 1e12
    return {
        "config": {"rows": num_rows, "dims": num_dims, "centroids": num_centroids, "metric": "l2", "path": path},
        "checked": {"whole_numbers_agree_with_tiled": agrees, "share_in_the_exact_nearest_list": share},
        "floors": floor,
        "seconds": best,
        "tflops": round(rate, 1),
        "share_of_matrix_rate": round(rate / floor["matrix_tflops"], 3) if agrees else 0.0,
    }


def pq_by_cupy(x_ND: Any, centroids_KD: Any, list_no_N: Any, codebooks_MKS: Any) -> Any:
    """The same steps as array operations, in blocks of rows that keep the distances of a sub-quantizer near 256 MiB."""
    import cupy

    M, _, sub_dims = codebooks_MKS.shape
    norms_MK = cupy.square(codebooks_MKS).sum(axis=2)
    codes = cupy.empty((len(x_ND), M), cupy.uint8)
    for start in range(0, len(x_ND), 1 << 18):
        rows = slice(start, start + (1 << 18))
        residuals = x_ND[rows] - centroids_KD[list_no_N[rows]]
        for m in range(M):
            products = residuals[:, m * sub_dims : (m + 1) * sub_dims] @ codebooks_MKS[m].T
            codes[rows, m] = (norms_MK[m] - 2.0 * products).argmin(axis=1)
    return codes


def pq(arguments: argparse.Namespace) -> dict[str, Any]:
    import cupy

    from kernels.cuda.pq import pq_encode_residuals

    num_rows, num_dims, M = 2000 if arguments.quick else 1_000_000, 768, 96
    x_ND, centroids_KD = normal((num_rows, num_dims), "float32"), normal((4096, num_dims), "float32") * 0.1
    codebooks_MKS = normal((M, 256, num_dims // M), "float32")
    list_no_N = cupy.random.default_rng(SEED).integers(0, 4096, num_rows).astype(cupy.int32)
    arrays = (x_ND, centroids_KD, list_no_N, codebooks_MKS)
    ours = pq_encode_residuals(*arrays)
    few = slice(0, 500)
    residuals = x_ND[few].get() - centroids_KD.get()[list_no_N[few].get()]
    expected = reference.pq_encode(residuals, codebooks_MKS.get())
    assert (ours[few].get() == expected).all(), "pq_encode_residuals differs from the reference"
    same = float((ours == pq_by_cupy(*arrays)).mean())
    ours_s = seconds_of(lambda: pq_encode_residuals(*arrays))
    cupy_s = seconds_of(lambda: pq_by_cupy(*arrays), 3)
    return {
        "config": {"rows": num_rows, "dims": num_dims, "M": M, "nbits": 8, "lists": 4096},
        "checked": {"equal_to_the_reference": True, "share_of_codes_as_by_cupy": same},
        "floors": floors(),
        "seconds": ours_s,
        "seconds_by_cupy": cupy_s,
        "speedup": round(cupy_s / ours_s, 2),
    }


def others(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kernels without a target of their own."""
    import cupy

    from kernels import kmeans as host_kmeans
    from kernels.cuda.hamming import hamming_distances
    from kernels.cuda.kmeans import partial_sums
    from kernels.cuda.minhash import minhash
    from kernels.cuda.topk import topk
    from kernels.topk import topk as host_topk

    rng = np.random.default_rng(SEED)
    q_QB, x_NB = (rng.integers(0, 256, (n, 96), dtype=np.uint8) for n in (256, 2000 if arguments.quick else 1_000_000))
    on_device = cupy.asarray(q_QB), cupy.asarray(x_NB)
    bits = np.bitwise_count(q_QB[:, None] ^ x_NB[None, :1000]).sum(axis=2)
    assert (hamming_distances(*on_device)[:, :1000].get() == bits).all(), "hamming_distances differs"
    hamming_s = seconds_of(lambda: hamming_distances(*on_device))

    offsets = np.arange(0, (20 if arguments.quick else 20_000) * 200 + 1, 200, dtype=np.int64)
    tokens = rng.integers(0, 50_000, int(offsets[-1])).astype(np.uint32)
    places = cupy.asarray(tokens), cupy.asarray(offsets)
    expected = reference.minhash(tokens[:2000], offsets[:11], num_hashes=128, shingle=5, seed=1)
    assert (minhash(*places, seed=1)[:10].get() == expected).all(), "minhash differs"
    minhash_s = seconds_of(lambda: minhash(*places, seed=1))

    num_rows = 4000 if arguments.quick else 1 << 20
    rows, list_no = normal((num_rows, 768), "float32"), cupy.asarray(rng.integers(0, 4096, num_rows).astype(np.int32))
    sums, counts = partial_sums(rows[:32768], list_no[:32768], 4096)
    host_sums, host_counts = host_kmeans.partial_sums(rows[:32768].get(), list_no[:32768].get(), 4096)
    assert sums.get().tobytes() == host_sums.tobytes() and (counts.get() == host_counts).all(), "partial_sums differs"
    sums_s = seconds_of(lambda: partial_sums(rows, list_no, 4096))

    scores = normal((256, 1000 if arguments.quick else 1 << 18), "float32")
    values, index = topk(scores, 100)
    host_values, host_index = host_topk(scores[:8].get(), 100)
    assert (values[:8].get() == host_values).all() and (index[:8].get() == host_index).all(), "topk differs"
    topk_s = seconds_of(lambda: topk(scores, 100))
    floor = floors()
    return {
        "checked": {"equal_to_the_reference": True},
        "floors": floor,
        "hamming_distances": {"seconds": hamming_s, "pairs_per_s": round(len(q_QB) * len(x_NB) / hamming_s)},
        "minhash": {"seconds": minhash_s, "tokens_per_s": round(len(tokens) / minhash_s)},
        "partial_sums": {"seconds": sums_s, "gb_per_s": round(rows.nbytes / sums_s / 1e9, 1)},
        "topk": {"seconds": topk_s, "gb_per_s": round(scores.nbytes / topk_s / 1e9, 1)},
    }


RUNS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "pool": pool,
    "assign_tiled": lambda arguments: assign(arguments, "tiled"),
    "assign_fused": lambda arguments: assign(arguments, "fused"),
    "pq": pq,
    "others": others,
}


def targets(sections: dict[str, Any]) -> dict[str, Any]:
    assigned = (sections.get(name, {}).get("share_of_matrix_rate", 0.0) for name in ("assign_tiled", "assign_fused"))
    values = {
        "pool_share_of_copy": (sections.get("pool", {}).get("worst_share_of_copy", 0.0), 0.7),
        "assign_share_of_matrix_rate": (max(assigned), 0.6),
        "pq_speedup": (sections.get("pq", {}).get("speedup", 0.0), 3.0),
    }
    return {name: {"value": value, "at_least": least, "met": value >= least} for name, (value, least) in values.items()}


def device_or_exit() -> dict[str, Any]:
    """What runs the benchmark; ends the process with code 2 where nothing can."""
    try:
        import cupy
        import torch

        if not cupy.is_available() or not torch.cuda.is_available():
            raise ImportError("there is no CUDA device that both cupy and torch can use")
    except ImportError as error:
        print(f"gpu_kernels needs a CUDA device, cupy and torch with CUDA: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    properties = torch.cuda.get_device_properties(0)
    return {
        "hardware": {
            "gpu": properties.name,
            "compute_capability": cupy.cuda.Device().compute_capability,
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
        },
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "cupy": cupy.__version__,
            "driver": cupy.cuda.runtime.driverGetVersion(),
        },
    }


def run_section(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A section's result from a process of its own, or what it failed with."""
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--section", name, "--rows", str(arguments.rows)]
    command += ["--quick"] * arguments.quick
    done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout_s)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON rather than its targets")
    parser.add_argument("--out", help="also write the report to this file")
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows to assign (default 10 million)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script: its times mean nothing")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="longest time of a section (default 600)")
    parser.add_argument("--section", choices=SECTIONS, help="only this one, in this process")
    arguments = parser.parse_args()
    device = device_or_exit()
    if arguments.section:
        print(json.dumps(RUNS[arguments.section](arguments)))
        return 0
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sections = {name: run_section(name, arguments) for name in SECTIONS}
    report = {
        "benchmark": "gpu_kernels",
        "gpu_run": True,
        "quick": arguments.quick,
        "commit": commit(),
        "date": date,
        **device,
        "sections": sections,
        "targets": targets(sections),
    }
    write_report(report, arguments.out)
    print(json.dumps(report, indent=1) if arguments.json else json.dumps(report["targets"], indent=1))
    failed = any("failed" in section for section in sections.values())
    return 1 if failed or not all(target["met"] for target in targets(sections).values()) else 0


if __name__ == "__main__":
    sys.exit(main())
