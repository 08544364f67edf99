"""Utilisation and memory of the GPU that this process encodes on, by NVML. Where there is none, nothing is sampled."""

from __future__ import annotations

import threading
from typing import Any

from cluster.telemetry import METRICS, worker_name

EVERY_S = 1.0


class GpuSampler:
    """Samples one device from a thread until the process ends. `start` makes it, where there is a device and NVML."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._lock = threading.Lock()
        self._shares: list[float] = []
        self._memory_bytes = 0.0

    @staticmethod
    def start(device: str) -> GpuSampler | None:
        """The sampler of a torch device (`cuda`, `cuda:0`, `cpu`); None for a CPU, and where NVML cannot be asked."""
        if not device.startswith("cuda"):
            return None
        import pynvml
        import torch

        try:
            pynvml.nvmlInit()
            # By UUID: the numbers of torch are those of CUDA_VISIBLE_DEVICES, those of NVML are not.
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
            sampler = GpuSampler(pynvml, handle)
            sampler.sample()
        except (pynvml.NVMLError, RuntimeError):  # no driver that it can talk to, a device that it does not know
            return None
        threading.Thread(target=sampler._run, daemon=True, name="gpu-sampler").start()
        return sampler

    def sample(self) -> None:
        """Look once."""
        share = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
        used = float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        with self._lock:
            self._shares.append(share)
            self._memory_bytes = used
        METRICS.gauge(
            "gpu_utilisation", share, "Share of time in which the GPU computed, by NVML", worker=worker_name()
        )
        METRICS.gauge("gpu_memory_bytes", used, "Memory in use on the GPU, by NVML", worker=worker_name())

    def take(self) -> tuple[float, float]:
        """Mean utilisation (0..1) since the last call, and bytes of memory in use."""
        with self._lock:
            shares = self._shares or [0.0]
            if len(self._shares) > 1:
                self._shares = self._shares[-1:]  # a piece that is shorter than a sample gets the last one
            return round(sum(shares) / len(shares), 4), self._memory_bytes

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(EVERY_S):
            try:
                self.sample()
            except self._nvml.NVMLError:  # the device went away: encoding says so, in its own words
                return
