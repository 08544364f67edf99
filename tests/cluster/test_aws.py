"""cluster/aws.yaml: Ray's own checks take it, and Ray's AWS provider starts every kind of node of it on an EC2 of this machine."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

AWS_YAML = Path(__file__).resolve().parents[2] / "cluster" / "aws.yaml"
Config = dict[str, Any]


def as_ray_takes_it() -> Config:
    """The file with Ray's defaults, checked against Ray's schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: Config = prepare_config(yaml.safe_load(AWS_YAML.read_text(encoding="utf-8")))
    validate_config(config)
    return config


def node_configs(config: Config) -> dict[str, Config]:
    return {name: node["node_config"] for name, node in config["available_node_types"].items()}


def test_rays_own_checks_take_the_file() -> None:
    config = as_ray_takes_it()
    assert config["head_node_type"] == "head"
    # None of Ray's defaults, which install things on the nodes.
    assert not any(config[f"{kind}setup_commands"] for kind in ("", "head_", "worker_"))


def test_an_unknown_field_is_refused() -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(AWS_YAML.read_text(encoding="utf-8")) | {"idle_timeout": 5}
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(config))


def test_no_work_lands_on_the_head_and_only_workers_are_on_spot() -> None:
    config = as_ray_takes_it()
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert any("--num-cpus=0" in command for command in config["head_start_ray_commands"])
    spot = {name for name, node in node_configs(config).items() if "InstanceMarketOptions" in node}
    assert spot == {"cpu", "gpu"}


def test_nodes_have_rights_by_profile_and_no_port_to_the_outside() -> None:
    config = as_ray_takes_it()
    for node in node_configs(config).values():
        assert node["IamInstanceProfile"] and node["MetadataOptions"]["HttpTokens"] == "required"
        # Without a group of one's own Ray makes one that admits SSH from everywhere.
        assert node["SecurityGroupIds"]
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
    assert config["provider"]["use_internal_ips"] and "ssm" in config["auth"]["ssh_proxy_command"]
    assert not re.search(r"AKIA|secret_access_key", AWS_YAML.read_text(encoding="utf-8"), re.IGNORECASE)


def test_ray_asks_for_a_token_which_travels_as_a_file() -> None:
    config = as_ray_takes_it()
    options = config["docker"]["run_options"]
    assert "--env=RAY_AUTH_MODE=token" in options
    [target] = config["file_mounts"]
    home = re.search(r"^ENV HOME=(\S+)", (AWS_YAML.parents[1] / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert home is not None
    assert f"--env=RAY_AUTH_TOKEN_PATH={target.replace('~', home[1])}/auth_token" in options


def test_the_container_starts_a_shell_although_the_image_has_an_entrypoint() -> None:
    from ray.autoscaler._private.docker import docker_start_cmds

    docker = as_ray_takes_it()["docker"]
    command = docker_start_cmds(
        "ubuntu",
        docker["image"],
        {},
        docker["container_name"],
        docker["run_options"],
        "c",
        "/home/vectormill",
        "docker",
    )
    assert command.endswith(f"--net=host {docker['image']} bash") and "--entrypoint=/usr/bin/env" in command


@pytest.fixture
def ec2(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """A private network with its group, and the instance profiles, in the file's region of an AWS on this machine."""
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the SSH key that it makes in ~/.ssh
    monkeypatch.setenv("RAY_AWS_MAX_RETRIES", "2")
    (tmp_path / ".ssh").mkdir()
    region = yaml.safe_load(AWS_YAML.read_text(encoding="utf-8"))["provider"]["region"]
    cloud = boto3.resource("ec2", region)
    vpc = cloud.create_vpc(CidrBlock="10.0.0.0/16")
    subnet = vpc.create_subnet(CidrBlock="10.0.1.0/24", AvailabilityZone=f"{region}a")
    group = vpc.create_security_group(GroupName="inside", Description="members only")
    iam = boto3.client("iam", region)
    profiles = ("vectormill-head", "vectormill-worker")
    for name in profiles:
        iam.create_instance_profile(InstanceProfileName=name)
    yield {"group": group.id, "subnet": subnet.id, "cloud": cloud}
    for instance in cloud.instances.all():
        instance.terminate()
    for name in profiles:
        iam.delete_instance_profile(InstanceProfileName=name)


# moto warns of images that it does not know.
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_rays_aws_provider_starts_every_kind_of_node(ec2: Config) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = as_ray_takes_it()
    for node in node_configs(config).values():
        node["SecurityGroupIds"] = [ec2["group"]]
    before = copy.deepcopy(config)
    config = bootstrap_aws(config)
    assert all(node["SecurityGroupIds"] == [ec2["group"]] for node in node_configs(config).values())
    assert all(node["SubnetIds"] == [ec2["subnet"]] for node in node_configs(config).values())
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node in node_configs(config).items():
        provider.create_node(node, {"ray-user-node-type": name}, 1)
    started = {
        tag["Value"]: i for i in ec2["cloud"].instances.all() for tag in i.tags if tag["Key"] == "ray-user-node-type"
    }
    asked = node_configs(before)
    assert {name: i.instance_type for name, i in started.items()} == {n: asked[n]["InstanceType"] for n in asked}
    assert {name: i.instance_lifecycle for name, i in started.items()} == {"head": None, "cpu": "spot", "gpu": "spot"}
    assert all(i.public_ip_address is None for i in started.values())
    # Nothing was opened: the group has no rule that Ray added.
    assert ec2["cloud"].SecurityGroup(ec2["group"]).ip_permissions == []
    assert os.listdir(Path(os.environ["HOME"]) / ".ssh")
