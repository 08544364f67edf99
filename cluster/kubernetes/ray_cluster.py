"""The Ray cluster of a job or a service, as KubeRay's RayClusterSpec."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from cluster.capacity.pods import PodSize, PodSizes
from cluster.kubernetes.manifest_settings import ManifestSettings
from cluster.kubernetes.pod_templates import HOME, container_security, head_template, worker_template


def ray_cluster_spec(
    settings: ManifestSettings, sizes: PodSizes, *, serves: bool, keeps_workers: bool = False, max_workers: int = 0
) -> dict[str, Any]:
    """Head and worker groups with token authentication and Ray's autoscaler.

    A job's workers are all there in the beginning; those that are idle for `idle_minutes` are given back, also while others
    are still to come or the driver lists sources, and come again when the job asks for them: so its command must say how
    many encoders it wants (pipelines/manifest_job.py). keeps_workers: none is given back before the end, for a job that
    takes as many encoders as there is room for. A service keeps its least number.
    max_workers: most nodes of a worker group; 0: as many as the sizes say.
    """
    auth: dict[str, Any] = {"mode": "token"}
    if settings.ray_token_secret:
        auth["secretName"] = settings.ray_token_secret
    groups = [("cpu", sizes.cpu_workers), ("gpu", sizes.gpu_workers)]
    return {
        # The version in the image: it decides which probes, and which authentication, KubeRay uses.
        "rayVersion": version("ray"),
        "authOptions": auth,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": settings.idle_minutes * 60,
            "securityContext": container_security(),
            "env": [{"name": "HOME", "value": HOME}],
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
            "resources": {"requests": {"cpu": "200m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        },
        "headGroupSpec": {
            # No CPU: tasks and actors go to workers, the head stays free for Ray itself and for the driver.
            "rayStartParams": {
                "num-cpus": "0",
                "dashboard-host": "0.0.0.0",
                "object-store-memory": str(sizes.head.object_store_bytes),
            },
            "template": head_template(settings, sizes.head, serves=serves),
        },
        "workerGroupSpecs": [
            _worker_group(name, settings, size, max_workers, serves, keeps_workers or serves)
            for name, size in groups
            if size is not None
        ],
    }


def _worker_group(
    name: str, settings: ManifestSettings, size: PodSize, max_workers: int, serves: bool, keeps: bool
) -> dict[str, Any]:
    parameters = {"num-cpus": str(size.cpus), "object-store-memory": str(size.object_store_bytes)}
    if size.gpus:
        parameters["num-gpus"] = str(size.gpus)
    return {
        "groupName": name,
        "replicas": size.num_pods,
        "minReplicas": size.num_pods if keeps else 0,
        "maxReplicas": max(size.num_pods, max_workers),
        "rayStartParams": parameters,
        "template": worker_template(settings, size, serves=serves),
    }
