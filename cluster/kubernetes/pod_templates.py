"""Pod templates of a Ray cluster on Kubernetes: the head, worker nodes with and without GPUs, the submitter.

Every pod keeps to Kubernetes' `restricted` pod security standard and has a read-only image: what is written goes to
/tmp, what Ray shares between processes to /dev/shm. Probes are left to KubeRay, which asks Ray itself (Ray 2.53 on).
"""

from __future__ import annotations

import math
from typing import Any

from cluster.capacity.pods import PodSize
from cluster.kubernetes.manifest_settings import ManifestSettings, labels

USER_ID = 1000  # of the image; see Dockerfile
HOME = "/tmp"  # the image is read-only
# How a node says that it may be taken away: Karpenter, EKS node groups, GKE, AKS.
SPOT_LABELS = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
SERVE_PORT = 8000
GPU = "nvidia.com/gpu"
SHARED_MEMORY_BESIDE_STORE = 256 << 20  # what Ray and torch put into /dev/shm beside the object store
INSTANCE_LABEL = "app.kubernetes.io/instance"


def common_labels(settings: ManifestSettings) -> dict[str, str]:
    """Labels that every resource of `settings.name` carries."""
    return {"app.kubernetes.io/name": "vectormill", INSTANCE_LABEL: settings.name}


def service_account_name(settings: ManifestSettings) -> str:
    """The account of all Ray pods: the one that was named, or that the manifest brings."""
    return settings.service_account or settings.name


def head_template(settings: ManifestSettings, size: PodSize, *, serves: bool) -> dict[str, Any]:
    """The head: no work is scheduled on it, it is not evicted for the sake of packing, and never on spot.

    Its account's token is mounted: KubeRay's autoscaler runs beside it.
    """
    container = _ray_container("ray-head", settings, size)
    # KubeRay makes the service from the head's port of this name, also where the head takes none of its requests.
    ports = HEAD_PORTS | ({"serve": SERVE_PORT} if serves else {})
    container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    spec = _pod_spec(settings, size, [container])
    spec["automountServiceAccountToken"] = True
    on_spot = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in SPOT_LABELS.items()]
    spec["affinity"] = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": on_spot}]}
        }
    }
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
    return {"metadata": {"labels": common_labels(settings), "annotations": annotations}, "spec": spec}


def worker_template(settings: ManifestSettings, size: PodSize, *, serves: bool) -> dict[str, Any]:
    """A worker node. It has no access to Kubernetes' API.

    Workers of a job are placed in one zone where possible, since their blocks travel between them; those that serve are
    spread over nodes and zones.
    """
    container = _ray_container("ray-worker", settings, size)
    if serves:
        container["ports"] = [{"name": "serve", "containerPort": SERVE_PORT}]
    spec = _pod_spec(settings, size, [container])
    spec["automountServiceAccountToken"] = False
    selector = labels(settings.node_selector, "node_selector")
    tolerations: list[dict[str, str]] = []
    if size.gpus:
        selector |= labels(settings.gpu_selector, "gpu_selector")
        tolerations.append({"key": GPU, "operator": "Exists", "effect": "NoSchedule"})
    if selector:
        spec["nodeSelector"] = selector
    affinity: dict[str, Any] = {}
    same_instance = {"matchLabels": {INSTANCE_LABEL: settings.name}}
    if serves:
        spec["topologySpreadConstraints"] = [
            {"maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": same_instance}
            for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
        ]
    else:
        near = {"labelSelector": same_instance, "topologyKey": "topology.kubernetes.io/zone"}
        affinity["podAffinity"] = {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": near}]
        }
    if settings.spot:
        affinity["nodeAffinity"] = {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 100, "preference": {"matchExpressions": [{"key": k, "operator": "In", "values": [v]}]}}
                for k, v in SPOT_LABELS.items()
            ]
        }
        tolerations += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            for key, value in SPOT_LABELS.items()
        ]
    if affinity:
        spec["affinity"] = affinity
    if tolerations:
        spec["tolerations"] = tolerations
    return {"metadata": {"labels": common_labels(settings)}, "spec": spec}


def submitter_template(settings: ManifestSettings) -> dict[str, Any]:
    """The pod that submits a RayJob's command and follows its log; KubeRay fills in what it runs."""
    return {
        "metadata": {"labels": common_labels(settings)},
        "spec": small_pod_spec(settings, "ray-job-submitter") | {"automountServiceAccountToken": False},
    }


def small_pod_spec(settings: ManifestSettings, container_name: str) -> dict[str, Any]:
    """A pod that only talks to others: half a core, 1 GiB at most."""
    container = {
        "name": container_name,
        "image": settings.image,
        "env": [{"name": "HOME", "value": HOME}],
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": container_security(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {
        "restartPolicy": "Never",
        "securityContext": _pod_security(),
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
    }
    return spec | _image_pull_secrets(settings)


def container_security() -> dict[str, Any]:
    """No privileges, no capabilities, nothing to write in the image."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def mebibytes(num_bytes: float) -> str:
    """A Kubernetes quantity that holds `num_bytes`."""
    return f"{math.ceil(num_bytes / (1 << 20))}Mi"


def _pod_security() -> dict[str, Any]:
    # fsGroup: the projected token of the cloud identity is readable by the group only.
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _pod_spec(settings: ManifestSettings, size: PodSize, containers: list[dict[str, Any]]) -> dict[str, Any]:
    # Never: the autoscaler replaces a node that failed, with another name; a restarted raylet would come back as a ghost.
    return {
        "restartPolicy": "Never",
        "serviceAccountName": service_account_name(settings),
        "securityContext": _pod_security(),
        "containers": containers,
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": f"{settings.scratch_gib}Gi"}},
            {
                "name": "shared-mem",
                "emptyDir": {
                    "medium": "Memory",
                    "sizeLimit": mebibytes(size.object_store_bytes + SHARED_MEMORY_BESIDE_STORE),
                },
            },
        ],
    } | _image_pull_secrets(settings)


def _ray_container(name: str, settings: ManifestSettings, size: PodSize) -> dict[str, Any]:
    # Requests equal limits: a node is killed for its own memory, never for a neighbour's.
    amounts = {
        "cpu": str(size.cpus),
        "memory": mebibytes(size.memory_bytes),
        "ephemeral-storage": f"{settings.scratch_gib + 5}Gi",  # 5: logs, and what Kubernetes counts beside the volumes
    }
    if size.gpus:
        amounts[GPU] = str(size.gpus)
    container: dict[str, Any] = {
        "name": name,
        "image": settings.image,
        "env": _environment(settings),
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": container_security(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shared-mem", "mountPath": "/dev/shm"}],
    }
    if settings.credentials_secret:
        container["envFrom"] = [{"secretRef": {"name": settings.credentials_secret}}]
    return container


def _environment(settings: ManifestSettings) -> list[dict[str, Any]]:
    values = {
        "HOME": HOME,
        "NUMBA_CACHE_DIR": f"{HOME}/numba",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if settings.s3_endpoint:
        values["AWS_ENDPOINT_URL"] = settings.s3_endpoint
    if settings.region:
        values["AWS_REGION"] = settings.region
    return [{"name": name, "value": value} for name, value in values.items()]


def _image_pull_secrets(settings: ManifestSettings) -> dict[str, Any]:
    return {"imagePullSecrets": [{"name": settings.image_pull_secret}]} if settings.image_pull_secret else {}
