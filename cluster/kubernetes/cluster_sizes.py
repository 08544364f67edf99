"""Sizes of a Ray cluster's pods: those of the sizing code, for the nodes that the settings ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cluster.capacity.memory import memory_peaks
from cluster.capacity.pods import HEADROOM, PodSize, PodSizes, node_bytes, size_pods
from cluster.capacity.workload import Workload
from cluster.kubernetes.manifest_settings import ManifestSettings

GIB = 1 << 30


def job_sizes(settings: ManifestSettings, work: Workload, c: Mapping[str, float], *, for_updates: bool) -> PodSizes:
    """Head, workers with GPUs and without. `work.fleet` are the nodes that encode."""
    sizes = size_pods(work, c, for_updates=for_updates)
    if sizes.gpu_workers is not None and settings.cpu_nodes:
        store = sizes.gpu_workers.object_store_bytes
        private = node_bytes(work, c, memory_peaks(work, c), settings.cpus_per_node, encoders=0)
        memory = -(-int(HEADROOM * private + store) // GIB) * GIB
        cpu_workers = PodSize(settings.cpu_nodes, settings.cpus_per_node, 0, memory, store)
        sizes = dataclasses.replace(sizes, cpu_workers=cpu_workers)
    return _as_told(settings, sizes)


def service_sizes(settings: ManifestSettings) -> PodSizes:
    """A head, and a node for each replica."""
    head = PodSize(1, 2, 0, 4 * GIB, GIB // 2)
    # A replica: libraries and model, 256 MiB each of rows and of blocks of codes, what its queries take; and Ray's own.
    replica = PodSize(settings.replicas, settings.cpus_per_replica, 0, 4 * GIB, GIB // 2)
    return _as_told(settings, PodSizes(head, replica, None))


def _as_told(settings: ManifestSettings, sizes: PodSizes) -> PodSizes:
    def with_memory(size: PodSize | None, gib: float) -> PodSize | None:
        return dataclasses.replace(size, memory_bytes=int(gib * GIB)) if size is not None and gib else size

    head = with_memory(sizes.head, settings.head_memory_gib) or sizes.head
    workers = [with_memory(size, settings.memory_per_node_gib) for size in (sizes.cpu_workers, sizes.gpu_workers)]
    return PodSizes(head, *workers)
