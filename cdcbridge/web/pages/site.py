"""Answer the pages of the dashboard: login, rights, forms, and the templates.

Each page is made on the server and works without a script. The script only renews it. Everything comes from this
process, and a strict Content-Security-Policy forbids the rest. Never shows a traceback.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, quote

import structlog
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from cdcbridge import __version__
from cdcbridge.errors import CdcbridgeError, StoreUnavailable
from cdcbridge.web.access import Action, Caller, Failures, refuse_other_pages, token_of
from cdcbridge.web.calls import Services
from cdcbridge.web.newest import Measurement
from cdcbridge.web.pages.login import COOKIE, LASTS, cookie_for, digest_of, proof_for, same, visitor_of
from cdcbridge.web.pages.wording import filters, plural
from cdcbridge.web.problems import RequestRefused, problem_of
from cdcbridge.web.requests import address_of, body_of, log_request

_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src"
    " 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
}
_ENDED: Final = "select exists (select from ended_sessions where digest = %s)"
_END: Final = "select end_session(%s, make_interval(secs => %s))"
_FORM: Final = 65_536  # bytes of a form
_UNFORESEEN: Final = "the page failed for a reason that nobody foresaw"
log = structlog.get_logger()


@dataclass(slots=True, frozen=True)
class Visit:
    """One request for a page.

    Attributes:
        services: What all requests share.
        caller: Who visits.
        path: The parameters of the path, for example {"name": "billing"}.
        query: The query, or for POST the form.
        figures: The newest measurement.
        address: The visitor's IP address.
    """

    services: Services
    caller: Caller
    path: Mapping[str, str]
    query: Mapping[str, str]
    figures: Measurement
    address: str

    @property
    def name(self) -> str:
        """The consumer that the path names."""
        return self.path["name"]

    @property
    def shows_data(self) -> bool:
        """Whether this visitor may see the data of messages."""
        return self.caller.may("read") and self.services.config.api.shows_data(self.caller.role)

    @property
    def shows_queries(self) -> bool:
        """Whether this visitor may see the queries of other sessions, which may contain data."""
        masked = self.services.config.api.mask and self.caller.role != "admin"
        return self.caller.consumers is None and self.shows_data and not masked

    @property
    def may_try(self) -> bool:
        """Whether this visitor may try expressions, which can read each column of each message."""
        open_data = self.shows_data and not self.services.config.api.mask
        return self.caller.consumers is None and self.caller.may("redrive") and open_data

    def given(self, name: str) -> str | None:
        """Return a field of the query or the form, or None if it is empty."""
        return self.query.get(name) or None

    def number(self, name: str) -> int | None:
        """Return a field that is a number, or None if it is empty.

        Raises:
            RequestRefused: 422. It is not a number, or has more than 18 digits.
        """
        value = self.query.get(name, "").strip()
        if value and not re.fullmatch("[0-9]{1,18}", value):
            raise RequestRefused(422, f"{name} is {value[:40]!r}, which is not a number of at most 18 digits")
        return int(value) if value else None

    def sessions(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return rows about sessions, without their queries if the visitor may not see these."""
        return rows if self.shows_queries else [{**row, "query": None} for row in rows]


@dataclass(slots=True, frozen=True)
class Page:
    """The name of a template and its values."""

    template: str
    values: Mapping[str, Any]


@dataclass(slots=True, frozen=True)
class Elsewhere:
    """The path of the page that shows the result of a form."""

    path: str


@dataclass(slots=True, frozen=True)
class View:
    """One page, or one form.

    Attributes:
        method: GET or POST.
        path: For example "/consumers/{name}".
        action: The right that the visitor needs.
        call: The function that makes it.
    """

    method: str
    path: str
    action: Action
    call: Callable[[Visit], Awaitable[Page | Elsewhere]]


class _PathNumber(Convertor[int]):
    """A number in a path, with at most 18 digits. Python refuses to read a number of thousands of digits."""

    regex = "[0-9]{1,18}"

    def convert(self, value: str) -> int:
        return int(value)

    def to_string(self, value: int) -> str:
        return str(value)


register_url_convertor("number", _PathNumber())


class Site:
    """The pages of one process.

    Args:
        services: What all requests share.
        failures: The failed logins, which the API counts as well.
        views: The pages and forms.
    """

    def __init__(self, services: Services, failures: Failures, views: tuple[View, ...]) -> None:
        self._services = services
        self._failures = failures
        self._tokens = services.config.api.tokens
        self._views = views
        self._ended: set[str] = set()  # the sessions that ended by a logout here, for times without a store
        self._templates = Environment(
            loader=PackageLoader("cdcbridge.web.pages"),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(filters())

    def routes(self) -> list[BaseRoute]:
        """Return the routes of the pages, the login and the style sheet."""
        return [
            *(Route(view.path, self._answering(view), methods=[view.method]) for view in self._views),
            Route("/login", self._guarded(self._login_page), methods=["GET"]),
            Route("/login", self._guarded(self._login), methods=["POST"]),
            Route("/logout", self._guarded(self._logout), methods=["POST"]),
            Mount("/static", _Static(directory=Path(__file__).with_name("static"))),
        ]

    def _answering(self, view: View) -> Callable[[Request], Awaitable[Response]]:
        async def make(request: Request, caller: Caller | None) -> Response:
            return self._to_login(request) if caller is None else await self._answer(view, request, caller)

        return self._guarded(make)

    def _guarded(
        self, make: Callable[[Request, Caller | None], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return a function that answers, also with the reason if it cannot."""

        async def answer(request: Request) -> Response:
            began = time.monotonic()
            caller: Caller | None = None
            try:
                self._refuse_others(request)
                caller = await self._visitor(request)
                response = await make(request, caller)
            except CdcbridgeError as error:
                response = self._error(request, caller, error)
            except ClientDisconnect:
                response = Response(status_code=400)
            except Exception as error:
                log.exception("api.failed", path=request.url.path, error=f"{type(error).__name__}: {error}")
                hint = "The log of `serve` has it."
                response = self._error(request, caller, CdcbridgeError(_UNFORESEEN, hint=hint))
            log_request(request, response.status_code, began, caller)
            return response

        return answer

    async def _visitor(self, request: Request) -> Caller | None:
        cookie = request.cookies.get(COOKIE)
        caller = visitor_of(cookie, self._tokens, time.time())
        if caller is None or cookie is None or not self._tokens:
            return caller
        digest = digest_of(cookie)
        try:
            ended = await self._services.store.value(_ENDED, (digest,))
        except StoreUnavailable:  # the pages show the last figures, and nothing can be changed
            ended = digest in self._ended
        return None if ended else caller

    async def _answer(self, view: View, request: Request, caller: Caller) -> Response:
        caller.refuse(view.action, request.path_params.get("name"))
        query = dict(request.query_params) if view.method == "GET" else await self._form(request)
        figures = await self._services.newest.measurement()
        visit = Visit(self._services, caller, request.path_params, query, figures, address_of(request))
        found = await view.call(visit)
        if isinstance(found, Elsewhere):
            return RedirectResponse(found.path, 303, _HEADERS)
        return self._page(request, caller, found, figures)

    async def _form(self, request: Request) -> dict[str, str]:
        """Return the fields of a form of this site's own pages."""
        form = await _fields(request)
        expected = proof_for(request.cookies.get(COOKIE), self._tokens)
        if not same(expected, form.pop("proof", "")):
            raise RequestRefused(403, "the form is not from a page of this session",
                                 hint="Open the page again, and send it from there.")  # fmt: skip
        return form

    def _page(
        self, request: Request, caller: Caller | None, page: Page, figures: Measurement | None, status: int = 200
    ) -> Response:
        text = self._templates.get_template(page.template).render(
            caller=caller,
            tokens=bool(self._tokens),
            may=caller.may if caller else lambda _: False,
            figures=figures,
            alarms=len(visible_alarms(caller, figures)) if caller and figures else 0,
            proof=proof_for(request.cookies.get(COOKIE), self._tokens),
            here=request.url.path,
            said=_said(request.query_params),
            now=time.time(),
            version=__version__,
            **page.values,
        )
        return Response(text, status, _HEADERS, media_type="text/html")

    def _error(self, request: Request, caller: Caller | None, error: CdcbridgeError) -> Response:
        status, problem, headers = problem_of(error)
        values = {"title": HTTPStatus(status).phrase, "problem": {"hint": "", **problem}}
        response = self._page(request, caller, Page("error.html", values), None, status)
        response.headers.update(headers)
        return response

    def _refuse_others(self, request: Request) -> None:
        refuse_other_pages(request.headers.get("origin"), request.headers.get("host"), protected=bool(self._tokens))

    def _to_login(self, request: Request) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        there = request.url.path + query if request.method == "GET" else "/"
        return RedirectResponse(f"/login?next={quote(there, safe='')}", 303, _HEADERS)

    async def _login_page(self, request: Request, _: Caller | None) -> Response:
        if not self._tokens:
            return RedirectResponse("/", 303, _HEADERS)
        values = {"title": "Log in", "next": _local(request.query_params.get("next")), "wrong": ""}
        return self._page(request, None, Page("login.html", values), None)

    async def _login(self, request: Request, _: Caller | None) -> Response:
        form, now = await _fields(request), time.monotonic()
        there, token = _local(form.get("next")), token_of(form.get("token", ""), self._tokens)
        if token is None:
            self._failures.refuse(address_of(request), now)
            self._failures.note(address_of(request), now)
            values = {"title": "Log in", "next": there, "wrong": "This token is not known."}
            return self._page(request, None, Page("login.html", values), None, 401)
        response = RedirectResponse(there, 303, _HEADERS)
        secure = request.url.scheme == "https"
        cookie = cookie_for(token, time.time())
        response.set_cookie(COOKIE, cookie, LASTS, secure=secure, httponly=True, samesite="lax")
        return response

    async def _logout(self, request: Request, caller: Caller | None) -> Response:
        if caller is None:
            return self._to_login(request)
        await self._form(request)
        if cookie := request.cookies.get(COOKIE):
            self._ended.add(digest_of(cookie))
            await self._services.store.rows(_END, (digest_of(cookie), LASTS))
        response = RedirectResponse("/login", 303, _HEADERS)
        response.delete_cookie(COOKIE)
        return response

    async def no_such_page(self, request: Request, _: Exception) -> Response:
        """Answer a browser that asks for a path which does not exist."""

        async def make(request: Request, _: Caller | None) -> Response:
            raise RequestRefused(404, f"there is no page {request.url.path}")

        return await self._guarded(make)(request)


class _Static(StaticFiles):
    """The style sheet and the script, which a browser may keep until the next version."""

    async def get_response(self, path: str, scope: Any) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "max-age=86400"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


async def _fields(request: Request) -> dict[str, str]:
    raw = await body_of(request, _FORM)
    try:
        return dict(parse_qsl(raw.decode(), keep_blank_values=True, max_num_fields=50))
    except (UnicodeDecodeError, ValueError) as error:
        raise RequestRefused(400, f"the form cannot be read: {error}") from None


def visible_alarms(caller: Caller, figures: Measurement) -> list[dict[str, Any]]:
    """Return the alarms that a caller may see. Those of the slot are for callers who see all consumers."""
    return [
        one
        for one in figures.rows("alarms")
        if (caller.consumers is None if one["consumer"] is None else caller.sees(one["consumer"]))
    ]


def _said(query: Mapping[str, str]) -> str:
    """Return the sentence about the change that led to this page, or ""."""
    retried, removed, kept, purged = (_count(query.get(name, "")) for name in ("retried", "removed", "kept", "purged"))
    gone = f" {plural(removed, 'letter')} removed: the filter of the consumer does not match." if removed else ""
    left = f" {plural(kept, 'letter')} stayed: the filter fails again, or the message waits already." if kept else ""
    return {
        "paused": "Paused. Its receivers get nothing until somebody resumes it.",
        "resumed": "Resumed.",
        "retry": f"Retried {plural(retried, 'dead letter')}.{gone}{left}",
        "purge": f"Purged {plural(purged, 'dead letter')}.",
        "silenced": "Silenced. Until then, nobody gets a notification of this rule.",
        "spoken": "The rule makes notifications again.",
    }.get(query.get("said", ""), "")


def _count(text: str) -> int:
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else 0


def _local(path: str | None) -> str:
    """Return a path of this site, or "/" for an address of another one."""
    good = re.fullmatch(r"/(?![/\\])[^\\\s]*", path or "")
    return path if path and good else "/"
