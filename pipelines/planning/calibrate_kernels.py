"""What training and finding lists cost on one core here: the kernels on made, clustered vectors of the model's dimension.

d dimensions, n rows, K lists.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from cluster.capacity.stages import kmeans_rows, pq_rows
from kernels.assign import assign_nearest
from kernels.assign_two_level import CentroidGroups, assign_two_level, measure_slack
from kernels.kmeans import group_centroids, kmeans
from kernels.pq import pq_train
from pipelines.planning.calibrate_stages import clustered, least_s

EXACT_LISTS = 1024
TWO_LEVEL_LISTS = (4096, 16_384)
ROWS = 8192
KMEANS_LISTS, KMEANS_ROWS = 256, 16_384
PQ_ROWS = 10_240
TARGET = 0.97  # share of the rows that two levels lead to their nearest list


def measure_kernels(d: int, M: int, iterations: int, pq_iterations: int) -> dict[str, float]:
    """Seconds by coefficient, of one thread. Sets the number of torch threads of this process."""
    import torch

    torch.set_num_threads(1)
    x_ND = clustered(ROWS, d)
    found: dict[str, float] = {}
    exact_KD = clustered(EXACT_LISTS, d, seed=7)
    exact_s = least_s(lambda _: assign_nearest(x_ND, exact_KD, metric="ip"))
    found["assign_s_per_row_dim_list"] = exact_s / ROWS / d / EXACT_LISTS
    points = []
    for nlist in TWO_LEVEL_LISTS:
        groups = group_centroids(clustered(nlist, d, seed=8), metric="ip", seed=1)
        slack, _ = measure_slack(x_ND[:1024], groups, target=TARGET)
        seconds = least_s(partial(_assign, x_ND, groups, slack))
        points.append((nlist**0.5, seconds / ROWS / d))
    (root_a, a), (root_b, b) = points
    slope = max(0.0, (b - a) / (root_b - root_a))
    found["two_level_s_per_row_dim_root"] = slope
    found["two_level_s_per_row_dim"] = max(0.0, a - slope * root_a)
    sample_ND = clustered(KMEANS_ROWS, d, seed=9)
    kmeans_s = least_s(lambda _: kmeans(sample_ND, KMEANS_LISTS, metric="ip", seed=1, iterations=iterations), 2)
    rows = kmeans_rows(KMEANS_ROWS, KMEANS_LISTS, iterations)
    assigned_s = rows * d * KMEANS_LISTS * found["assign_s_per_row_dim_list"]
    found["kmeans_s_per_row_dim"] = max(0.0, kmeans_s - assigned_s) / rows / d
    residuals_ND = np.ascontiguousarray(sample_ND[:PQ_ROWS])
    pq_s = least_s(lambda _: pq_train(residuals_ND, M, 8, seed=1, iterations=pq_iterations), 2)
    found["pq_train_s_per_row_dim"] = pq_s / pq_rows(PQ_ROWS, 8, pq_iterations) / d
    return found


def _assign(x_ND: npt.NDArray[np.float32], groups: CentroidGroups, slack: float, _: int) -> None:
    assign_two_level(x_ND, groups, slack=slack)
