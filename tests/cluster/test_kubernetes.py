"""Manifests for KubeRay: what is in them, that it is what Kubernetes and KubeRay accept, and how a job's command gets through."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kubernetes.entrypoint import entrypoint
from cluster.kubernetes.manifest_settings import ManifestSettings, check_schedule
from operators.errors import ConfigError
from pipelines.cli import run
from tests.cluster.kubernetes_schemas import (
    Resource,
    embedded,
    kuberay_schemas,
    kubernetes_problems,
    our_schema,
    problems,
)

IMAGE = "--set=image=registry.example/vectormill:1.0"
JOB = [IMAGE, "--set=root=s3://bucket/index", "--set=sources=s3://bucket/docs/,s3://bucket/more/"]
SERVICE = [IMAGE, "--set=root=s3://bucket/index", "--set=bearer_token_secret=search-token"]
GPUS = [
    "--set=gpu=l4",
    "--set=gpus_per_node=4",
    "--set=nodes=8",
    "--set=spot=true",
    "--set=gpu_selector=nvidia.com/gpu.product=NVIDIA-L4",
]
ON_PREMISE = [
    "--set=credentials_secret=minio",
    "--set=s3_endpoint=https://minio:9000",
    "--set=region=eu",
    "--set=namespace=search",
]
MANIFESTS = {
    "build": ["--kind=rayjob", *JOB],
    "build on GPUs": ["--kind=rayjob", *JOB, *GPUS, "--set=role=arn:aws:iam::123456789012:role/reader"],
    "compact": ["--kind=rayjob", IMAGE, "--set=root=s3://bucket/index", "--set=command=compact", "--set=retries=0"],
    "nightly": ["--kind=cronjob", *JOB, "--set=image_pull_secret=registry", "--set=ray_token_secret=ray"],
    "nightly on premise": [
        "--kind=cronjob",
        *JOB,
        *GPUS,
        *ON_PREMISE,
        "--set=service_account=mine",
        "--",
        "--min-recall=0.9",
    ],
    "service": ["--kind=rayservice", *SERVICE, "--", "--recall=0.95"],
    "elastic service": ["--kind=rayservice", *SERVICE, *ON_PREMISE, "--set=max_replicas=6", "--set=spot=true"],
}


def written(arguments: Sequence[str]) -> list[Resource]:
    """What `manifests` prints."""
    return copy.deepcopy(_printed(tuple(arguments)))


@functools.cache
def _printed(arguments: tuple[str, ...]) -> list[Resource]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as problem:
        code = run(["manifests", *arguments])
    assert code == 0, problem.getvalue()
    return list(yaml.safe_load_all(out.getvalue()))


@pytest.fixture(params=MANIFESTS, name="resources")
def _resources(request: pytest.FixtureRequest) -> list[Resource]:
    return written(MANIFESTS[request.param])


def the(kind: str, resources: list[Resource]) -> Any:
    """The only resource of a kind, also one in a ConfigMap."""
    [found] = [resource for resource in embedded(resources) if resource["kind"] == kind]
    return found


def ray_clusters(resources: list[Resource]) -> Iterator[Any]:
    for resource in embedded(resources):
        spec = resource.get("spec", {})
        yield from (spec[key] for key in ("rayClusterSpec", "rayClusterConfig") if key in spec)


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec in a resource."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from pods(item)


def num_bytes(quantity: str) -> int:
    return int(quantity[:-2]) << {"Mi": 20, "Gi": 30}[quantity[-2:]]


def test_only_known_fields_of_the_right_types_are_written(resources: list[Resource]) -> None:
    assert [problem for r in embedded(resources) for problem in problems(r, our_schema(r))] == []


def test_kuberays_own_definitions_accept_them(resources: list[Resource]) -> None:
    schemas = kuberay_schemas()
    of_ray = [r for r in embedded(resources) if r["apiVersion"] == "ray.io/v1"]
    assert of_ray
    assert [problem for r in of_ray for problem in problems(r, schemas[r["apiVersion"], r["kind"]])] == []


def test_kubernetes_own_schemas_accept_them_and_every_pod_in_them(resources: list[Resource]) -> None:
    whole = [resource for resource in resources if resource["apiVersion"] != "ray.io/v1"]
    whole += [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": spec}
        for r in embedded(resources)
        for spec in pods(r)
    ]
    assert [problem for resource in whole for problem in kubernetes_problems(resource)] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "resorces"), {}),
        (("spec", "backOffLimit"), 2),
        (("spec", "activeDeadlineSeconds"), "1h"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "none"),
    ],
)
def test_a_misspelt_field_or_a_wrong_value_is_found(path: tuple[str, ...], value: Any) -> None:
    job = the("RayJob", written(MANIFESTS["build"]))
    place = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert len(problems(job, our_schema(job))) == 1


def test_secrets_are_named_and_never_written(resources: list[Resource]) -> None:
    assert not [resource for resource in embedded(resources) if resource["kind"] == "Secret"]
    variables = [v for r in embedded(resources) for pod in pods(r) for c in pod["containers"] for v in c.get("env", [])]
    assert not [v for v in variables if "value" in v and any(word in v["name"] for word in ("TOKEN", "SECRET", "KEY"))]


def test_what_is_referred_to_is_there(resources: list[Resource]) -> None:
    have = {(resource["kind"], resource["metadata"]["name"]) for resource in resources} | {("ServiceAccount", "mine")}
    wanted = set()
    for pod in itertools.chain.from_iterable(pods(resource) for resource in embedded(resources)):
        if "serviceAccountName" in pod:
            wanted.add(("ServiceAccount", pod["serviceAccountName"]))
        wanted |= {("ConfigMap", volume["configMap"]["name"]) for volume in pod["volumes"] if "configMap" in volume}
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]} == volumes
    for binding in (resource for resource in resources if resource["kind"] == "RoleBinding"):
        wanted |= {("Role", binding["roleRef"]["name"]), ("ServiceAccount", binding["subjects"][0]["name"])}
    assert wanted <= have
    assert len({resource["metadata"].get("namespace") for resource in embedded(resources)}) == 1


def test_pods_are_not_root_and_write_nothing_but_tmp_and_shared_memory(resources: list[Resource]) -> None:
    for pod in itertools.chain.from_iterable(pods(resource) for resource in embedded(resources)):
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            paths = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert paths <= {"/tmp", "/dev/shm"}


def test_ray_asks_for_a_token_and_no_work_lands_on_the_head(resources: list[Resource]) -> None:
    for cluster in ray_clusters(resources):
        assert cluster["authOptions"]["mode"] == "token"
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_rays_memory_fits_into_its_pod(resources: list[Resource]) -> None:
    for cluster in ray_clusters(resources):
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            spec = group["template"]["spec"]
            [container] = spec["containers"]
            store = int(group["rayStartParams"]["object-store-memory"])
            [shared] = [v["emptyDir"]["sizeLimit"] for v in spec["volumes"] if v["name"] == "shared-mem"]
            assert store < num_bytes(shared) < num_bytes(container["resources"]["limits"]["memory"])
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_only_the_head_and_the_starter_reach_kubernetes_api(resources: list[Resource]) -> None:
    with_token = {
        container["name"]
        for resource in embedded(resources)
        for pod in pods(resource)
        for container in pod["containers"]
        if pod["automountServiceAccountToken"]
    }
    assert with_token <= {"ray-head", "starter"}


def test_a_job_on_gpus_has_groups_with_and_without_and_a_precision() -> None:
    job = the("RayJob", written(MANIFESTS["build on GPUs"]))
    groups = {group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    assert (groups["gpu"]["replicas"], groups["gpu"]["rayStartParams"]["num-gpus"]) == (8, "4")
    pod = groups["gpu"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert groups["cpu"]["replicas"] == 1 and "num-gpus" not in groups["cpu"]["rayStartParams"]
    assert "nodeSelector" not in groups["cpu"]["template"]["spec"]
    # The head has no GPU, so a driver could not decide.
    assert "--set encode.precision=bfloat16" in job["spec"]["entrypoint"]
    # Idle nodes are given back early: what is left must not be taken for the cluster.
    assert "--set encode.device=cuda --set encode.workers=32" in job["spec"]["entrypoint"]
    account = the("ServiceAccount", written(MANIFESTS["build on GPUs"]))
    assert account["metadata"]["annotations"] == {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/reader"}


def test_workers_may_be_on_spot_and_the_head_never_is() -> None:
    [cluster] = ray_clusters(written(MANIFESTS["build on GPUs"]))
    head = cluster["headGroupSpec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    [term] = head["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {"key": "karpenter.sh/capacity-type", "operator": "NotIn", "values": ["spot"]} in term["matchExpressions"]
    for group in cluster["workerGroupSpecs"]:
        assert group["template"]["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]


def test_another_attempt_goes_on_and_an_end_is_in_sight() -> None:
    spec = the("RayJob", written([*MANIFESTS["build"], "--set=max_hours=2.5", "--set=retries=4"]))["spec"]
    assert spec["entrypoint"] == (
        "vectormill build s3://bucket/docs/ s3://bucket/more/ --out s3://bucket/index --set encode.workers=7"
        " --set cluster.wait_for_nodes_s=3600"
    )
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) == (4, 9000, 3600)
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] == 1800
    # All nodes are there when the job starts, and those that are idle go.
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 0, 1)


def test_memory_is_that_of_the_sizing_code() -> None:
    from cluster.capacity.coefficients import measured
    from cluster.capacity.pods import size_pods
    from pipelines.config import load_config
    from pipelines.planning.plan_inputs import Asked, workload

    corpus = ["--set=docs=50000000", "--set=tokens_per_doc=300", "--set=nodes=4", "--set=cpus_per_node=16"]
    options = ["--", "--set", "index.shard_rows=1000000"]
    asked = Asked(50_000_000, 300, nodes=4, cpus_per_node=16, memory_per_node=1)
    work = workload(asked, load_config(None, options[2:]), measured()["bytes_per_token"])
    for kind, for_updates in (("rayjob", False), ("cronjob", True)):
        sizes = size_pods(work, measured(), for_updates=for_updates)
        assert sizes.cpu_workers is not None
        [cluster] = ray_clusters(written([f"--kind={kind}", *JOB, *corpus, *options]))
        for group, size in (
            (cluster["headGroupSpec"], sizes.head),
            (cluster["workerGroupSpecs"][0], sizes.cpu_workers),
        ):
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert (num_bytes(limits["memory"]), limits["cpu"]) == (size.memory_bytes, str(size.cpus))
    told = ["--set=memory_per_node_gib=99", "--set=head_memory_gib=7"]
    [cluster] = ray_clusters(written(["--kind=rayjob", *JOB, *told]))
    limits = [
        num_bytes(group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]) >> 30
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    assert limits == [7, 99]


def test_nights_do_not_overlap_and_end_with_gc() -> None:
    resources = written(MANIFESTS["nightly"])
    spec = the("CronJob", resources)["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["concurrencyPolicy"]) == ("0 3 * * *", "Etc/UTC", "Forbid")
    job = the("RayJob", resources)["spec"]
    # An attempt each, and an hour.
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] == job["activeDeadlineSeconds"] * 3 + 3600
    line = shlex.split(job["entrypoint"])
    assert line[:2] == ["sh", "-c"]
    update, gc = line[2].split(" && ")
    assert update.startswith("vectormill update s3://bucket/docs/")
    assert gc == "vectormill gc s3://bucket/index --keep 7 --delete"


def test_a_change_of_a_nightly_job_gets_a_config_map_of_its_own() -> None:
    names = [
        the("ConfigMap", written(["--kind=cronjob", *JOB, *further]))["metadata"]["name"]
        for further in ([], [], ["--set=nodes=2"])
    ]
    assert names[0] == names[1] != names[2]


# Ray Serve 2.60 declares its models in a way that pydantic 2 warns about.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
def test_serves_own_schema_and_the_services_settings_take_the_configuration() -> None:
    from ray.serve.schema import ServeDeploySchema

    from cluster.serving import DEPLOYMENT, ServingArgs
    from pipelines.service.settings import ServiceSettings

    options = ["--set=max_replicas=6", "--set=replicas=3", "--", "--recall=0.95", "--row-cache-mb=64", "--drain-s=9"]
    spec = the("RayService", written(["--kind=rayservice", *SERVICE, *options]))["spec"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    [application] = config.applications
    assert config.http_options.host == "0.0.0.0"
    assert application.deployments[0].name == DEPLOYMENT
    arguments = ServingArgs(**application.args)
    assert (arguments.root, arguments.replicas, arguments.drain_s) == ("s3://bucket/index", 3, 9.0)
    taken = ServiceSettings.of({"root": arguments.root, **arguments.settings})
    assert (taken.recall, taken.row_cache_bytes, taken.token_env) == (0.95, 64 << 20, "VECTORMILL_TOKEN")
    [group] = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 6)
    variables = {v["name"]: v for v in group["template"]["spec"]["containers"][0]["env"]}
    assert variables["VECTORMILL_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "search-token", "key": "token"}}
    assert variables["RAY_SERVE_THROUGHPUT_OPTIMIZED"]["value"] == "1"


def test_kuberay_finds_the_port_that_it_makes_the_service_from_on_head_and_workers() -> None:
    """BuildServeService (ray-operator/controllers/ray/common/service.go) fails without one on the head."""
    spec = the("RayService", written(MANIFESTS["service"]))["spec"]
    assert spec["excludeHeadPodFromServeSvc"]
    port = yaml.safe_load(spec["serveConfigV2"])["http_options"]["port"]
    for group in (spec["rayClusterConfig"]["headGroupSpec"], *spec["rayClusterConfig"]["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        assert {"name": "serve", "containerPort": port} in container["ports"]
    head = the("RayJob", written(MANIFESTS["build"]))["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert "serve" not in {port["name"] for port in head["template"]["spec"]["containers"][0]["ports"]}


# ----- the command --------------------------------------------------------------------------------------------------

# What KubeRay makes of an entrypoint in a submitter's container (K8sJobMode), with Ray's part: `ray job submit` quotes
# the words that it gets (2.53 on), and the head's shell takes the line.
FAKE_RAY = "import shlex, sys; print(shlex.join(sys.argv[sys.argv.index('--') + 1:]), end='')"
FAKE_VECTORMILL = "import json, sys; print(json.dumps(sys.argv[1:]))"


def received(line: str, folder: Path) -> list[list[str]]:
    """Arguments of each call of vectormill."""
    for name, code in (("ray", FAKE_RAY), ("vectormill", FAKE_VECTORMILL)):
        program = folder / name
        if not program.exists():
            program.write_text(f"#!{sys.executable} -IS\n{code}\n", encoding="utf-8")
            program.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    script = f"ray job submit --address http://head:8265 --no-wait -- {line.strip()} ;"
    script = script.replace("$$", "$")  # Kubernetes, in a container's arguments
    submitted = subprocess.run(
        ["bash", "-ce", "--", script], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    done = subprocess.run(
        ["sh", "-c", submitted.stdout], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    return [json.loads(answer) for answer in done.stdout.splitlines()]


WORDS = st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=12), max_size=4)


@settings(max_examples=15)
@given(steps=st.lists(WORDS, min_size=1, max_size=2))
def test_every_word_of_a_command_arrives_as_it_was(
    steps: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "programs"
    folder.mkdir(exist_ok=True)
    assert received(entrypoint(steps), folder) == steps


@pytest.mark.parametrize(
    "word", ["$HOME", "$(RAY_ADDRESS)", "$$(X)", "`id`", "a'b", 'a"b', "a\\b", "*", "~", "", " ", "a;b", "é &"]
)
def test_words_that_a_shell_would_take_for_its_own_arrive(word: str, tmp_path: Path) -> None:
    assert received(entrypoint([["build", word], ["gc", word]]), tmp_path) == [["build", word], ["gc", word]]


def test_settings_of_a_file_and_options_become_words(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[read]\ntext_columns = ["title", "body"]\n[chunk]\nmode = "truncate"\n[index]\nnlist = 64\n')
    options = ["--config", str(file), "--", "--set", "encode.document_prompt=passage: ", "--id-column", "a b"]
    job = the("RayJob", written(["--kind=rayjob", *JOB, *options]))
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[6:] == [
        *("--set", "read.text_columns=title,body", "--set", "chunk.mode=truncate", "--set", "index.nlist=64"),
        *options[3:],
        *("--set", "encode.workers=7", "--set", "cluster.wait_for_nodes_s=3600"),
    ]


@pytest.mark.parametrize(
    ("arguments", "device", "workers", "stays"),
    [
        (["--kind=rayjob", *JOB, *GPUS, "--", "--workers", "3"], ["cuda"], [], False),
        (["--kind=rayjob", *JOB, *GPUS, "--", "--set", "encode.workers=5"], ["cuda"], ["5"], False),
        (["--kind=rayjob", *JOB, *GPUS, "--", "--set", "encode.device=cpu"], ["cpu"], ["63"], False),
        (["--kind=rayjob", *JOB, "--set=nodes=4", "--", "--set", "encode.threads_per_worker=4"], [], ["7"], False),
        (["--kind=cronjob", *JOB, *GPUS], ["cuda"], ["32"], False),
        (["--kind=cronjob", *JOB, "--set=nodes=4"], [], [], True),  # the published version knows its threads
    ],
)
def test_a_job_says_what_it_encodes_with_or_keeps_its_nodes(
    arguments: list[str], device: list[str], workers: list[str], stays: bool
) -> None:
    spec = the("RayJob", written(arguments))["spec"]
    assert re.findall(r"encode\.device=(\w+)", spec["entrypoint"]) == device
    assert re.findall(r"encode\.workers=(\d+)", spec["entrypoint"]) == workers
    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["minReplicas"] for group in groups] == [group["replicas"] if stays else 0 for group in groups]


# ----- wrong usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind=job", *JOB], "kind must be one of rayjob, cronjob, rayservice, got 'job'"),
        (["--kind=rayjob", *JOB[1:]], "image must be given"),
        (["--kind=rayjob", IMAGE, JOB[2]], "root must be given"),
        (["--kind=rayjob", IMAGE, JOB[1]], "build needs sources"),
        (["--kind=rayjob", *JOB, "--set=imge=x:1"], "unknown setting 'imge' .* did you mean image"),
        (
            ["--kind=rayjob", *JOB, "--set=index.nlist=3"],
            "settings of the job follow behind --: -- --set index.nlist=3",
        ),
        (["--kind=rayjob", *JOB, "--set=nodes=many"], "nodes must be of type int, got 'many'"),
        (["--kind=rayjob", *JOB, "--set=nodes=0"], "nodes must be at least 1, got 0"),
        (["--kind=rayjob", *JOB, "--set=gpus_per_node=1"], "gpus_per_node=1 needs to know which GPU"),
        (
            ["--kind=rayjob", *JOB, "--set=gpu=l4", "--set=cpus_per_node=1"],
            "cpus_per_node must be at least 1, and 1 more",
        ),
        (["--kind=rayjob", *JOB, "--set=image=vectormill"], "image must be .* tag other than latest"),
        (["--kind=rayjob", *JOB, "--set=image=vectormill:latest"], "image must be .* tag other than latest"),
        (["--kind=rayjob", *JOB, "--set=image=registry:5000/vectormill"], "image must be .* tag other than latest"),
        (["--kind=rayjob", *JOB, "--set=root=/data/index"], "root must be s3://bucket/name: pods share no disk"),
        (["--kind=rayjob", *JOB, "--set=name=Vector_Mill"], "name must be a DNS label"),
        (["--kind=rayjob", *JOB, "--set=role=reader"], "role must be arn:aws:iam"),
        (
            ["--kind=rayjob", *JOB, "--set=role=arn:aws:iam::123456789012:role/a", "--set=service_account=b"],
            "annotate it",
        ),
        (["--kind=rayjob", *JOB, "--set=node_selector=zone"], "node_selector must be labels key=value"),
        (
            ["--kind=rayjob", *JOB, "--", "--set", "index.nlst=3"],
            "unknown setting 'index.nlst' .* did you mean index.nlist",
        ),
        (["--kind=rayjob", *JOB, "--", "--nope"], "No such option"),
        (["--kind=rayjob", *JOB, "--", "--fresh"], "--fresh discards what was done"),
        (["--kind=rayjob", *JOB, "--", "--text-column", "a\nb"], "no control characters"),
        (["--kind=cronjob", *JOB, "--", "--deletes", "gone.txt"], "gone.txt is a file of this machine"),
        (["--kind=cronjob", *JOB, "--set=schedule=0 25 * * *"], "schedule must be five fields"),
        (["--kind=cronjob", *JOB, "--set=command=verify"], "verify takes no sources"),
        (["--kind=rayservice", *SERVICE[:2]], "needs a token"),
        (["--kind=rayservice", *SERVICE, "--", "--port", "80"], "--port is not for a manifest"),
        (["--kind=rayservice", *SERVICE, "--", "--recall", "0.9", "--nprobe", "3"], "--recall chooses nprobe"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["manifests", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    [line] = shown.err.splitlines()
    assert re.search(message, line), line


@pytest.mark.parametrize("schedule", ["0 3 * * *", "*/15 0-6,22 1 1,6,12 1-5", "0 0 * * 7"])
def test_cron_schedules_are_taken(schedule: str) -> None:
    check_schedule(schedule)


@pytest.mark.parametrize(
    "schedule", ["", "@daily", "0 3 * *", "60 3 * * *", "0 3 * * MON", "0 5-3 * * *", "*/0 * * * *", "0 3 0 * *"]
)
def test_other_schedules_are_not(schedule: str) -> None:
    with pytest.raises(ConfigError, match="schedule must be five fields"):
        check_schedule(schedule)


GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")


def test_the_guide_lists_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["manifests", "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(dataclasses.fields(ManifestSettings))
    rows = [row.split("|") for row in GUIDE.splitlines() if row.startswith("| `")]
    table = {row[1].strip(" `"): " ".join(row[2:]).replace("`", "") for row in rows}
    for line in lines:
        key, _, default = line[:34].strip().partition("=")
        doc = line[35:]
        assert table[key].split() == f"{default} {doc}".replace("`", "").split()


def test_the_manifests_of_the_guide_can_be_made() -> None:
    commands = re.findall(r"^    (vectormill manifests --kind (?:.*\\\n)*.*)$", GUIDE, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        line = command.replace("\\\n", " ").replace("REGISTRY", "registry.example").partition(" > ")[0]
        resources = written(shlex.split(line)[2:])
        assert [problem for r in embedded(resources) for problem in problems(r, our_schema(r))] == []
