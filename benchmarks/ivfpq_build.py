"""Shows how much faster an IVF-PQ index is built than by faiss, at the same recall: training and adding, in turns.

Both train on the same rows with the same threads and add the same vectors; faiss is IndexIVFPQ with its defaults. The
centroids, codebooks, lists and codes of ours are put into an IndexIVFPQ, and faiss searches both with the same nprobe.
Before any time is taken: with our centroids and codebooks, our codes must be those that faiss's own encoder gives.

Printed: train_s and add_s (median, fastest, slowest round), train_speedup, add_speedup (of the fastest rounds), recall@10
for each nprobe against exact search, recall_delta (ours minus faiss, mean of the rounds, which have seeds and training
samples of their own; the worst over the nprobe grid), the share of the vectors scanned at each nprobe, the
matrix-product rate of the machine and each step as a share of it. A step's share counts the work that the plain
algorithm has to do (10 full assignments for coarse, one for assign, 25 for the codebooks), so a cleverer one may be above 1.
Floors at the defaults on 2 cores: train_speedup 5, add_speedup 3, recall_delta -0.005.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.report import environment, spread, write_report
from benchmarks.vectors import (
    NUM_NEIGHBOURS,
    Collection,
    clustered,
    exact_neighbours,
    normalised,
    read_vectors,
    recall,
)
from kernels.ivfpq import IvfPq, train_ivfpq
from kernels.pq import pq_encode_residuals

NPROBES = (1, 4, 16, 64)
CHECKED_ROWS = 2000


def main() -> None:
    args = _arguments()
    import faiss

    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    collection = _collection(args)
    base_ND, (num_rows, num_dims) = collection.base_ND, collection.base_ND.shape
    train_rows = min(num_rows, args.train_rows or 50 * args.nlist)
    settings = {"nlist": args.nlist, "M": args.m, "nbits": args.nbits, "metric": args.metric}
    say = (lambda line: None) if args.quiet else (lambda line: print(line, flush=True))
    say(f"{collection.name}: {num_rows} x {num_dims}, trained on {train_rows}, {settings}, {args.threads} threads")
    ceiling = _matrix_rate()

    ours_rounds: list[dict[str, float]] = []
    faiss_rounds: list[dict[str, float]] = []
    recalls: dict[str, list[list[float]]] = {"ours": [], "faiss": []}
    scanned: dict[str, list[list[float]]] = {"ours": [], "faiss": []}
    nprobes = [n for n in NPROBES if n <= args.nlist]
    shares = []
    for number in range(args.rounds):
        # Every round has a training sample and seeds of its own, the same for both: one k-means says little of another.
        seed = args.seed + number
        drawn = np.sort(np.random.default_rng(seed).choice(num_rows, train_rows, replace=False))
        sample_ND = np.ascontiguousarray(base_ND[drawn])
        index, seconds = _faiss_round(sample_ND, base_ND, seed, args)
        faiss_rounds.append(seconds)
        quantizer, list_no_N, codes, seconds = _our_round(sample_ND, base_ND, seed, args)
        ours_rounds.append(seconds)
        shares.append(quantizer.share)
        _check_codes(quantizer, base_ND[:CHECKED_ROWS], list_no_N[:CHECKED_ROWS], codes[:CHECKED_ROWS], args)
        ours_index = _faiss_index_of(quantizer, list_no_N, codes, args)
        for name, each in (("ours", ours_index), ("faiss", index)):
            recalls[name].append([_recall(each, collection, n) for n in nprobes])
            scanned[name].append([_scanned(each, collection, n) for n in nprobes])
        say(f"round {number + 1}: faiss {faiss_rounds[-1]} {recalls['faiss'][-1]}")
        say(f"round {number + 1}: ours {ours_rounds[-1]} {recalls['ours'][-1]}")
    difference = np.array(recalls["ours"]) - np.array(recalls["faiss"])
    fastest = {
        name: {step: min(r[step] for r in rounds) for step in rounds[0]}
        for name, rounds in (("ours", ours_rounds), ("faiss", faiss_rounds))
    }
    report = {
        "benchmark": "ivfpq_build",
        "data": {"name": collection.name, "rows": num_rows, "dims": num_dims, "queries": len(collection.queries_QD)},
        "settings": {**settings, "train_rows": train_rows, "threads": args.threads, "rounds": args.rounds},
        "train_s": {n: spread([r["train_s"] for r in rs], 3) for n, rs in _both(ours_rounds, faiss_rounds)},
        "add_s": {n: spread([r["add_s"] for r in rs], 3) for n, rs in _both(ours_rounds, faiss_rounds)},
        "train_speedup": round(fastest["faiss"]["train_s"] / fastest["ours"]["train_s"], 2),
        "add_speedup": round(fastest["faiss"]["add_s"] / fastest["ours"]["add_s"], 2),
        "recall@10": {name: _by_nprobe(nprobes, np.mean(values, axis=0)) for name, values in recalls.items()},
        "recall_delta": round(float(difference.mean(axis=0).min()), 4),
        "recall_delta_of_rounds": [round(float(worst), 4) for worst in difference.min(axis=1)],
        "scanned_share": {name: _by_nprobe(nprobes, np.mean(values, axis=0)) for name, values in scanned.items()},
        "nearest_list_share": round(min(shares), 4),
        "matrix_gflops": round(ceiling / 1e9, 1),
        "steps": _steps(fastest["ours"], num_rows, num_dims, train_rows, args, ceiling),
        "faiss_steps": {k: round(v, 3) for k, v in fastest["faiss"].items()},
        "environment": environment(),
    }
    write_report(report, args.out)
    print(json.dumps(report, indent=None if args.json else 1))


def _by_nprobe(nprobes: list[int], values: Any) -> dict[str, float]:
    return {str(nprobe): round(float(value), 5) for nprobe, value in zip(nprobes, values, strict=True)}


def _both(ours: list[Any], theirs: list[Any]) -> list[tuple[str, list[Any]]]:
    return [("ours", ours), ("faiss", theirs)]


def _our_round(
    sample_ND: Any, base_ND: Any, seed: int, args: argparse.Namespace
) -> tuple[IvfPq, Any, Any, dict[str, float]]:
    stages: list[tuple[str, float]] = []
    quantizer = train_ivfpq(
        sample_ND,
        nlist=args.nlist,
        M=args.m,
        nbits=args.nbits,
        metric=args.metric,
        seed=seed,
        train_rows=len(sample_ND),
        exact=args.exact,
        on_stage=lambda stage: stages.append((stage, time.perf_counter())),
    )
    stages.append(("end", time.perf_counter()))
    seconds = {f"{name}_s": stages[i + 1][1] - at for i, (name, at) in enumerate(stages[:-1])}
    seconds["train_s"] = stages[-1][1] - stages[0][1]
    began = time.perf_counter()
    list_no_N, codes = quantizer.encode(base_ND)
    seconds["add_s"] = time.perf_counter() - began
    began = time.perf_counter()
    quantizer.assign(base_ND)
    seconds["assign_s"] = time.perf_counter() - began
    began = time.perf_counter()
    pq_encode_residuals(base_ND, quantizer.centroids_KD, list_no_N, quantizer.codebooks_MKS)
    seconds["encode_s"] = time.perf_counter() - began
    return quantizer, list_no_N, codes, {name: round(value, 4) for name, value in seconds.items()}


def _faiss_round(sample_ND: Any, base_ND: Any, seed: int, args: argparse.Namespace) -> tuple[Any, dict[str, float]]:
    index = _empty_index(base_ND.shape[1], args)
    index.cp.seed = index.pq.cp.seed = 1234 + seed
    train_s = _seconds(lambda: index.train(sample_ND))
    add_s = _seconds(lambda: index.add(base_ND))
    assign_s = _seconds(lambda: index.quantizer.assign(base_ND, 1))
    return index, {"train_s": round(train_s, 4), "add_s": round(add_s, 4), "assign_s": round(assign_s, 4)}


def _empty_index(num_dims: int, args: argparse.Namespace) -> Any:
    import faiss

    ip = args.metric == "ip"
    coarse = faiss.IndexFlatIP(num_dims) if ip else faiss.IndexFlatL2(num_dims)
    metric = faiss.METRIC_INNER_PRODUCT if ip else faiss.METRIC_L2
    index = faiss.IndexIVFPQ(coarse, num_dims, args.nlist, args.m, args.nbits, metric)
    coarse.this.disown()
    index.own_fields = True
    index.verbose = False
    return index


def _faiss_index_of(quantizer: IvfPq, list_no_N: Any, codes: Any, args: argparse.Namespace) -> Any:
    """An IndexIVFPQ with our centroids, codebooks, lists and codes."""
    import faiss

    index = _trained_index(quantizer, args)
    order = np.argsort(list_no_N, kind="stable")
    ends = np.cumsum(np.bincount(list_no_N, minlength=args.nlist))
    for list_no in range(args.nlist):
        rows = order[ends[list_no - 1] if list_no else 0 : ends[list_no]]
        if len(rows):
            entries, ids = np.ascontiguousarray(codes[rows]), rows.astype(np.int64)
            index.invlists.add_entries(list_no, len(rows), faiss.swig_ptr(ids), faiss.swig_ptr(entries))
    index.ntotal = len(codes)
    return index


def _trained_index(quantizer: IvfPq, args: argparse.Namespace) -> Any:
    import faiss

    index = _empty_index(quantizer.centroids_KD.shape[1], args)
    index.quantizer.add(quantizer.centroids_KD)
    faiss.copy_array_to_vector(quantizer.codebooks_MKS.ravel(), index.pq.centroids)
    index.is_trained = True
    if args.metric == "l2":
        index.precompute_table()
    return index


def _check_codes(quantizer: IvfPq, x_ND: Any, list_no_N: Any, codes: Any, args: argparse.Namespace) -> None:
    """faiss's own encoder must give our codes, but for sub-vectors that float32 cannot decide."""
    residuals = x_ND - quantizer.centroids_KD[list_no_N]
    index = _trained_index(quantizer, args)  # owns the quantizer that its attribute `pq` points to
    theirs = index.pq.compute_codes(np.ascontiguousarray(residuals))
    differing = float((theirs != codes).mean())
    if differing > 1e-4:
        raise SystemExit(f"codes must be faiss's, but a share of {differing} of them differ")


def _recall(index: Any, collection: Collection, nprobe: int) -> float:
    index.nprobe = nprobe
    return recall(index.search(collection.queries_QD, NUM_NEIGHBOURS)[1], collection.neighbours_Qk)


def _scanned(index: Any, collection: Collection, nprobe: int) -> float:
    sizes = np.array([index.invlists.list_size(i) for i in range(index.nlist)])
    probed = index.quantizer.search(collection.queries_QD, nprobe)[1]
    return round(float(sizes[probed].sum(axis=1).mean() / index.ntotal), 5)


def _matrix_rate() -> float:
    """Float32 operations per second of a large matrix product on these threads, best of ten."""
    a, b = (torch.randn(4096, 4096) for _ in range(2))
    out = torch.empty(4096, 4096)
    return 2 * 4096.0**3 / min(_seconds(lambda: torch.mm(a, b, out=out)) for _ in range(10))


def _steps(
    seconds: dict[str, float], rows: int, dims: int, train_rows: int, args: argparse.Namespace, ceiling: float
) -> dict[str, Any]:
    """Seconds of each of our steps, and the plain algorithm's arithmetic in that time as a share of the ceiling."""
    iterations, pq_rows, words = 10, min(train_rows, 256 << args.nbits), 1 << args.nbits
    work = {
        "coarse_s": 2.0 * iterations * train_rows * args.nlist * dims,
        "codebooks_s": 2.0 * 25 * pq_rows * words * dims,
        "assign_s": 2.0 * rows * args.nlist * dims,
        "encode_s": 2.0 * rows * words * dims,
    }
    return {
        name: {"seconds": round(seconds[name], 3), "share_of_ceiling": round(flop / seconds[name] / ceiling, 3)}
        for name, flop in work.items()
    }


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _collection(args: argparse.Namespace) -> Collection:
    if args.vectors is None:
        base, queries = clustered(args.rows, args.dims, args.seed, args.queries_made)
        name = "clustered"
    else:
        if args.queries is None:
            raise SystemExit("--vectors needs --queries: a .npy file of queries of the same dimensions")
        base, queries = read_vectors(args.vectors), read_vectors(args.queries)
        name = os.path.basename(os.path.dirname(os.path.abspath(args.vectors)))
    if args.metric == "ip":
        base, queries = normalised(base), normalised(queries)
    if args.ground_truth is not None:
        neighbours = np.load(args.ground_truth)[:, :NUM_NEIGHBOURS].astype(np.int64)
    else:
        neighbours = exact_neighbours(base, queries, args.metric)
    if len(neighbours) != len(queries):
        raise SystemExit(f"{args.ground_truth} holds {len(neighbours)} rows, there are {len(queries)} queries")
    return Collection(name, base, queries, neighbours)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ivfpq_build", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vectors", help=".npy of base vectors; without it, clustered ones are made")
    parser.add_argument("--queries", help=".npy of queries")
    parser.add_argument("--ground-truth", help=".npy of the exact neighbours' rows; without it, they are searched")
    parser.add_argument("--metric", choices=("l2", "ip"), default="l2", help="with ip, vectors are normalised first")
    parser.add_argument("--nlist", type=int, default=4096)
    parser.add_argument("--m", type=int, default=48)
    parser.add_argument("--nbits", type=int, choices=(4, 8), default=8)
    parser.add_argument("--rows", type=int, default=500_000, help="of the vectors made here")
    parser.add_argument("--dims", type=int, default=384, help="of the vectors made here")
    parser.add_argument("--queries-made", type=int, default=2000, help="queries made here")
    parser.add_argument("--train-rows", type=int, default=0, help="rows of the training sample; 0: 50 a list")
    parser.add_argument("--exact", action="store_true", help="every vector to its nearest list, not only 0.99 of them")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one line of JSON and nothing else")
    parser.add_argument("--out", help="also write the report to this file")
    args = parser.parse_args()
    args.quiet = args.json
    return args


if __name__ == "__main__":
    main()
