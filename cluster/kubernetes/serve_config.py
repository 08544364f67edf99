"""Ray Serve's configuration of the service, as RayService takes it: YAML in a string. See cluster/serving.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from cluster.kubernetes.manifest_settings import ManifestSettings
from cluster.kubernetes.pod_templates import SERVE_PORT

TOKEN_VARIABLE = "VECTORMILL_TOKEN"  # holds the service's bearer token in the pods


def serve_config(settings: ManifestSettings, service: Mapping[str, Any]) -> str:
    """The service's application, behind a proxy on every node that has a replica.

    service: further fields of the service's own settings. It listens on all addresses of its pod, since requests come
    from Kubernetes' service.
    """
    arguments: dict[str, Any] = {
        "root": settings.root,
        "replicas": settings.replicas,
        "threads_per_replica": settings.cpus_per_replica,
    }
    further = dict(service)
    if "drain_s" in further:
        arguments["drain_s"] = further.pop("drain_s")
    if settings.bearer_token_secret:
        further["token_env"] = TOKEN_VARIABLE
    if further:
        arguments["settings"] = further
    application: dict[str, Any] = {
        "name": "vectormill",
        "route_prefix": "/",
        "import_path": "cluster.serving:build_app",
        "args": arguments,
    }
    if settings.max_replicas > settings.replicas:
        bounds = {"min_replicas": settings.replicas, "max_replicas": settings.max_replicas}
        application["deployments"] = [{"name": "search", "autoscaling_config": bounds}]
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT},
        "applications": [application],
    }
    return yaml.safe_dump(config, sort_keys=False)
