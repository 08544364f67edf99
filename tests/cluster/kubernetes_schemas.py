"""Three statements of what Kubernetes and KubeRay accept.

Ours: the fields that vectormill writes, their types and values, as the APIs' documentation has them; any other field is an
error. KubeRay's own: its custom resource definitions, from the folder that VECTORMILL_KUBERAY_CRDS names. Kubernetes' own:
from the package kubernetes-validate, where it is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import referencing
import yaml

Schema = dict[str, Any]
Resource = dict[str, Any]
KUBERNETES = "v1.34.0-local-strict"


def embedded(resources: list[Resource]) -> list[Resource]:
    """The resources, and those that lie in ConfigMaps among them."""
    inside = [yaml.safe_load(text) for r in resources if r["kind"] == "ConfigMap" for text in r["data"].values()]
    return [*resources, *inside]


def problems(resource: Resource, schema: Any) -> list[str]:
    """What is wrong with the resource, by path."""
    found = jsonschema.Draft202012Validator(schema).iter_errors(resource)
    return [f"{resource['kind']} {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]


# ----- ours ---------------------------------------------------------------------------------------------------------


def obj(required: str = "", **properties: Any) -> Schema:
    """An object of these fields and no others."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def many(items: Any, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def text(pattern: str = "") -> Schema:
    return {"type": "string", "pattern": pattern} if pattern else {"type": "string"}


def whole(least: int = 0) -> Schema:
    return {"type": "integer", "minimum": least}


BOOLEAN = {"type": "boolean"}
LABEL_KEY = r"^([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?$"
LABELS = {
    "type": "object",
    "propertyNames": {"pattern": LABEL_KEY},
    "additionalProperties": text(r"^([A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?)?$"),
}
TEXTS = {"type": "object", "additionalProperties": text()}
NAME = text(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
META = obj("name labels", name=NAME, namespace=NAME, labels=LABELS, annotations=TEXTS)
QUANTITY = text(r"^[0-9]+(m|Mi|Gi)?$")
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
EXPRESSION = obj("key operator values", key=text(LABEL_KEY), operator=one_of("In", "NotIn"), values=many(text(), 1))
SELECTOR = obj("matchLabels", matchLabels=LABELS)
VALUE_FROM = obj(
    secretKeyRef=obj("name key", name=NAME, key=text()),
    fieldRef=obj("fieldPath", fieldPath=text(r"^metadata\.labels\['[a-z./-]+'\]$")),
)
VARIABLE = obj("name", name=text("^[A-Z][A-Z0-9_]*$"), value=text(), valueFrom=VALUE_FROM)
CONTAINER_SECURITY = obj(
    "allowPrivilegeEscalation readOnlyRootFilesystem capabilities",
    allowPrivilegeEscalation=one_of(False),
    readOnlyRootFilesystem=one_of(True),
    capabilities=obj("drop", drop=one_of(["ALL"])),
)
POD_SECURITY = obj(
    "runAsNonRoot runAsUser seccompProfile",
    runAsNonRoot=one_of(True),
    runAsUser=whole(1),
    runAsGroup=whole(1),
    fsGroup=whole(1),
    seccompProfile=one_of({"type": "RuntimeDefault"}),
)
MOUNT = obj("name mountPath", name=NAME, mountPath=text("^/"), readOnly=BOOLEAN)
RESOURCES = obj("requests limits", requests=QUANTITIES, limits=QUANTITIES)
CONTAINER = obj(
    "name image resources securityContext",
    name=NAME,
    image=text(),
    command=many(text(), 1),
    env=many(VARIABLE),
    envFrom=many(obj("secretRef", secretRef=obj("name", name=NAME))),
    ports=many(obj("name containerPort", name=text("^[a-z-]{1,15}$"), containerPort=whole(1))),
    resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
    volumeMounts=many(MOUNT),
)
VOLUME = obj(
    "name",
    name=NAME,
    emptyDir=obj("sizeLimit", medium=one_of("Memory"), sizeLimit=QUANTITY),
    configMap=obj("name", name=NAME),
)
EXPRESSIONS = obj("matchExpressions", matchExpressions=many(EXPRESSION, 1))
NODE_AFFINITY = obj(
    requiredDuringSchedulingIgnoredDuringExecution=obj("nodeSelectorTerms", nodeSelectorTerms=many(EXPRESSIONS, 1)),
    preferredDuringSchedulingIgnoredDuringExecution=many(
        obj("weight preference", weight=whole(1) | {"maximum": 100}, preference=EXPRESSIONS)
    ),
)
POD_TERM = obj("topologyKey labelSelector", topologyKey=text(LABEL_KEY), labelSelector=SELECTOR)
POD_AFFINITY = obj(
    preferredDuringSchedulingIgnoredDuringExecution=many(
        obj("weight podAffinityTerm", weight=whole(1) | {"maximum": 100}, podAffinityTerm=POD_TERM)
    )
)
SPREAD = obj(
    "maxSkew topologyKey whenUnsatisfiable labelSelector",
    maxSkew=whole(1),
    topologyKey=text(LABEL_KEY),
    whenUnsatisfiable=one_of("ScheduleAnyway", "DoNotSchedule"),
    labelSelector=SELECTOR,
)
TOLERATION = obj(
    "key operator",
    key=text(LABEL_KEY),
    operator=one_of("Exists", "Equal"),
    value=text(),
    effect=one_of("NoSchedule", "NoExecute", "PreferNoSchedule"),
)
POD = obj(
    "containers securityContext restartPolicy automountServiceAccountToken",
    restartPolicy=one_of("Never"),
    serviceAccountName=NAME,
    automountServiceAccountToken=BOOLEAN,
    imagePullSecrets=many(obj("name", name=NAME)),
    securityContext=POD_SECURITY,
    containers=many(CONTAINER, 1),
    volumes=many(VOLUME),
    nodeSelector=LABELS,
    affinity=obj(nodeAffinity=NODE_AFFINITY, podAffinity=POD_AFFINITY),
    tolerations=many(TOLERATION),
    topologySpreadConstraints=many(SPREAD),
    terminationGracePeriodSeconds=whole(1),
)
TEMPLATE = obj("metadata spec", metadata=obj(labels=LABELS, annotations=TEXTS), spec=POD)
START_PARAMETERS = obj(
    "num-cpus object-store-memory",
    **{"num-cpus": text("^[0-9]+$"), "num-gpus": text("^[0-9]+$"), "object-store-memory": text("^[0-9]+$")},
    **{"dashboard-host": one_of("0.0.0.0")},
)
CLUSTER = obj(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion=text(r"^[0-9]+\.[0-9]+\.[0-9]+$"),
    authOptions=obj("mode", mode=one_of("token"), secretName=NAME),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=obj(
        version=one_of("v1", "v2"),
        idleTimeoutSeconds=whole(),
        securityContext=CONTAINER_SECURITY,
        env=many(VARIABLE),
        volumeMounts=many(MOUNT),
        resources=RESOURCES,
    ),
    headGroupSpec=obj("rayStartParams template", rayStartParams=START_PARAMETERS, template=TEMPLATE),
    workerGroupSpecs=many(
        obj(
            "groupName replicas minReplicas maxReplicas rayStartParams template",
            groupName=text("^[a-z]{1,20}$"),
            replicas=whole(),
            minReplicas=whole(),
            maxReplicas=whole(1),
            rayStartParams=START_PARAMETERS,
            template=TEMPLATE,
        ),
        1,
    ),
)
RAY_JOB = obj(
    "entrypoint submissionMode rayClusterSpec shutdownAfterJobFinishes",
    entrypoint=text(),
    submissionMode=one_of("K8sJobMode", "HTTPMode", "SidecarMode"),
    submitterPodTemplate=TEMPLATE,
    submitterConfig=obj(backoffLimit=whole()),
    backoffLimit=whole(),
    activeDeadlineSeconds=whole(1),
    preRunningDeadlineSeconds=whole(1),
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=whole(),
    rayClusterSpec=CLUSTER,
)
RAY_SERVICE = obj(
    "serveConfigV2 rayClusterConfig",
    serveConfigV2=text(),
    excludeHeadPodFromServeSvc=BOOLEAN,
    rayClusterConfig=CLUSTER,
)
FAILURE_RULE = obj(
    "action",
    action=one_of("FailJob", "Ignore", "Count"),
    onPodConditions=many(obj("type status", type=one_of("DisruptionTarget"), status=one_of("True"))),
    onExitCodes=obj("operator values", operator=one_of("In", "NotIn"), values=many(whole(1), 1)),
)
JOB = obj(
    "template",
    backoffLimit=whole(),
    activeDeadlineSeconds=whole(1),
    podFailurePolicy=obj("rules", rules=many(FAILURE_RULE, 1)),
    template=TEMPLATE,
)
CRON_JOB = obj(
    "schedule jobTemplate concurrencyPolicy",
    schedule=text(r"^\S+( \S+){4}$"),
    timeZone=text(),
    suspend=BOOLEAN,
    concurrencyPolicy=one_of("Forbid"),
    startingDeadlineSeconds=whole(10),
    successfulJobsHistoryLimit=whole(),
    failedJobsHistoryLimit=whole(),
    jobTemplate=obj("spec", metadata=obj(labels=LABELS), spec=JOB),
)
RBAC = "rbac.authorization.k8s.io"
RULE = obj("apiGroups resources verbs", apiGroups=many(text(), 1), resources=many(text(), 1), verbs=many(text(), 1))
ROLE_REFERENCE = obj("apiGroup kind name", apiGroup=one_of(RBAC), kind=one_of("Role"), name=NAME)
SUBJECT = obj("kind name", kind=one_of("ServiceAccount"), name=NAME, namespace=NAME)
FIELDS: dict[tuple[str, str], Schema] = {
    ("v1", "ServiceAccount"): {},
    ("v1", "ConfigMap"): {"immutable": BOOLEAN, "data": TEXTS},
    (f"{RBAC}/v1", "Role"): {"rules": many(RULE, 1)},
    (f"{RBAC}/v1", "RoleBinding"): {"roleRef": ROLE_REFERENCE, "subjects": many(SUBJECT, 1)},
    ("batch/v1", "CronJob"): {"spec": CRON_JOB},
    ("ray.io/v1", "RayJob"): {"spec": RAY_JOB},
    ("ray.io/v1", "RayService"): {"spec": RAY_SERVICE},
}


def our_schema(resource: Resource) -> Schema:
    """What vectormill may write for a resource of this kind."""
    fields = FIELDS[resource["apiVersion"], resource["kind"]]
    return obj(" ".join(["metadata", *fields]), apiVersion=text(), kind=text(), metadata=META, **fields)


# ----- KubeRay's ----------------------------------------------------------------------------------------------------


@functools.cache
def kuberay_schemas() -> dict[tuple[str, str], Any]:
    """Of KubeRay's custom resource definitions, for unknown fields too, which the API server drops silently. Skips without them."""
    folder = os.environ.get("VECTORMILL_KUBERAY_CRDS")
    if not folder:
        pytest.skip(
            "set VECTORMILL_KUBERAY_CRDS to a folder with KubeRay's CRDs (docs/cluster.md says how to get them)"
        )
    found: dict[tuple[str, str], Any] = {}
    for file in sorted(Path(folder).glob("*.yaml")):
        spec = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in spec["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = META
            found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    assert found, f"{folder} holds no custom resource definition"
    return found


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("anyOf", None)
        strict["type"] = ["integer", "string"]
    if isinstance(strict.get("properties"), dict) and not strict.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


# ----- Kubernetes' --------------------------------------------------------------------------------------------------


def kubernetes_problems(resource: Resource) -> Iterator[str]:
    """What Kubernetes' own schema has against the resource, or the pod template. Skips without kubernetes-validate."""
    # Found, not imported: the schemas are all that is wanted of it.
    package = importlib.util.find_spec("kubernetes_validate")
    if package is None or package.origin is None:
        pytest.skip("kubernetes-validate, which carries Kubernetes' schemas, is not installed")
    folder = Path(package.origin).parent / "kubernetes-json-schema" / KUBERNETES
    version = resource["apiVersion"].replace(".authorization.k8s.io", "").replace("/", "-")
    schema = json.loads((folder / f"{resource['kind'].lower()}-{version}.json").read_text(encoding="utf-8"))
    definitions = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))
    registry: Any = referencing.Registry()
    for content in (definitions, schema):
        registry = referencing.Resource.from_contents(content) @ registry
    for error in jsonschema.Draft202012Validator(schema, registry=registry).iter_errors(resource):
        yield f"{resource['kind']} {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
