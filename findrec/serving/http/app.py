"""The HTTP service as an ASGI application: routes, validation, back-pressure, security headers.

Requests of clients that are served at the same time are answered in batches by one thread; if too many wait,
further ones get status 429 with a header `Retry-After`. Errors are JSON with `detail`: 404 for unknown users
and items, 422 for input that is not valid, 503 if events cannot be read or stored, 500 for faults of the
service.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse

from findrec import __version__
from findrec.errors import FindRecError
from findrec.progress import warn
from findrec.serving.http.batches import Batcher, BusyError
from findrec.serving.http.events import Append, EventStore, StoreError
from findrec.serving.http.metrics import Metrics
from findrec.serving.http.schemas import (
    AppendRequest,
    AppendResponse,
    Error,
    Health,
    HistoryResponse,
    ListResponse,
    Named,
    RecommendRequest,
    RecommendResponse,
    SimilarRequest,
    SimilarResponse,
)
from findrec.serving.http.service import Question, Service, UnknownError
from findrec.serving.recommender import Recommender

PAGE = Path(__file__).parent / "page"
BODY_BYTES = 4 << 20
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Text = Annotated[str, Query(max_length=256)]
Few = Annotated[int, Query(ge=1, le=100)]
_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"model": Error, "description": "An unknown user or item."},
    422: {"model": Error, "description": "Input that is not valid."},
    429: {"model": Error, "description": "Too many requests wait; come again after Retry-After seconds."},
}


@dataclass(frozen=True)
class Limits:
    """How requests are batched and how many may wait.

    Attributes:
        batch: lists of one pass of the model.
        wait_s: how long a batch waits for more requests, seconds.
        waiting: lists that may wait; more are refused.
        connections: open connections, also those at rest; requests over further ones get status 503.
    """

    batch: int = 64
    wait_s: float = 0.002
    waiting: int = 1024

    @property
    def connections(self) -> int:
        """As many as can have a list waiting, and as many again that wait for other answers or rest."""
        return 2 * self.waiting + 256


def create_app(
    recommender: Recommender, store: EventStore, limits: Limits | None = None, *, page: bool = True
) -> FastAPI:
    """The application; with `page` also a page to try the model, which shows users and their histories.

    It closes `store` when it stops, after the waiting requests are answered.
    """
    limits, service, metrics = limits or Limits(), Service(recommender, store), Metrics()

    def make_lists(questions: Sequence[Question]) -> list[ListResponse | FindRecError]:
        metrics.batch.observe(len(questions))
        return service.recommend(questions)

    lists: Batcher[Question, ListResponse] = Batcher(
        make_lists, most=limits.batch, wait_s=limits.wait_s, waiting=limits.waiting
    )
    similar: Batcher[SimilarRequest, SimilarResponse] = Batcher(
        lambda asked: [service.similar(one) for one in asked],
        most=1,
        wait_s=0,
        waiting=max(1, limits.waiting // 8),
    )
    # Events that arrive while the disk writes share the next commit.
    writes: Batcher[Append, int] = Batcher(store.append, most=256, wait_s=0, waiting=limits.waiting)
    metrics.watch("findrec_waiting_lists", "Lists that wait for the model.", lambda: lists.num_waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batchers = (lists, similar, writes)
        for batcher in batchers:
            batcher.start()
        yield
        for batcher in batchers:
            await batcher.close()
        store.close()

    app = FastAPI(
        title=f"FindRec: {recommender.config.name}",
        version=__version__,
        docs_url=None,  # they load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
        max_body_size=BODY_BYTES,
    )
    _add_errors(app, recommender)
    _add_measurement(app, metrics)

    @app.post("/recommend", responses=_ERRORS)
    async def recommend(request: RecommendRequest) -> RecommendResponse:
        """Lists for users, with the events appended to them, or for visitors with given histories."""
        questions = await run_in_threadpool(service.questions, request)
        return RecommendResponse(lists=await lists.submit(questions))

    @app.post("/similar", responses=_ERRORS)
    async def similar_items(request: SimilarRequest) -> SimilarResponse:
        """The items whose vectors are most similar to those of the given items."""
        (answer,) = await similar.submit([request])
        return answer

    @app.post("/append", responses=_ERRORS)
    async def append(request: AppendRequest) -> AppendResponse:
        """Add events to a user; they are on disk when the response is sent."""
        added = await run_in_threadpool(service.appended, request)
        (stored,) = await writes.submit([added])
        metrics.appended.inc(stored)
        return AppendResponse(stored=stored)

    @app.get("/health")
    async def health() -> Health:
        """What is served."""
        data, config = recommender.folder, recommender.config
        return Health(
            status="ok",
            run=config.name,
            model=config.model.title,
            items=data.num_items,
            users=data.num_users,
            version=__version__,
        )

    @app.get("/metrics", include_in_schema=False)
    async def measurements() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    if page:
        _add_page(app, service)
    return app


def _add_page(app: FastAPI, service: Service) -> None:
    """The page and what only it needs."""

    @app.get("/", include_in_schema=False)
    async def start() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> FileResponse:
        if name not in ("page.js", "page.css", "icon.svg"):
            raise UnknownError(f"no file {name!r}")
        return FileResponse(PAGE / name)

    @app.get("/items")
    def items(q: Text, limit: Few = 20) -> list[Named]:
        """Items by id or by a part of the title, the most popular first."""
        return service.items(q, limit)

    @app.get("/users")
    def users(q: Text = "", limit: Few = 20) -> list[str]:
        """Users by the beginning of the id."""
        return service.users(q, limit)

    @app.get("/history", responses=_ERRORS)
    def history(user: Text, last: Few = 50) -> HistoryResponse:
        """The last events of a user, oldest first."""
        return service.history(user, last)


def _add_errors(app: FastAPI, recommender: Recommender) -> None:
    path = recommender.folder.path

    @app.exception_handler(FindRecError)
    async def known(_: Request, error: FindRecError) -> JSONResponse:
        # Places of this machine are of no use to clients.
        text = str(error).replace(f"{path}/items.parquet", "the item table").replace(str(path), "the data")
        return JSONResponse({"detail": text}, 404 if isinstance(error, UnknownError) else 422)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [
            f"{'.'.join(str(part) for part in one['loc'][1:]) or 'body'}: {one['msg']}"
            for one in error.errors()
        ]
        shown = "; ".join(problems[:5])
        return JSONResponse({"detail": f"{shown}{'; ...' if len(problems) > 5 else ''}"}, 422)

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> JSONResponse:
        detail = "too many requests are waiting: come again after the seconds in Retry-After"
        return JSONResponse({"detail": detail}, 429, headers={"Retry-After": "1"})

    @app.exception_handler(StoreError)
    async def disk(_: Request, error: StoreError) -> JSONResponse:
        warn(f"WARNING: events cannot be read or stored: {error}")
        detail = "events of users cannot be read or stored now: send the request again later"
        return JSONResponse({"detail": detail}, 503)


def _add_measurement(app: FastAPI, metrics: Metrics) -> None:
    @app.middleware("http")
    async def measure(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        began = time.perf_counter()
        try:
            response = await answer(request)
        except Exception:
            warn(f"ERROR: {request.method} {request.url.path} failed\n{traceback.format_exc()}")
            response = JSONResponse({"detail": "an error of the service, which its log explains"}, 500)
        route = request.scope.get("route")
        path = getattr(route, "path", "other")  # not the path of the request, which a client chooses freely
        metrics.requests.labels(path, str(response.status_code)).inc()
        metrics.seconds.labels(path).observe(time.perf_counter() - began)
        response.headers.update(_HEADERS)
        return response
