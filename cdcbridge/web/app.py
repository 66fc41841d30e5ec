"""The application: its routes, and the checks before each endpoint: login, rights, size, form.

An error becomes problem details. Never answers with a traceback, and never logs a token or a body.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any, Final

import orjson
import structlog
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from cdcbridge import __version__
from cdcbridge.config import Config
from cdcbridge.errors import CdcbridgeError
from cdcbridge.web import queues, states, streams, topics
from cdcbridge.web.access import Caller, Failures, caller_of, refuse_other_pages
from cdcbridge.web.arrivals import Arrivals
from cdcbridge.web.calls import Call, Endpoint, Services
from cdcbridge.web.openapi import document
from cdcbridge.web.problems import RequestRefused, problem_of
from cdcbridge.web.sqs.endpoint import SqsFront
from cdcbridge.web.store import WebStore

ENDPOINTS: Final = (*states.ENDPOINTS, *queues.ENDPOINTS, *streams.ENDPOINTS, *topics.ENDPOINTS)
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_THREADS: Final = 2  # for lag and redrive
_PATHS: Final = "/api/openapi.json lists the paths."
_UPLOAD: Final = 30.0  # seconds for the body of a request
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
        self.services = Services(config, store, Arrivals(store.connect, config.store.schema_), threads)
        self._failures = Failures()
        self._description = orjson.dumps(document(ENDPOINTS, __version__))
        paths: dict[str, dict[str, Endpoint]] = {}
        for one in ENDPOINTS:
            paths.setdefault(one.path, {})[one.method] = one
        self.app = Starlette(
            routes=[
                Route("/live", self._live),
                Route("/ready", self._ready),
                Route("/api/openapi.json", self._openapi),
                *(Route(path, self._answering(methods), methods=list(methods)) for path, methods in paths.items()),
            ],
            middleware=[Middleware(SqsFront, services=self.services, failures=self._failures, read=self._body)],
            lifespan=self._lifespan,
            exception_handlers={404: _no_such_path, 405: _no_such_method},
        )
        self.app.router.redirect_slashes = False  # a redirection would name the caller's header Host

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        listening = asyncio.create_task(self.services.arrivals.listen())
        try:
            yield
        finally:
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

    def _answering(self, methods: Mapping[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            began = monotonic()
            caller: Caller | None = None
            try:
                caller = self._login(request)
                endpoint = methods["GET" if request.method == "HEAD" else request.method]
                caller.refuse(endpoint.action, request.path_params.get("name"))
                response = _json(await endpoint.call(await self._call(request, caller, endpoint)))
            except CdcbridgeError as error:
                response = _problem(error)
            except ClientDisconnect:
                response = _problem(RequestRefused(400, "the caller has disconnected"))
            except Exception as error:
                log.exception("api.failed", path=request.url.path, error=f"{type(error).__name__}: {error}")
                response = _problem(CdcbridgeError("the request failed for a reason that nobody foresaw",
                                                   hint="The log of `serve` has it."))  # fmt: skip
            log.info(
                "api.request",
                method=request.method,
                path=request.url.path,
                status=response.status_code,
                seconds=round(monotonic() - began, 4),
                caller=None if caller is None else caller.name,
                address=_address(request),
            )
            return response

        return answer

    def _login(self, request: Request) -> Caller:
        address, headers, tokens = _address(request), request.headers, self.services.config.api.tokens
        refuse_other_pages(headers.get("origin"), headers.get("host"), protected=bool(tokens))
        try:
            return caller_of(headers.get("authorization"), tokens)
        except RequestRefused:
            self._failures.refuse(address, monotonic())
            self._failures.note(address, monotonic())
            raise

    async def _call(self, request: Request, caller: Caller, endpoint: Endpoint) -> Call:
        raw = await self._body(request)
        body = None
        if endpoint.body is not None:
            given: Any = dict(request.query_params) if endpoint.method == "GET" else _parsed(raw)
            if isinstance(given, dict) and len(given) > _MOST_KEYS:
                raise RequestRefused(422, f"the body has {len(given)} keys")
            try:
                body = endpoint.body.model_validate(given)
            except ValidationError as error:
                raise RequestRefused(422, _described(error)) from None
        return Call(self.services, caller, request.path_params, body, raw, request.is_disconnected)

    async def _body(self, request: Request) -> bytes:
        most = self.services.config.api.max_body
        too_large = RequestRefused(413, f"the request is larger than {most} bytes", hint="`api.max_body` is the limit.")
        if int(request.headers.get("content-length") or 0) > most:
            raise too_large
        found = bytearray()
        try:
            async with asyncio.timeout(_UPLOAD):
                async for piece in request.stream():
                    found += piece
                    if len(found) > most:
                        raise too_large
        except TimeoutError:
            raise RequestRefused(408, f"the request was not complete within {_UPLOAD:g} s") from None
        return bytes(found)


def _address(request: Request) -> str:
    return "" if request.client is None else request.client.host


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
