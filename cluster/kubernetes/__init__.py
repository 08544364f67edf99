"""Kubernetes: the resources that KubeRay runs a build, a nightly update and the service from, and what starts a night's run."""
