"""`serve`: the published version of an index over HTTP, by Ray Serve on this machine, or in this process alone."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from operators.errors import ConfigError, ResourceError
from operators.storage.store import open_store
from pipelines.operating_points import point_for
from pipelines.search import check_search_settings
from pipelines.service.guard import LOOPBACK_NAMES
from pipelines.service.settings import ServiceSettings
from pipelines.versions import open_version

# What Ray Serve reads when it is imported; whoever sets them otherwise is heard.
SERVE_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # One event loop a replica, and no log line a request: see docs/serving.md for what that is worth.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    # Bounds the head of a request also in Ray's own proxy.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.service.protocol.limit_serve_proxy",
}

# Longer than load balancers keep a connection: otherwise one would send a request into a connection that is being closed.
KEEP_ALIVE_S = 75


@dataclass(frozen=True)
class ServePlan:
    """What is about to be served, checked as far as that is possible before anything starts."""

    settings: ServiceSettings
    host: str  # an address in numbers: a name may stand for several, and all that listen must mean the same
    port: int
    replicas: int
    hosts: tuple[str, ...]  # that are answered; empty: all
    version: str


def plan_serve(settings: ServiceSettings, host: str, port: int, replicas: int, *, no_auth: bool = False) -> ServePlan:
    """Check index, settings, token and address. Raises IndexNotFoundError, IntegrityError, ConfigError, ResourceError."""
    if replicas < 1:
        raise ConfigError(f"replicas must be at least 1, got {replicas} (--replicas)")
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be in 0..65535, got {port} (--port)")
    token = settings.token()
    loopback = is_loopback(host)
    if token is None and not loopback and not no_auth:
        raise ConfigError(
            f"a service that others can reach needs a token, got --host {host} without one: give --token-env NAME or"
            " --token-file FILE (openssl rand -hex 32 makes one), or say --no-auth"
        )
    store = open_store(settings.root)
    manifest = open_version(store)
    check_search_settings(manifest, 1, settings.nprobe, settings.refine_factor)
    if settings.recall is not None:
        point_for(store, manifest, settings.recall)
    address = _free_address(host, port)
    # Without a token whatever a browser on this machine loads could ask for answers, under a name that leads here.
    hosts: tuple[str, ...] = ()
    if loopback and token is None:
        own_name = url_host(address)
        hosts = LOOPBACK_NAMES if own_name in LOOPBACK_NAMES else (*LOOPBACK_NAMES, own_name)
    return ServePlan(dataclasses.replace(settings, root=store.url), address, port, replicas, hosts, manifest.version)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address that is listened on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _free_address(host: str, port: int) -> str:
    """The first address of the host, in numbers, on which this process may listen and nobody does."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConfigError(f"host must be an address of this machine, got {host!r}: {error.strerror} (--host)") from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(probe, address)
    return str(address[0])


def _bind(listener: socket.socket, address: Any) -> None:
    try:
        listener.bind(address)
    except OSError as error:
        raise ResourceError(
            f"cannot listen on {address[0]} port {address[1]}: {error.strerror} (--host, --port); end what listens there, or"
            " choose another"
        ) from None


@contextlib.contextmanager
def held_port(host: str, port: int) -> Iterator[None]:
    """For the block: the port is this service's, its replicas may share it and no other service gets it.

    Sockets of one user that all have SO_REUSEPORT share a port, also those of another service, and then requests go to one
    index or the other. So this process holds the port with a socket that never listens, and that has not SO_REUSEADDR: it
    fails whoever asks for the port by himself, as every service does first. Raises ResourceError when the port is taken.
    """
    _free_address(host, port)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            held.bind((host, port))
        except OSError:
            # Connections of a service that has just ended still rest (TIME_WAIT), a minute long: a restart shall not wait for
            # them. Until the replicas listen another service could then get the port too.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(held, (host, port))
        yield


def serve_on_ray(plan: ServePlan, ready: Callable[[dict[str, Any]], None], *, proxy: bool = False) -> None:
    """Serve by Ray Serve until SIGTERM or Ctrl-C. `ready` gets url, version and how, once requests are taken.

    proxy: requests go through Ray Serve's HTTP proxy; else the replicas share the port.
    """
    for name, value in SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from cluster.serving import ServingArgs, run

    fields = dataclasses.asdict(plan.settings)
    own = {name: fields.pop(name) for name in ("root", "threads", "drain_s")}
    args = ServingArgs(
        root=own["root"],
        replicas=plan.replicas,
        threads_per_replica=own["threads"],
        drain_s=own["drain_s"],
        hosts=list(plan.hosts),
        settings=fields,
        listen="" if proxy else f"{plan.host}:{plan.port}",
        keep_alive_s=KEEP_ALIVE_S,
    )
    facts = _facts(plan, url_of(plan.host, plan.port), "ray serve, by its proxy" if proxy else "ray serve")
    with contextlib.nullcontext() if proxy else held_port(plan.host, plan.port):
        run(args, plan.host, plan.port, lambda: ready(facts))


def serve_in_process(plan: ServePlan, ready: Callable[[dict[str, Any]], None]) -> None:
    """Serve from this process, without Ray, until SIGTERM or Ctrl-C."""
    import uvicorn

    from pipelines.service.api import Service, create_app
    from pipelines.service.protocol import LimitedProtocol

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s")

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                port = self.servers[0].sockets[0].getsockname()[1]
                ready(_facts(plan, url_of(plan.host, port), "one process"))

    service = Service(plan.settings)
    service.open()  # here, so that what is wrong is raised
    app = create_app(plan.settings, plan.hosts, service)
    config = uvicorn.Config(
        app,
        host=plan.host,
        port=plan.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        http=LimitedProtocol,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(plan.settings.drain_s) + 1,
    )
    server = Server(config)
    server.run()
    if not server.started:
        raise ResourceError("the service could not start; the lines above say why")


def url_of(host: str, port: int) -> str:
    return f"http://{url_host(host)}:{port}"


def url_host(host: str) -> str:
    """A host as URLs and the Host header have it."""
    return f"[{host}]" if ":" in host else host


def _facts(plan: ServePlan, url: str, how: str) -> dict[str, Any]:
    return {"url": url, "root": plan.settings.root, "version": plan.version, "replicas": plan.replicas, "how": how}
