"""`serve` refuses what cannot be served, or should not be, before anything starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from operators.errors import ConfigError, ResourceError
from pipelines import cli
from pipelines.serve import held_port, is_loopback, plan_serve, url_of
from pipelines.service.settings import ServiceSettings
from tests.pipelines.nightly_site import Site


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["serve"], 2, "Missing argument 'ROOT'"),
        (["serve", "nowhere"], 9, "no index is published at"),
        (
            ["serve", "nowhere", "--host", "0.0.0.0"],
            2,
            "a service that others can reach needs a token, got --host 0.0.0.0",
        ),
        (["serve", "nowhere", "--token-env", "NOT_SET"], 2, "environment variable NOT_SET (--token-env) is not set"),
        (["serve", "nowhere", "--token-file", "no-file"], 2, "file no-file (--token-file) cannot be read"),
        (["serve", "nowhere", "--max-k", "0"], 2, "--max-k must be at least 1, got 0"),
        (["serve", "nowhere", "--recall", "0.9", "--nprobe", "3"], 2, "--recall chooses nprobe"),
        (["serve", "nowhere", "--no-ray", "--replicas", "2"], 2, "--no-ray is one process, got --replicas 2"),
        (["serve", "nowhere", "--port", "0"], 2, "Ray Serve needs a port, got 0 (--port)"),
        (["serve", "nowhere", "--port", "70000"], 2, "port must be in 0..65535, got 70000 (--port)"),
        (["serve", "nowhere", "--replicas", "0"], 2, "replicas must be at least 1, got 0 (--replicas)"),
    ],
)
def test_a_mistake_is_one_line_and_its_own_exit_code(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_on_loopback_without_a_token_only_names_of_this_machine_are_answered(site: Site) -> None:
    settings = ServiceSettings(site.root)
    assert plan_serve(settings, "127.0.0.1", 0, 1).hosts == ("localhost", "127.0.0.1", "[::1]")
    assert plan_serve(settings, "127.0.0.2", 0, 1).hosts == ("localhost", "127.0.0.1", "[::1]", "127.0.0.2")
    assert plan_serve(settings, "0.0.0.0", 0, 1, no_auth=True).hosts == ()


def test_a_token_lets_others_in(site: Site, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef")
    plan = plan_serve(ServiceSettings(site.root, token_file=str(tmp_path / "token")), "0.0.0.0", 0, 2)
    assert (plan.hosts, plan.version) == ((), site.current.version)


def test_an_address_that_is_taken_and_a_recall_that_was_not_measured_are_refused(site: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"cannot listen on 127.0.0.1 port {port}"):
            plan_serve(ServiceSettings(site.root), "127.0.0.1", port, 1)
    with pytest.raises(ConfigError, match=r"nprobe must be in 1..nlist \(4\), got 5"):
        plan_serve(ServiceSettings(site.root, nprobe=5), "127.0.0.1", 0, 1)
    with pytest.raises(ConfigError, match="host must be an address of this machine, got 'no such host'"):
        plan_serve(ServiceSettings(site.root), "no such host", 0, 1, no_auth=True)


def test_a_held_port_is_shared_by_the_replicas_of_its_service_and_refused_to_every_other(site: Site) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ServiceSettings(site.root)
    plan = plan_serve(settings, "localhost", port, 1)
    assert plan.host in ("127.0.0.1", "::1")
    plan_serve(settings, "localhost", port, 1)  # another service, planned in the same moment: it fails when it starts
    with held_port(plan.host, port):
        with pytest.raises(ResourceError, match=rf"cannot listen on {plan.host} port {port}"):
            plan_serve(settings, "localhost", port, 1)
        with (
            pytest.raises(ResourceError, match=rf"cannot listen on {plan.host} port {port}"),
            held_port(plan.host, port),
        ):
            pass
        with (
            socket.create_server((plan.host, port), reuse_port=True),
            socket.create_server((plan.host, port), reuse_port=True),
        ):
            for _ in range(8):  # a socket that does not listen gets no connection
                socket.create_connection((plan.host, port), timeout=5).close()
    plan_serve(settings, "localhost", port, 1)


def test_an_address_with_colons_stands_in_brackets_in_a_url() -> None:
    assert (url_of("::1", 80), url_of("127.0.0.1", 80)) == ("http://[::1]:80", "http://127.0.0.1:80")


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_loopback_is_told_from_other_addresses(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_service_that_is_started_again_at_once_gets_the_port_of_the_one_before() -> None:
    with socket.create_server(("127.0.0.1", 0)) as before:
        port = before.getsockname()[1]
        for _ in range(3):
            client = socket.create_connection(("127.0.0.1", port))
            before.accept()[0].close()  # the side that closes first keeps the connection in TIME_WAIT
            client.close()
    with held_port("127.0.0.1", port), socket.socket() as replica:
        replica.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        replica.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        replica.bind(("127.0.0.1", port))
        replica.listen()
