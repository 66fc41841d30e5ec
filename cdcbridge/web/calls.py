"""An endpoint of the API, and the call that its function gets.

Never knows a path of the API.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, TypeAlias, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from cdcbridge.config import Config
from cdcbridge.errors import StoreUnavailable
from cdcbridge.routing.logical_messages import members
from cdcbridge.sinks.mask import json_object, masked
from cdcbridge.units import parse_duration
from cdcbridge.web.access import Action, Caller
from cdcbridge.web.arrivals import Arrivals
from cdcbridge.web.newest import Newest
from cdcbridge.web.pages.samples import Sparks
from cdcbridge.web.problems import RequestRefused
from cdcbridge.web.store import WebStore

if TYPE_CHECKING:
    from starlette.responses import Response

    from cdcbridge.web.figures import Figures

T = TypeVar("T")
Gone: TypeAlias = Callable[[], Awaitable[bool]]
_LONGEST: Final = 20.0  # seconds for work in a thread


def _seconds(value: Any) -> Any:
    """Turn a text such as "30s" into seconds. A number is in seconds already."""
    return parse_duration(value) if isinstance(value, str) else value


Seconds = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False, description='Seconds, or a text such as "30s".'),
    BeforeValidator(_seconds, json_schema_input_type=float | str),
]


Number = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]  # a bigint


class Body(BaseModel):
    """A JSON object of a request, which refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Polled(NamedTuple):
    """What a long poll asks for.

    Attributes:
        query: The statement that claims messages.
        values: Its values.
        due: The statement for the consumer's id and the seconds until the next look. Its two values are the name.
        room: The name of the waiting room. Its default is the name of the consumer.
    """

    query: str
    values: Sequence[Any]
    due: str
    room: str | None = None


@dataclass(slots=True, frozen=True)
class Services:
    """The objects that all calls of a process share.

    Attributes:
        newest: The newest measurement, for the pages of the dashboard.
        sparks: The samples for its small charts.
        threads: For work that blocks. It is not asyncio's own pool, which also resolves the names of servers.
        figures: The metrics.
        event_streams: The answers of server-sent events that are open.
    """

    config: Config
    store: WebStore
    arrivals: Arrivals
    newest: Newest
    sparks: Sparks
    threads: Executor
    figures: Figures
    event_streams: set[Any] = field(default_factory=set)

    @staticmethod
    def now() -> float:
        """Return the time in seconds since 1970."""
        return time.time()

    async def poll(self, polled: Polled, name: str, wait: float, gone: Gone) -> list[tuple[Any, ...]]:
        """Return the rows of a query as soon as there are any, or [] when the time is over.

        Args:
            polled: The query.
            name: The name of the consumer.
            wait: Seconds to wait.
            gone: Returns whether the caller has disconnected.
        """

        async def look() -> list[tuple[Any, ...]]:
            return await self.store.rows(polled.query, polled.values)

        async def next_look() -> tuple[int, float | None]:
            row = (await self.store.rows(polled.due, (name, name)))[0]
            return row[0], row[1]

        return await self.arrivals.poll(polled.room or name, wait, look, next_look, gone)

    async def sent(
        self, rows: list[tuple[Any, ...]], gone: Gone, give_back: str, name: str, receipt: int, document: int
    ) -> list[tuple[Any, ...]]:
        """Return the rows of claimed messages that the answer will have, and give the others back.

        These are all of them if the caller has disconnected. Otherwise they are the ones without a document, because
        the answer would be too large.

        Args:
            rows: The messages.
            gone: Returns whether the caller has disconnected.
            give_back: The statement that gives messages back. It takes the name of the consumer, and receipts.
            name: The name of the consumer.
            receipt: The column of the receipt.
            document: The column of the document.
        """
        left = bool(rows) and await gone()
        if unsent := [row[receipt] for row in rows if left or row[document] is None]:
            await self.store.patiently(give_back, (name, unsent))
        return [] if left else [row for row in rows if row[document] is not None]

    async def beside(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a function that blocks in a thread.

        Raises:
            StoreUnavailable: It has not ended within 20 seconds, or the process is asked to end. It goes on, and its
                result is lost.
        """
        done = asyncio.get_running_loop().run_in_executor(self.threads, call, *arguments)
        stopped = asyncio.create_task(self.arrivals.stopped.wait())
        stopped.add_done_callback(lambda _: done.cancel())
        try:
            async with asyncio.timeout(_LONGEST):
                return await done
        except TimeoutError:
            raise StoreUnavailable(f"the servers have not answered within {_LONGEST:g} s") from None
        except asyncio.CancelledError:
            if not self.arrivals.stopping:
                raise
            raise StoreUnavailable("this process is ending") from None
        finally:
            stopped.cancel()


@dataclass(slots=True, frozen=True)
class Call:
    """One request.

    Attributes:
        services: What all calls share.
        caller: Who calls.
        path: The parameters of the path, for example {"name": "billing"}.
        body: The request's JSON or its query, as the endpoint's model. Endpoints without a model get None.
        raw: The request's body, whose numbers have all their digits.
        gone: Returns whether the caller has disconnected.
        headers: The headers of the request, by their names in lower case.
    """

    services: Services
    caller: Caller
    path: Mapping[str, str]
    body: Any
    raw: bytes
    gone: Gone
    headers: Mapping[str, str]

    @property
    def store(self) -> WebStore:
        return self.services.store

    async def poll(
        self, query: str, values: Sequence[Any], due: str, *, wait: float | None = None, gone: Gone | None = None
    ) -> list[tuple[Any, ...]]:
        """Return the rows of a query as soon as there are any, or [] when the time is over.

        Args:
            query: The statement that claims messages.
            values: Its values.
            due: The statement for the consumer's id and the seconds until the next look. Its two values are the name.
            wait: Seconds to wait. By default the `wait` of the body.
            gone: Returns whether the caller has disconnected, if the request cannot tell.
        """
        seconds = self.body.wait if wait is None else wait
        return await self.services.poll(Polled(query, values, due), self.path["name"], seconds, gone or self.gone)


Answer: TypeAlias = Mapping[str, Any]  # becomes JSON


@dataclass(slots=True, frozen=True)
class Endpoint:
    """One method of one path.

    Attributes:
        method: GET or POST.
        path: For example "/api/consumers/{name}/receive". A parameter such as {topic:path} may have a "/".
        action: The right that the caller needs.
        answer: The JSON schemas of the answer's fields.
        call: The function. The first line of its docstring is the summary in the OpenAPI document.
        body: The model of the request's JSON, or for GET of its query.
        media: The type of the answer. If it is not JSON, the function returns the whole response.
    """

    method: str
    path: str
    action: Action
    answer: Mapping[str, Mapping[str, Any]]
    call: Callable[[Call], Awaitable[Answer | Response]]
    body: type[Body] | None = None
    media: str = "application/json"


def shown(call: Call, rows: list[tuple[Any, ...]]) -> list[orjson.Fragment]:
    """Return the JSON documents in the first column of rows, for a caller who looks at messages.

    `api.browse` and `api.mask` hold for callers who may not receive the same messages.

    Raises:
        RequestRefused: 403. `api.browse` does not list the caller's role.
    """
    api = call.services.config.api
    if call.caller.may("deliver"):
        return documents(rows)
    if not api.shows_data(call.caller.role):
        raise RequestRefused(403, f"`api.browse` hides the data of messages from the role {call.caller.role}")
    if not api.mask:
        return documents(rows)
    return [orjson.Fragment(_hidden(row[0], api.mask)) for row in rows if row[0] is not None]


def _hidden(document: str, mask: Mapping[str, str]) -> str:
    parts = dict(members(document))
    return json_object({**parts, "data": hidden_data(parts["data"], mask)})


def hidden_data(data: str, mask: Mapping[str, str]) -> str:
    """Return a message's data without the values that `api.mask` hides.

    A malformed published message is a JSON text instead of an object. It has no columns, so all of it is hidden.
    """
    if not mask:
        return data
    return masked(data, mask) if data.lstrip().startswith("{") else "null"


def documents(rows: list[tuple[Any, ...]]) -> list[orjson.Fragment]:
    """Return the JSON documents in the first column of rows, as they are: their numbers keep all digits.

    Rows without a document are skipped. See `within`.
    """
    return [orjson.Fragment(row[0]) for row in rows if row[0] is not None]


def within(call: str, columns: str, most: str = "%s") -> str:
    """Return a statement for the rows that a SQL function returns, with a limit for the size of the answer.

    The first column is the row as JSON, or null for the rows beyond the limit, which do not leave the server. The first
    row is always whole.

    Args:
        call: The call, for example "peek(%s, %s)".
        columns: Further columns of the statement, for example "r.receipt, r.seq + 1 as next".
        most: The placeholder of the limit in bytes. It precedes those of the call.
    """
    names = ", ".join(column.rpartition(" ")[2].rpartition(".")[2] for column in columns.split(","))
    return (  # no part of it comes from a caller of the API
        f"select case when n = 1 or size <= {most} then document end, {names}"  # noqa: S608
        " from (select *, row_number() over so_far as n, sum(octet_length(document)) over so_far as size"
        f" from (select to_json(r)::text as document, {columns} from {call} r) r"
        " window so_far as (rows unbounded preceding)) r"
    )
