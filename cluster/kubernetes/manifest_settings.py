"""Settings of `vectormill manifests`: typed, documented, checked. Keys of `--set` are the names of the fields."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from operators.errors import ConfigError

KINDS = ("rayjob", "cronjob", "rayservice")
COMMANDS = ("build", "update", "compact", "verify")
# KubeRay takes 47 characters for a RayJob; that of a night has the CronJob's name, a dash, 8 digits, and `-run`.
MAX_NAME_LENGTH = 34
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?)?")
MAX_LABEL_LENGTH = 63
CRON_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))


def _setting(default: Any, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class ManifestSettings:
    """What a manifest is made from. Raises ConfigError for a value that Kubernetes or KubeRay would refuse, or run wrongly."""

    # What runs
    name: str = _setting("vectormill", "name of the resource, and the beginning of all others")
    namespace: str = _setting("", "Kubernetes namespace; empty: that of kubectl")
    image: str = _setting("", "image with a tag or a digest, not `latest`: a retry must run the same code (required)")
    image_pull_secret: str = _setting("", "Secret for a private registry")
    command: str = _setting("", "build, update, compact or verify; empty: build in a RayJob, update in a CronJob")
    sources: tuple[str, ...] = _setting((), "s3:// prefixes or objects of the corpus, with commas between")
    root: str = _setting("", "s3://bucket/name of the index (required)")
    # When
    schedule: str = _setting("0 3 * * *", "of a CronJob: minute, hour, day of month, month, day of week")
    time_zone: str = _setting("Etc/UTC", "of the schedule")
    keep_versions: int = _setting(7, "a nightly job ends with gc, which keeps so many; 0: no gc")
    suspend: bool = _setting(False, "make the CronJob, but let it start nothing")
    retries: int = _setting(2, "new Ray clusters after a failed one; each resumes the same run")
    max_hours: float = _setting(
        24.0, "an attempt that takes longer is ended; the job has failed then, and is not tried again"
    )
    max_start_minutes: int = _setting(60, "so long the nodes may take to come; then the job fails instead of waiting")
    keep_minutes: int = _setting(30, "a finished job's Ray cluster stays so long, for its dashboard and logs")
    # Size of the corpus
    docs: float = _setting(1e6, "documents, as for `plan`: memory follows from it")
    tokens_per_doc: float = _setting(120.0, "mean tokens of a document, as for `plan`")
    bytes_per_doc: float = _setting(0.0, "mean bytes of a document's text; 0: from the tokens")
    # Nodes
    nodes: int = _setting(1, "worker nodes that encode")
    gpu: str = _setting("none", "GPU of these nodes, as for `plan`: h100, h200, a100, l4; none: they encode on CPUs")
    gpus_per_node: int = _setting(0, "GPUs of each; 0: one, if there is a `gpu`")
    cpus_per_node: int = _setting(8, "CPUs of each worker node")
    cpu_nodes: int = _setting(1, "beside nodes with GPUs: nodes without, for reading and for building the index")
    memory_per_node_gib: float = _setting(0.0, "memory of each worker node; 0: what the sizing says")
    head_memory_gib: float = _setting(0.0, "memory of the head; 0: what the sizing says")
    scratch_gib: int = _setting(50, "disk of a node for temporary files and what Ray spills")
    node_selector: tuple[str, ...] = _setting((), "labels of worker nodes, key=value with commas between")
    gpu_selector: tuple[str, ...] = _setting((), "labels of nodes with GPUs, such as nvidia.com/gpu.product=NVIDIA-L4")
    spot: bool = _setting(False, "workers prefer spot nodes; the head never runs on one")
    idle_minutes: int = _setting(5, "a worker node that has had nothing to do for so long is given back")
    # Access
    service_account: str = _setting("", "of all Ray pods; empty: one is made, with the name of the resource")
    role: str = _setting("", "cloud identity of that account: arn:aws:iam::... or NAME@PROJECT.iam.gserviceaccount.com")
    credentials_secret: str = _setting(
        "", "Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, where there is no cloud identity"
    )
    s3_endpoint: str = _setting("", "URL of an S3 server of your own")
    region: str = _setting("", "region of the buckets")
    ray_token_secret: str = _setting(
        "", "Secret with Ray's token under `auth_token`; empty: KubeRay makes one for each Ray cluster"
    )
    # Service
    replicas: int = _setting(2, "least replicas of the service")
    max_replicas: int = _setting(0, "most replicas; 0: as many as `replicas`")
    cpus_per_replica: int = _setting(2, "CPUs of a replica")
    bearer_token_secret: str = _setting("", "Secret with the service's bearer token under `token`")
    no_auth: bool = _setting(False, "let everybody use the service who can reach it")

    def __post_init__(self) -> None:
        for key in ("namespace", "service_account", "image_pull_secret", *SECRETS):
            value = getattr(self, key)
            if value and not (DNS_SUBDOMAIN.fullmatch(value) and len(value) <= MAX_LABEL_LENGTH):
                raise ConfigError(f"{key} must be the name of a Kubernetes resource, got {value!r} (--set {key}=)")
        rules = [
            ("image", not self.image or _is_pinned(self.image), "an image with a tag other than latest, or a digest"),
            ("command", self.command in ("", *COMMANDS), f"one of {', '.join(COMMANDS)}"),
            ("root", not self.root or _is_s3(self.root), "s3://bucket/name: pods share no disk"),
            ("sources", all(_is_s3(s) for s in self.sources), "s3:// URLs: pods share no disk"),
            ("time_zone", bool(self.time_zone), "a name such as Europe/Berlin"),
            ("retries", self.retries >= 0, "at least 0"),
            ("docs", self.docs >= 1, "at least 1"),
            ("tokens_per_doc", self.tokens_per_doc >= 1, "at least 1"),
            ("keep_versions", self.keep_versions >= 0, "at least 0"),
            ("max_hours", self.max_hours > 0, "above 0"),
            ("max_start_minutes", self.max_start_minutes >= 1, "at least 1"),
            ("keep_minutes", self.keep_minutes >= 0, "at least 0"),
            ("nodes", self.nodes >= 1, "at least 1"),
            ("gpus_per_node", self.gpus_per_node >= 0, "at least 0"),
            ("cpus_per_node", self.cpus_per_node > self.num_gpus, "at least 1, and 1 more for each GPU"),
            ("cpu_nodes", self.cpu_nodes >= 0, "at least 0"),
            ("memory_per_node_gib", self.memory_per_node_gib >= 0, "at least 0"),
            ("head_memory_gib", self.head_memory_gib >= 0, "at least 0"),
            ("scratch_gib", self.scratch_gib >= 1, "at least 1"),
            ("idle_minutes", self.idle_minutes >= 1, "at least 1"),
            ("s3_endpoint", not self.s3_endpoint or "://" in self.s3_endpoint, "a URL"),
            ("replicas", self.replicas >= 1, "at least 1"),
            ("max_replicas", self.max_replicas == 0 or self.max_replicas >= self.replicas, "0 or at least `replicas`"),
            ("cpus_per_replica", self.cpus_per_replica >= 1, "at least 1"),
        ]
        for key, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{key} must be {rule}, got {getattr(self, key)!r} (--set {key}=)")
        if not DNS_LABEL.fullmatch(self.name) or len(self.name) > MAX_NAME_LENGTH:
            raise ConfigError(
                f"name must be a DNS label of at most {MAX_NAME_LENGTH} characters (a-z, 0-9, -; from a letter on),"
                f" got {self.name!r} (--set name=)"
            )
        if self.gpus_per_node and self.gpu == "none":
            raise ConfigError(f"gpus_per_node={self.gpus_per_node} needs to know which GPU: --set gpu=h100, say")
        check_schedule(self.schedule)
        for key in ("node_selector", "gpu_selector"):
            labels(getattr(self, key), key)
        role_annotation(self.role)

    @property
    def num_gpus(self) -> int:
        """GPUs of a node that encodes."""
        return self.gpus_per_node or (0 if self.gpu == "none" else 1)


SECRETS = ("credentials_secret", "ray_token_secret", "bearer_token_secret")


def check_schedule(schedule: str) -> None:
    """Raise ConfigError unless `schedule` is five cron fields of numbers, `*`, lists, ranges and steps."""
    fields = schedule.split()
    wrong = len(fields) != len(CRON_FIELDS)
    for text, (_, low, high) in zip(fields, CRON_FIELDS, strict=False):
        for part in text.split(","):
            found = re.fullmatch(r"(\*|(\d{1,2})(-(\d{1,2}))?)(/(\d{1,2}))?", part)
            numbers = [int(n) for n in (found[2], found[4]) if n] if found else []
            in_bounds = all(low <= n <= high for n in numbers) and numbers == sorted(numbers)
            wrong = wrong or not found or not in_bounds or (found[6] is not None and int(found[6]) < 1)
    if wrong:
        rule = ", ".join(f"{name} {low}-{high}" for name, low, high in CRON_FIELDS)
        raise ConfigError(
            f"schedule must be five fields ({rule}; *, lists, ranges, steps), got {schedule!r}; every night at three:"
            " '0 3 * * *' (--set schedule=)"
        )


def labels(pairs: tuple[str, ...], key: str) -> dict[str, str]:
    """Labels from `key=value` pairs; ConfigError for what Kubernetes would refuse."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not LABEL.fullmatch(name) or not LABEL_VALUE.fullmatch(value) or len(value) > MAX_LABEL_LENGTH:
            raise ConfigError(f"{key} must be labels key=value with commas between, got {pair!r} (--set {key}=)")
        found[name] = value
    return found


def role_annotation(role: str) -> dict[str, str]:
    """Annotation that gives a service account the cloud identity `role`; none for an empty one."""
    if not role:
        return {}
    if re.fullmatch(r"arn:aws[-a-z]*:iam::\d{12}:role/\S+", role):
        return {"eks.amazonaws.com/role-arn": role}
    if re.fullmatch(r"[^\s@]+@[^\s@]+\.iam\.gserviceaccount\.com", role):
        return {"iam.gke.io/gcp-service-account": role}
    raise ConfigError(
        "role must be arn:aws:iam::ACCOUNT:role/NAME or NAME@PROJECT.iam.gserviceaccount.com,"
        f" got {role!r} (--set role=)"
    )


def _is_pinned(image: str) -> bool:
    if re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", image):
        return True
    name, colon, tag = image.rpartition(":")
    return bool(
        name and colon and re.fullmatch(r"\w[\w.-]{0,127}", tag) and tag != "latest" and not re.search(r"\s", name)
    )


def _is_s3(url: str) -> bool:
    return re.fullmatch(r"s3://[A-Za-z0-9][A-Za-z0-9._-]*(/.*)?", url) is not None
