"""The application: routes, their order of checks, and the life of what they use.

POST /v1/search   GET /v1/index   GET /healthz   GET /readyz   GET /metrics   GET /openapi.json   GET /
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version as package_version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from pipelines.service.batching import Batcher
from pipelines.service.description import error_responses, schemas, search_body
from pipelines.service.guard import App, BodyReader, ClientGone, Guard, Receive, Scope, Send
from pipelines.service.metrics import CONTENT_TYPE, Metrics
from pipelines.service.page import search_page
from pipelines.service.refusals import Refusal
from pipelines.service.search_request import parse_search
from pipelines.service.searcher import Searcher
from pipelines.service.settings import TOLD_LIMITS, ServiceSettings

# The interpreter lets a thread that waits for its lock in after so long; with the default of 5 ms a search that is done
# could wait that long for the event loop, and the other way round.
SWITCH_INTERVAL_S = 0.0001
SEARCH_PATH = "/v1/search"


class Service:
    """What the routes share: one replica's searcher, batcher and metrics."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.searcher = Searcher(settings, self.metrics)
        self.batcher: Batcher | None = None
        self._bodies = BodyReader(settings.max_body_bytes)
        self.draining = False

    def open(self) -> None:
        """Open index and model, and warm them. Raises what `search` raises."""
        self.searcher.open()

    def start(self) -> None:
        """Begin to answer and to follow CURRENT."""
        self.batcher = Batcher(self.settings, self.metrics)
        self.searcher.follow()

    async def search(self, scope: Scope, receive: Receive) -> bytes:
        """The JSON that answers a POST of /v1/search. Raises Refusal, ClientGone."""
        batcher = self.check_ready()
        started = time.perf_counter()
        media_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"").decode("latin-1")
        if media_type.partition(";")[0].strip().lower() != "application/json":
            message = "send the body as JSON, with the header `Content-Type: application/json`"
            raise Refusal(415, "unsupported_media_type", message, where="header Content-Type", got=media_type)
        batcher.check_room(1)
        body = await self._bodies.read(receive)
        version = self.searcher.current
        asked = parse_search(body, self.settings, version.d, version.nlist)
        del body  # a large one need not wait with its queries
        point = version.point(asked)
        work = await batcher.answer(version, asked, point)
        total = time.perf_counter() - started
        took = {"queue": max(0.0, total - sum(work.took_s.values())), **work.took_s}
        self.metrics.searched("text" if asked.texts is not None else "vector", asked.num_queries, took)
        took["total"] = total
        return to_json(
            {
                "version": version.name,
                "nprobe": point.nprobe,
                "refine_factor": point.refine_factor,
                "results": work.results,
                "took_ms": {stage: round(1000 * seconds, 3) for stage, seconds in took.items()},
            }
        )

    async def drain(self) -> None:
        """Refuse what arrives from now on, and wait until what is in flight was answered, for at most `drain_s`."""
        self.draining = True
        until = time.monotonic() + self.settings.drain_s
        while self.batcher is not None and self.batcher.outstanding and time.monotonic() < until:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """End the threads."""
        self.searcher.close()
        if self.batcher is not None:
            self.batcher.close()

    def check_ready(self) -> Batcher:
        """Raise Refusal 503 unless requests are taken."""
        if self.batcher is None:
            raise Refusal(503, "not_ready", "the index is being opened; come again in a moment", retry_after_s=1)
        if self.draining:
            raise Refusal(503, "draining", "the service is ending; ask another replica", retry_after_s=1)
        return self.batcher


def create_app(
    settings: ServiceSettings | dict[str, Any], hosts: Sequence[str] = (), service: Service | None = None
) -> App:
    """The ASGI application of one replica. It opens index and model when its lifespan starts.

    settings: also as plain JSON. hosts: names in the Host header that are answered, empty: all. service: one that is open
    already. Raises ConfigError.
    """
    if isinstance(settings, dict):
        settings = ServiceSettings.of(settings)
    service = Service(settings) if service is None else service
    routes = _routes(service)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # FastAPI's and Starlette's layers take as long for a request as all else together, so the one route that is asked
        # thousands of times a second is reached without them; they describe it, and would answer it as well.
        if scope["type"] == "http" and scope["path"] == SEARCH_PATH and scope["method"] == "POST":
            body = await service.search(scope, receive)
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        else:
            await routes(scope, receive, send)

    return Guard(app, settings, service.metrics, settings.token(), hosts)


def _routes(service: Service) -> FastAPI:
    settings = service.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        if not hasattr(service.searcher, "current"):
            await asyncio.to_thread(service.open)
        gc.collect()
        gc.freeze()  # what was loaded stays: looking through it again and again would stop answers for tens of milliseconds
        service.start()
        yield
        await service.drain()
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="vectormill",
        version=package_version("vectormill"),
        description="Search in the published version of an index.",
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )

    @app.post(
        SEARCH_PATH,
        summary="The best chunks for each query",
        openapi_extra={"requestBody": search_body()},
        responses={200: _ok("SearchAnswer"), **error_responses(400, 415, 422, 429, 503)},
    )
    async def search(request: Request) -> Response:
        return Response(await service.search(request.scope, request.receive), media_type="application/json")

    @app.get("/v1/index", summary="What is served", responses={200: _ok("IndexFacts"), **error_responses(503)})
    async def index() -> Response:
        service.check_ready()
        version = service.searcher.current
        limits = {name: getattr(settings, name) for name in TOLD_LIMITS}
        limits["max_nprobe"] = min(version.nlist, settings.max_nprobe)
        return Response(to_json({**version.facts(), "limits": limits}), media_type="application/json")

    @app.get("/healthz", summary="The process lives", responses={200: _ok("Health"), **error_responses()})
    async def healthz() -> Response:
        return Response(b'{"status":"ok"}', media_type="application/json")

    @app.get("/readyz", summary="Requests are taken", responses={200: _ok("Readiness"), **error_responses(503)})
    async def readyz() -> Response:
        service.check_ready()
        return Response(b'{"status":"ready"}', media_type="application/json")

    @app.get(
        "/metrics",
        summary="For Prometheus",
        responses={
            200: {"description": "Prometheus text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
            **error_responses(),
        },
    )
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(to_json(_description(app, service)), media_type="application/json")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        content, headers = search_page()
        return Response(content, headers=headers)

    async def refused(_: Request, error: Exception) -> Response:
        refusal = _refusal_of(error)
        service.metrics.refused.labels(refusal.code).inc()
        more = error.headers if isinstance(error, HTTPException) and error.headers else {}  # Allow, of a 405
        return Response(refusal.body(), refusal.status, {**more, **refusal.headers()})

    for kind in (Refusal, HTTPException, ClientGone, Exception):
        app.add_exception_handler(kind, refused)
    return app


def _refusal_of(error: Exception) -> Refusal:
    """Whatever ended a request, in the shape of all refusals. What is unknown is logged by the guard."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException) and error.status_code == 405:
        return Refusal(405, "method_not_allowed", "this path does not take this method; see GET /openapi.json")
    if isinstance(error, HTTPException):
        return Refusal(404, "not_found", "there is no such path; GET /openapi.json lists those that there are")
    if isinstance(error, ClientGone):
        return Refusal(400, "bad_json", "the connection ended before the body did")
    return Refusal(500, "internal_error", "a fault of the service; its log says more")


def _ok(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": "Done.", "content": content}


def _description(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI document, with the limits and the dimension of the version that is served now."""
    service.check_ready()
    version = service.searcher.current
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = {"schemas": schemas(service.settings, version.d, version.nlist)}
    if service.settings.token_env or service.settings.token_file:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"bearer": []}]
        for path in ("/healthz", "/readyz"):
            found["paths"][path]["get"]["security"] = []
    found["components"] = components
    return found
