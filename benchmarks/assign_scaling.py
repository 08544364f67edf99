"""Shows that the cost of finding a vector's list grows clearly slower than the number of lists.

At nlist 4k, 16k and 64k (d = 128, clustered vectors of unit length): time per vector of kernels.assign_two_level, and of
the exact kernels.assign on a part of the vectors, in turns; and the share of vectors that two levels lead to their exact
nearest list. None of the vectors counted has been seen in training, nor when the slack was measured (on other vectors,
for a share of --target). Before any time is taken: with an infinite slack two levels give the exact lists.

Centroids: kernels.kmeans of --iterations iterations on --rows-per-list vectors a list. Both ways go through as many
vectors and the same ones at each nlist, so the two are compared at the same load of the caches but for the centroids.

Printed for each nlist: us_per_vector and exact_share of two levels, us_per_vector_exact, speedup, groups_s (time to form
the groups), slack_s (to measure the slack), groups, slack, train_s. A second table has the bf16 mode of kernels.assign at
the least nlist: time against float32, and share of vectors in their exact nearest list (1 is promised).
Times are of the fastest round, with the spread.
Floor: ratio_64k_to_4k (time per vector at the largest nlist over that at the least) at most 4, exact_share at least 0.95.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.report import environment, spread, write_report
from benchmarks.vectors import Float32Array, clustered
from kernels.assign import assign_nearest
from kernels.assign_two_level import CentroidGroups, assign_two_level, measure_slack
from kernels.kmeans import group_centroids, kmeans

MAX_RATIO, MIN_SHARE = 4.0, 0.95
CHECKED_ROWS = 500


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    say = (lambda line: None) if args.json else (lambda line: print(line, flush=True))
    train_rows = args.rows_per_list * max(args.nlist)
    base_ND, held_out_ND = clustered(train_rows, args.dims, args.seed, args.rows + args.slack_rows)
    slack_ND, x_ND = held_out_ND[: args.slack_rows], held_out_ND[args.slack_rows :]
    say(f"{len(x_ND)} x {args.dims}, {args.threads} threads, trained on {args.rows_per_list} vectors a list")
    prepared = {}
    for nlist in args.nlist:
        prepared[nlist] = _prepare(base_ND[:: max(args.nlist) // nlist], slack_ND, nlist, args)
        groups, found = prepared[nlist]
        say(f"nlist {nlist}: {found}")
        few_ND = x_ND[:CHECKED_ROWS]
        same = assign_two_level(few_ND, groups, slack=float("inf")) == _exact(few_ND, groups)
        if not same.all():
            raise SystemExit(f"an infinite slack must give the exact lists, {int((~same).sum())} rows differ")

    seconds: dict[str, dict[int, list[float]]] = {"two_level": {}, "exact": {}, "bf16": {}}
    for _ in range(args.rounds):
        for nlist, (groups, found) in prepared.items():
            # An exact assignment costs nlist times the vectors: all of them at the least nlist, a part at the others.
            part_ND = x_ND[: max(CHECKED_ROWS, args.exact_rows * min(args.nlist) // nlist)]
            two_s, two_N = _timed(partial(assign_two_level, x_ND, groups, slack=found["slack"]))
            exact_s, exact_N = _timed(partial(_exact, part_ND, groups))
            seconds["two_level"].setdefault(nlist, []).append(two_s / len(x_ND) * 1e6)
            seconds["exact"].setdefault(nlist, []).append(exact_s / len(part_ND) * 1e6)
            found["exact_share"] = round(float((two_N[: len(part_ND)] == exact_N).mean()), 4)
            found["counted_vectors"] = len(part_ND)
            if nlist == min(args.nlist):
                bf16_s, bf16_N = _timed(partial(_exact, part_ND, groups, precision="bf16"))
                seconds["bf16"].setdefault(nlist, []).append(bf16_s / len(part_ND) * 1e6)
                bf16_share = float((bf16_N == exact_N).mean())
    report = _report(args, prepared, seconds, bf16_share)
    write_report(report, args.out)
    print(json.dumps(report, indent=None if args.json else 1))


def _prepare(
    sample_ND: Float32Array, slack_ND: Float32Array, nlist: int, args: argparse.Namespace
) -> tuple[CentroidGroups, dict[str, Any]]:
    """Centroids of the sample in groups, and how long that took."""
    train_s, centroids_KD = _timed(
        lambda: kmeans(sample_ND, nlist, metric=args.metric, seed=args.seed, iterations=args.iterations)
    )
    groups_s, groups = _timed(lambda: group_centroids(centroids_KD, metric=args.metric, seed=args.seed))
    slack_s, (slack, share) = _timed(lambda: measure_slack(slack_ND, groups, target=args.target))
    return groups, {
        "train_s": round(train_s, 2),
        "groups": groups.num_groups,
        "groups_s": round(groups_s, 3),
        "slack_s": round(slack_s, 3),
        "slack": slack,
        "share_on_slack_vectors": round(share, 4),
    }


def _exact(x_ND: Float32Array, groups: CentroidGroups, *, precision: str = "float32") -> Any:
    return assign_nearest(x_ND, groups.centroids_KD, metric=groups.metric, precision=precision)


def _report(
    args: argparse.Namespace,
    prepared: dict[int, tuple[CentroidGroups, dict[str, Any]]],
    seconds: dict[str, dict[int, list[float]]],
    bf16_share: float,
) -> dict[str, Any]:
    two, exact = seconds["two_level"], seconds["exact"]
    least, most = min(args.nlist), max(args.nlist)
    ratio = min(two[most]) / min(two[least])
    shares = [found["exact_share"] for _, found in prepared.values()]
    return {
        "benchmark": "assign_scaling",
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "out")},
        "nlist": {
            str(nlist): {
                "us_per_vector": round(min(two[nlist]), 3),
                "us_per_vector_spread": spread(two[nlist], 3),
                "exact_share": found["exact_share"],
                "us_per_vector_exact": round(min(exact[nlist]), 3),
                "us_per_vector_exact_spread": spread(exact[nlist], 3),
                "speedup": round(min(exact[nlist]) / min(two[nlist]), 2),
                **{name: value for name, value in found.items() if name != "exact_share"},
            }
            for nlist, (_, found) in prepared.items()
        },
        "ratio_64k_to_4k": round(ratio, 2),
        "ratio_64k_to_4k_exact": round(min(exact[most]) / min(exact[least]), 2),
        "least_exact_share": min(shares),
        "bf16": {
            "nlist": least,
            "us_per_vector": round(min(seconds["bf16"][least]), 3),
            "us_per_vector_spread": spread(seconds["bf16"][least], 3),
            "us_per_vector_float32": round(min(exact[least]), 3),
            "speedup": round(min(exact[least]) / min(seconds["bf16"][least]), 2),
            "exact_share": round(bf16_share, 6),
        },
        "floors": {
            "ratio_64k_to_4k": {"at_most": MAX_RATIO, "met": ratio <= MAX_RATIO},
            "exact_share": {"at_least": MIN_SHARE, "met": min(shares) >= MIN_SHARE},
        },
        "environment": environment(),
    }


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.assign_scaling", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--nlist", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--dims", type=int, default=128)
    parser.add_argument("--metric", choices=("l2", "ip"), default="l2")
    parser.add_argument("--rows", type=int, default=100_000, help="vectors that the times are of")
    parser.add_argument(
        "--exact-rows", type=int, default=80_000, help="of these, for exact assignment at the least nlist"
    )
    parser.add_argument("--rows-per-list", type=int, default=13, help="vectors a list in the training sample")
    parser.add_argument("--iterations", type=int, default=3, help="of the k-means that makes the centroids")
    parser.add_argument("--slack-rows", type=int, default=8192, help="vectors that the slack is measured on")
    parser.add_argument("--target", type=float, default=0.96, help="share of these in their exact nearest list")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one line of JSON and nothing else")
    parser.add_argument("--out", help="also write the report to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
