"""The search service as a Ray Serve deployment: replicas that Ray starts, watches and replaces.

On a cluster, and in KubeRay's RayService, the import path is `cluster.serving:build_app`, with the arguments of `ServingArgs`:

    applications:
      - name: vectormill
        import_path: cluster.serving:build_app
        route_prefix: /
        args: {root: s3://bucket/index, replicas: 2, threads_per_replica: 4, settings: {token_env: VECTORMILL_TOKEN}}

`run` does the same on this machine, for `vectormill serve`.
"""
# No `from __future__ import annotations` here: Ray Serve 2.60 looks at the annotation of build_app itself, and would not
# know the class by its name.

import asyncio
import contextlib
import importlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

APPLICATION = "vectormill"
DEPLOYMENT = "search"
# Requests that Serve hands to a replica before it queues them itself. The replica's own bound (settings.max_queue) is what
# refuses: it counts queries, answers in JSON and says when to come again.
MAX_ONGOING_REQUESTS = 4096
DELETE_SPARE_S = 30.0  # beyond what replicas get to finish their requests
OBJECT_STORE_BYTES = 100 << 20  # Serve sends requests as messages, not as objects


class ServingArgs(BaseModel):
    """Arguments of `build_app`, as a Serve configuration gives them."""

    model_config = ConfigDict(extra="forbid")

    root: str = Field(description="the index: a folder that all nodes see, or s3://bucket/name")
    replicas: int = Field(1, ge=1, description="processes that each hold the index open")
    threads_per_replica: int = Field(
        1, ge=1, description="CPU threads of a replica's search and of its encoder, and its CPUs"
    )
    hosts: list[str] = Field(default=[], description="names in the Host header that are answered; empty: all")
    settings: dict[str, Any] = Field(
        default={},
        description="further fields of pipelines.service.settings.ServiceSettings: nprobe, max_k, token_env, ...",
    )
    app: str = Field(
        default="pipelines.service.api:create_app",
        description="module:function of (settings, hosts) that makes the ASGI application",
    )
    listen: str = Field(
        default="",
        description="host:port on which each replica listens by itself, all on one machine; empty: behind Ray Serve's proxy",
    )
    protocol: str = Field(
        default="pipelines.service.protocol:LimitedProtocol",
        description="how a replica that listens speaks HTTP, for uvicorn",
    )
    keep_alive_s: int = Field(75, ge=1, description="what an idle connection of a replica that listens is kept")
    drain_s: float = Field(20.0, gt=0, description="what a replica gets to finish its requests before it is ended")


def build_app(args: ServingArgs) -> serve.Application:
    """The Serve application. Index and model are opened in the replicas, which take requests once both are warm."""
    replica: Any = SearchReplica  # Serve's decorator has put a Deployment in the class's place
    deployment = replica.options(
        num_replicas=args.replicas,
        ray_actor_options={"num_cpus": args.threads_per_replica},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=args.drain_s + 5.0,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
    )
    app: serve.Application = deployment.bind(args.model_dump())
    return app


@serve.deployment(name=DEPLOYMENT)
@serve.ingress()
class SearchReplica:
    """One process with an open index. The application itself knows nothing of Ray."""

    def __init__(self, args: dict[str, Any]) -> None:
        self._args = ServingArgs(**args)
        self._listening: _Listening | None = None

    def __serve_build_asgi_app__(self) -> Callable[..., Any]:
        args = self._args
        module, name = args.app.split(":")
        create_app = getattr(importlib.import_module(module), name)
        fields = {**args.settings, "root": args.root, "threads": args.threads_per_replica, "drain_s": args.drain_s}
        app: Callable[..., Any] = create_app(fields, hosts=args.hosts)
        if not args.listen:
            return app
        self._listening = _Listening(app, args)
        return self._listening

    def check_health(self) -> None:
        """Ray Serve replaces a replica for which this raises."""
        if self._listening is not None:
            self._listening.check()


class _Listening:
    """An ASGI application that, as long as its lifespan lasts, is also served on a port that all replicas share.

    The kernel hands each connection to one of them (SO_REUSEPORT). Ray Serve's own proxy would take several times as long for
    a request as a search does.
    """

    def __init__(self, app: Callable[..., Any], args: ServingArgs) -> None:
        self._app = app
        self._args = args
        self._server: Any = None
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def receive_and_stop() -> Any:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self._stop()
            return message

        async def send_and_start(message: Any) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self._start()
            await send(message)

        await self._app(scope, receive_and_stop, send_and_start)

    async def _start(self) -> None:
        import uvicorn

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # they are Ray's

        host, _, port = self._args.listen.rpartition(":")
        host = host.strip("[]")
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, int(port)))
        config = uvicorn.Config(
            self._app,
            http=self._args.protocol,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=self._args.keep_alive_s,
            timeout_graceful_shutdown=int(self._args.drain_s) + 1,
        )
        self._server = Server(config)
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listener]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.01)
        if self._task.done():
            await self._task  # raises what ended it, if anything did
            raise RuntimeError(f"the server of {self._args.listen} ended as it was started")

    def check(self) -> None:
        """Raise RuntimeError when nobody listens any more, and nobody has asked for that."""
        if self._task is not None and self._task.done() and not self._server.should_exit:
            cause = None if self._task.cancelled() else self._task.exception()
            raise RuntimeError(f"the server of {self._args.listen} has ended") from cause

    async def _stop(self) -> None:
        """Take no more connections, and answer what has come."""
        if self._task is not None:
            self._server.should_exit = True
            await self._task


def run(args: ServingArgs, host: str, port: int, ready: Callable[[], None]) -> None:
    """Serve on this machine until SIGTERM or SIGINT; then what is in flight is answered, and Ray is stopped.

    ready: called once requests are taken. Raises what the replicas raised when they cannot start.
    """
    stop = threading.Event()
    with _local_ray(args), _signals(stop):  # in this order: Ray sets a handler of its own
        serve.start(
            proxy_location="Disabled" if args.listen else "HeadOnly",
            http_options={
                "host": host,
                "port": port,
                "request_timeout_s": None,
                "keep_alive_timeout_s": args.keep_alive_s,
            },
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        serve.run(build_app(args), name=APPLICATION, logging_config={"enable_access_log": False, "log_level": "INFO"})
        ready()
        stop.wait()
        _delete(args.drain_s + DELETE_SPARE_S)
        serve.shutdown()


def _delete(timeout_s: float) -> None:
    """Let the replicas end, as long as they may take; Ray Serve itself waits for 60 s and then raises."""
    serve.delete(APPLICATION, _blocking=False)
    until = time.monotonic() + timeout_s
    while APPLICATION in serve.status().applications and time.monotonic() < until:
        time.sleep(0.1)


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """For the block: SIGTERM and SIGINT set `stop`."""
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _local_ray(args: ServingArgs) -> Iterator[None]:
    """For the block: a Ray of this machine's own, on loopback, with token authentication and without a dashboard."""
    ray.init(
        address="local",  # whatever RAY_ADDRESS names, or runs on this machine
        num_cpus=args.replicas * args.threads_per_replica + 1,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
        _node_ip_address="127.0.0.1",
    )
    try:
        yield
    finally:
        ray.shutdown()
