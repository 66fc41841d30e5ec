"""The application: its routes, and the checks before each endpoint: login, rights, size, form.

An error becomes problem details. Never answers with a traceback, and never logs a token or a body.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from time import monotonic
from typing import Any, Final

import orjson
import structlog
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from cdcbridge import __version__
from cdcbridge.config import Config
from cdcbridge.errors import CdcbridgeError
from cdcbridge.web import events, figures, log_browser, queues, states, streams, topics
from cdcbridge.web.access import Caller, Failures, caller_of, refuse_other_pages
from cdcbridge.web.arrivals import Arrivals
from cdcbridge.web.audit import AUDITED, audited
from cdcbridge.web.calls import Answer, Call, Endpoint, Services
from cdcbridge.web.newest import Newest
from cdcbridge.web.openapi import document
from cdcbridge.web.pages import consumers as consumer_pages
from cdcbridge.web.pages import dead, others, overview, trials
from cdcbridge.web.pages import log as log_pages
from cdcbridge.web.pages.samples import Sparks
from cdcbridge.web.pages.site import Site
from cdcbridge.web.problems import RequestRefused, problem_of
from cdcbridge.web.requests import address_of, body_of, has_gone, log_request
from cdcbridge.web.sqs.endpoint import SqsFront
from cdcbridge.web.states import measured
from cdcbridge.web.store import WebStore

_MODULES: Final = (states, queues, streams, topics, log_browser, events, figures)
ENDPOINTS: Final = tuple(one for module in _MODULES for one in module.ENDPOINTS)
VIEWS: Final = (*overview.VIEWS, *consumer_pages.VIEWS, *dead.VIEWS, *log_pages.VIEWS, *trials.VIEWS, *others.VIEWS)
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_THREADS: Final = 2  # for lag and redrive
_PATHS: Final = "/api/openapi.json lists the paths."
_MOST_KEYS: Final = 50  # of a body. Pydantic reports each key that it does not know
_MOST_PROBLEMS: Final = 10  # in an answer
_READY_PATIENCE: Final = 3.0  # seconds
log = structlog.get_logger()


class Application:
    """The API of one process.

    Attributes:
        app: The ASGI application.
        services: The sessions on the store, and the waiting polls.
    """

    def __init__(self, config: Config) -> None:
        store = WebStore(config)
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="api")
        arrivals = Arrivals(store.connect, config.store.schema_)
        newest = Newest(store, lambda: self.services.beside(measured, config))
        self.services = Services(config, store, arrivals, newest, Sparks(store), threads, figures.Figures(config))
        self.services.figures.watch(self.services)
        self._failures = Failures()
        site = Site(self.services, self._failures, VIEWS)
        self._description = orjson.dumps(document(ENDPOINTS, __version__))
        paths: dict[str, dict[str, Endpoint]] = {}
        for one in ENDPOINTS:
            paths.setdefault(one.path, {})[one.method] = one
        pages = Starlette(
            routes=[
                Route("/live", self._live),
                Route("/ready", self._ready),
                Route("/api/openapi.json", self._openapi),
                *(
                    Route(path, self._answering(path, methods), methods=list(methods))
                    for path, methods in paths.items()
                ),
                *site.routes(),
            ],
            lifespan=self._lifespan,
            exception_handlers={404: _for_people(site, _no_such_path), 405: _for_people(site, _no_such_method)},
        )
        pages.router.redirect_slashes = False  # a redirection would name the caller's header Host
        self.app = SqsFront(pages, self.services, self._failures)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        listening = asyncio.create_task(self.services.arrivals.listen())
        try:
            yield
        finally:
            self.services.newest.close()
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening
            self.services.threads.shutdown(wait=False, cancel_futures=True)
            await self.services.store.close()

    async def _live(self, _: Request) -> Response:
        return Response("live\n", media_type="text/plain")

    async def _ready(self, _: Request) -> Response:
        """Answer whether the store can be reached and has a schema."""
        try:
            async with asyncio.timeout(_READY_PATIENCE):
                await self.services.store.rows("select 1 from consumers limit 1")
        except (CdcbridgeError, TimeoutError) as error:
            log.debug("api.not_ready", error=str(error) or "the store does not answer")
            return Response("not ready\n", 503, media_type="text/plain")
        return Response("ready\n", media_type="text/plain")

    async def _openapi(self, _: Request) -> Response:
        return Response(self._description, media_type="application/json")

    def _answering(self, path: str, methods: Mapping[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            began = monotonic()
            caller: Caller | None = None
            try:
                caller = self._login(request)
                endpoint = methods["GET" if request.method == "HEAD" else request.method]
                caller.refuse(endpoint.action, request.path_params.get("name"))
                answer = await self._carry_out(endpoint, await self._call(request, caller, endpoint), request)
                response = answer if isinstance(answer, Response) else _json(answer)
            except CdcbridgeError as error:
                response = _problem(error)
            except ClientDisconnect:
                response = _problem(RequestRefused(400, "the caller has disconnected"))
            except Exception as error:
                log.exception("api.failed", path=request.url.path, error=f"{type(error).__name__}: {error}")
                response = _problem(CdcbridgeError("the request failed for a reason that nobody foresaw",
                                                   hint="The log of `serve` has it."))  # fmt: skip
            seconds = log_request(request, response.status_code, began, caller)
            self.services.figures.answered(request.method, path, response.status_code, seconds)
            return response

        return answer

    async def _carry_out(self, endpoint: Endpoint, call: Call, request: Request) -> Answer | Response:
        if endpoint.method != "POST" or endpoint.action not in AUDITED:
            return await endpoint.call(call)
        action, subject = endpoint.call.__name__, call.path.get("name", "")
        details = {} if call.body is None else call.body.model_dump(exclude_none=True)
        async with audited(call.store, call.caller, address_of(request), action, subject, details) as result:
            answer = await endpoint.call(call)
            if not isinstance(answer, Response):
                result.update(answer)
            return answer

    def _login(self, request: Request) -> Caller:
        address, headers, tokens = address_of(request), request.headers, self.services.config.api.tokens
        refuse_other_pages(headers.get("origin"), headers.get("host"), protected=bool(tokens))
        try:
            return caller_of(headers.get("authorization"), tokens)
        except RequestRefused:
            self._failures.refuse(address, monotonic())
            self._failures.note(address, monotonic())
            raise

    async def _call(self, request: Request, caller: Caller, endpoint: Endpoint) -> Call:
        raw = await body_of(request, self.services.config.api.max_body)
        body = None
        if endpoint.body is not None:
            is_query = endpoint.method == "GET"
            given: Any = dict(request.query_params) if is_query else _parsed(raw)
            if isinstance(given, dict) and len(given) > _MOST_KEYS:
                raise RequestRefused(422, f"the body has {len(given)} keys")
            model = endpoint.body
            try:  # in JSON, "10" and true are no numbers
                body = model.model_validate(given) if is_query else model.model_validate_json(raw or b"{}", strict=True)
            except ValidationError as error:
                raise RequestRefused(422, _described(error)) from None
        return Call(self.services, caller, request.path_params, body, raw, partial(has_gone, request), request.headers)


def _parsed(raw: bytes) -> Any:
    try:
        return orjson.loads(raw or b"{}")
    except orjson.JSONDecodeError as error:
        raise RequestRefused(400, f"the body is not JSON: {error}") from None


def _described(error: ValidationError) -> str:
    """Return the problems of a body in one line, for example "max_messages: Input should be at least 1"."""
    if error.error_count() > _MOST_PROBLEMS:
        return f"the body has {error.error_count()} problems"
    problems = error.errors(include_url=False, include_input=False)
    return ", and ".join(
        f"{'.'.join(map(str, one['loc'])) or 'the body'}: {one['msg'].removeprefix('Value error, ')}"
        for one in problems
    )


def _json(answer: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(answer, default=str), media_type="application/json", headers=_HEADERS)


def _problem(error: CdcbridgeError) -> Response:
    status, problem, headers = problem_of(error)
    body = orjson.dumps(problem)
    return Response(body, status, media_type="application/problem+json", headers={**_HEADERS, **headers})


async def _no_such_path(request: Request, _: Exception) -> Response:
    return _problem(
        RequestRefused(404, f"there is no path {request.url.path}", hint="/api/openapi.json lists the paths.")
    )


async def _no_such_method(request: Request, error: Exception) -> Response:
    detail = f"{request.url.path} does not take {request.method}"
    return _problem(RequestRefused(405, detail, hint=_PATHS, headers=getattr(error, "headers", None)))


def _for_people(
    site: Site, otherwise: Callable[[Request, Exception], Awaitable[Response]]
) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Return a function that answers a browser with a page, and a program with problem details."""

    async def answer(request: Request, error: Exception) -> Response:
        wants_page = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api/")
        return await (site.no_such_page if wants_page else otherwise)(request, error)

    return answer
