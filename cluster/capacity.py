"""How much a build takes before it runs: units of work, bytes, memory, pods. Arithmetic only; Ray is not imported.

`Workload` says what is to be done (cluster/workload.py), `Coefficients` what each part costs (cluster/coefficients.py).
"""

from __future__ import annotations

from cluster.capacity_memory import MemoryPeak, memory_peaks, update_driver_bytes
from cluster.capacity_pods import PodSize, PodSizes, size_pods
from cluster.coefficients import Coefficient, Coefficients, measured
from cluster.workload import Corpus, Fleet, ModelShape, Workload

__all__ = [
    "Coefficient",
    "Coefficients",
    "Corpus",
    "Fleet",
    "MemoryPeak",
    "ModelShape",
    "PodSize",
    "PodSizes",
    "Workload",
    "measured",
    "memory_peaks",
    "size_pods",
    "update_driver_bytes",
]
