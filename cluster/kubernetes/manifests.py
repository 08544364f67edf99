"""KubeRay resources of a one-off job, a nightly job and the service, as plain JSON values.

No secret is in them: tokens and keys are named by their Secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.capacity.pods import PodSizes
from cluster.kubernetes.entrypoint import entrypoint
from cluster.kubernetes.manifest_settings import KINDS, ManifestSettings, role_annotation
from cluster.kubernetes.manifest_yaml import as_yaml
from cluster.kubernetes.night_run import FAILED as NIGHT_FAILED
from cluster.kubernetes.night_run import OTHER_AT_WORK, ROOT_LABEL
from cluster.kubernetes.pod_templates import (
    common_labels,
    service_account_name,
    small_pod_spec,
    submitter_template,
)
from cluster.kubernetes.ray_cluster import ray_cluster_spec
from cluster.kubernetes.serve_config import TOKEN_VARIABLE, serve_config
from operators.errors import ConfigError

Resource = dict[str, Any]
JOB_FILE = "rayjob.yaml"
JOB_FOLDER = "/etc/vectormill"
SUBMITTER_RETRIES = 3


def check_kind(kind: str | None) -> str:
    """`kind`, if there is such a one; ConfigError otherwise."""
    if kind not in KINDS:
        raise ConfigError(f"kind must be one of {', '.join(KINDS)}, got {kind!r} (--kind)")
    return kind


def job_manifests(kind: str, settings: ManifestSettings, sizes: PodSizes, words: Sequence[str]) -> list[Resource]:
    """The resources of a rayjob or a cronjob in the order in which they are to be applied.

    words: the job's command line behind `vectormill`. Raises ConfigError for what is missing or cannot be.
    """
    _check_given(settings)
    if kind == "rayjob":
        return _with_account(settings, [_ray_job(settings, sizes, [list(words)])])
    steps = [list(words)]
    if settings.keep_versions:
        steps.append(["gc", settings.root, "--keep", str(settings.keep_versions), "--delete"])
    return _with_account(settings, _nightly(settings, _ray_job(settings, sizes, steps)))


def service_manifests(
    settings: ManifestSettings, sizes: PodSizes, service: Mapping[str, Any], environment: Mapping[str, str]
) -> list[Resource]:
    """The resources of the service in the order in which they are to be applied.

    service: fields of the service's own settings; environment: variables of its pods. Raises ConfigError for what is
    missing or cannot be.
    """
    _check_given(settings)
    if not settings.bearer_token_secret and not settings.no_auth:
        raise ConfigError(
            "a service that others can reach needs a token: make a Secret with one under `token` and name it (--set"
            " bearer_token_secret=), or say --set no_auth=true"
        )
    return _with_account(settings, [_ray_service(settings, sizes, service, environment)])


def _check_given(settings: ManifestSettings) -> None:
    for key, what in (
        ("image", "what `docker build` made of the Dockerfile, with its tag"),
        ("root", "s3://bucket/index"),
    ):
        if not getattr(settings, key):
            raise ConfigError(f"{key} must be given: {what} (--set {key}=)")
    if settings.service_account and settings.role:
        raise ConfigError(
            f"role is for the account that the manifest brings; the account {settings.service_account!r} is yours: annotate it,"
            " or leave service_account empty (--set role=)"
        )


def _with_account(settings: ManifestSettings, resources: list[Resource]) -> list[Resource]:
    if settings.service_account:
        return resources
    account = _resource("v1", "ServiceAccount", settings, service_account_name(settings))
    if annotations := role_annotation(settings.role):
        account["metadata"]["annotations"] = annotations
    return [account, *resources]


def _resource(api_version: str, kind: str, settings: ManifestSettings, name: str, **fields: Any) -> Resource:
    metadata: dict[str, Any] = {"name": name, "labels": common_labels(settings)}
    if settings.namespace:
        metadata["namespace"] = settings.namespace
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}


def _ray_job(settings: ManifestSettings, sizes: PodSizes, steps: Sequence[Sequence[str]]) -> Resource:
    command = steps[0]
    keeps_workers = command[0] == "update" and "encode.device=cuda" not in command  # pipelines/manifest_job.py says why
    spec = {
        "entrypoint": entrypoint(steps),
        # A pod of its own follows the job: its log outlives the Ray cluster.
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": submitter_template(settings),
        # A submitter that lost sight of the job looks for it again, and submits it again when the head was replaced.
        "submitterConfig": {"backoffLimit": SUBMITTER_RETRIES if settings.retries else 0},
        # Another attempt gets a new Ray cluster and the same command, which goes on where the last one was.
        "backoffLimit": settings.retries,
        "activeDeadlineSeconds": max(1, round(settings.max_hours * 3600)),
        "preRunningDeadlineSeconds": settings.max_start_minutes * 60,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": settings.keep_minutes * 60,
        "rayClusterSpec": ray_cluster_spec(settings, sizes, serves=False, keeps_workers=keeps_workers),
    }
    resource = _resource("ray.io/v1", "RayJob", settings, settings.name, spec=spec)
    resource["metadata"]["labels"][ROOT_LABEL] = root_label(settings.root)
    return resource


def _nightly(settings: ManifestSettings, job: Resource) -> list[Resource]:
    """A CronJob whose pod makes the RayJob and waits for it, and what that pod may do and reads.

    KubeRay's own RayCronJob is alpha (1.7: a feature gate that is off), and has no rule against overlapping runs.
    """
    starter = f"{settings.name}-starter"
    account = _resource("v1", "ServiceAccount", settings, starter)
    rules = [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "list"]}]
    role = _resource("rbac.authorization.k8s.io/v1", "Role", settings, starter, rules=rules)
    binding = _resource(
        "rbac.authorization.k8s.io/v1",
        "RoleBinding",
        settings,
        starter,
        roleRef={"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": starter},
        subjects=[{"kind": "ServiceAccount", "name": starter}],
    )
    if settings.namespace:
        binding["subjects"][0]["namespace"] = settings.namespace
    # One name for each content: a night that has begun goes on with what it began with.
    text = as_yaml([job])
    config_name = f"{settings.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    config = _resource("v1", "ConfigMap", settings, config_name, immutable=True, data={JOB_FILE: text})
    cron_job = _resource(
        "batch/v1", "CronJob", settings, settings.name, spec=_cron_job_spec(settings, starter, config_name)
    )
    return [account, role, binding, config, cron_job]


def _cron_job_spec(settings: ManifestSettings, starter: str, config_name: str) -> dict[str, Any]:
    pod = small_pod_spec(settings, "starter") | {"serviceAccountName": starter, "automountServiceAccountToken": True}
    [container] = pod["containers"]
    container["command"] = ["python", "-m", "cluster.kubernetes.night_run", f"{JOB_FOLDER}/{JOB_FILE}"]
    container["env"] += [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['batch.kubernetes.io/{label}']"}}}
        for name, label in (("JOB_NAME", "job-name"), ("JOB_UID", "controller-uid"))
    ]
    container["volumeMounts"].append({"name": "job", "mountPath": JOB_FOLDER, "readOnly": True})
    pod["volumes"].append({"name": "job", "configMap": {"name": config_name}})
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        # KubeRay has made the attempts: another pod would only find the same.
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [NIGHT_FAILED, OTHER_AT_WORK]}},
    ]
    job_spec = {
        "backoffLimit": 6,
        "podFailurePolicy": {"rules": rules},
        # Every attempt of the RayJob ends itself after max_hours; this is for a RayJob that no operator looks after.
        "activeDeadlineSeconds": round(settings.max_hours * 3600) * (settings.retries + 1) + 3600,
        "template": {"metadata": {"labels": common_labels(settings)}, "spec": pod},
    }
    return {
        "schedule": settings.schedule,
        "timeZone": settings.time_zone,
        "suspend": settings.suspend,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 7,
        "jobTemplate": {"metadata": {"labels": common_labels(settings)}, "spec": job_spec},
    }


def _ray_service(
    settings: ManifestSettings, sizes: PodSizes, service: Mapping[str, Any], environment: Mapping[str, str]
) -> Resource:
    cluster = ray_cluster_spec(settings, sizes, serves=True, max_workers=settings.max_replicas)
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in environment.items()]
    if settings.bearer_token_secret:
        reference = {"secretKeyRef": {"name": settings.bearer_token_secret, "key": "token"}}
        variables.append({"name": TOKEN_VARIABLE, "valueFrom": reference})
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        known = group["template"]["spec"]["containers"][0]["env"]
        known += [variable for variable in variables if variable["name"] not in {other["name"] for other in known}]
    spec = {
        "serveConfigV2": serve_config(settings, service),
        # Requests go to workers; the head has no replica to answer them.
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": cluster,
    }
    return _resource("ray.io/v1", "RayService", settings, settings.name, spec=spec)


def root_label(root: str) -> str:
    """Label value that jobs at the same index root share."""
    return hashlib.sha256(root.rstrip("/").encode()).hexdigest()[:16]
