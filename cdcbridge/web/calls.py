"""An endpoint of the API, and the call that its function gets.

Never knows a path of the API.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from cdcbridge.config import Config
from cdcbridge.errors import StoreUnavailable
from cdcbridge.units import parse_duration
from cdcbridge.web.access import Action, Caller
from cdcbridge.web.arrivals import Arrivals
from cdcbridge.web.figures import Measurements
from cdcbridge.web.store import WebStore

T = TypeVar("T")
_LONGEST: Final = 20.0  # seconds for work in a thread


def _seconds(value: Any) -> Any:
    """Turn a text such as "30s" into seconds. A number is in seconds already."""
    return parse_duration(value) if isinstance(value, str) else value


Seconds = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False, description='Seconds, or a text such as "30s".'),
    BeforeValidator(_seconds),
]


Number = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]  # a bigint


class Body(BaseModel):
    """A JSON object of a request, which refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(slots=True, frozen=True)
class Services:
    """What all calls of a process share.

    Attributes:
        measurements: The newest figures, for the pages of the dashboard.
        threads: For work that blocks. It is not asyncio's own pool, which also resolves the names of servers.
    """

    config: Config
    store: WebStore
    arrivals: Arrivals
    measurements: Measurements
    threads: Executor

    @staticmethod
    def now() -> float:
        """Return the time in seconds since 1970."""
        return time.time()

    async def beside(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a function that blocks in a thread.

        Raises:
            StoreUnavailable: It has not ended within 20 seconds. It goes on, and its result is lost.
        """
        done = asyncio.get_running_loop().run_in_executor(self.threads, call, *arguments)
        try:
            async with asyncio.timeout(_LONGEST):
                return await done
        except TimeoutError:
            raise StoreUnavailable(f"the servers have not answered within {_LONGEST:g} s") from None


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
    """

    services: Services
    caller: Caller
    path: Mapping[str, str]
    body: Any
    raw: bytes
    gone: Callable[[], Awaitable[bool]]

    @property
    def store(self) -> WebStore:
        return self.services.store

    async def poll(self, query: str, values: Sequence[Any], due: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query as soon as there are any, or [] when the `wait` of the body is over.

        Args:
            query: The statement that claims messages.
            values: Its values.
            due: The statement for the consumer's id and the seconds until the next look. Its two values are the name.
        """
        name = self.path["name"]

        async def look() -> list[tuple[Any, ...]]:
            return await self.store.rows(query, values)

        async def next_look() -> tuple[int, float | None]:
            row = (await self.store.rows(due, (name, name)))[0]
            return row[0], row[1]

        return await self.services.arrivals.poll(name, self.body.wait, look, next_look, self.gone)


Answer: TypeAlias = Mapping[str, Any]


@dataclass(slots=True, frozen=True)
class Endpoint:
    """One method of one path.

    Attributes:
        method: GET or POST.
        path: For example "/api/consumers/{name}/receive".
        action: The right that the caller needs.
        answer: The JSON schemas of the answer's fields.
        call: The function. The first line of its docstring is the summary in the OpenAPI document.
        body: The model of the request's JSON, or for GET of its query.
    """

    method: str
    path: str
    action: Action
    answer: Mapping[str, Mapping[str, Any]]
    call: Callable[[Call], Awaitable[Answer]]
    body: type[Body] | None = None


def documents(rows: list[tuple[Any, ...]]) -> list[orjson.Fragment]:
    """Return the JSON documents in the first column of rows, as they are: their numbers keep all digits."""
    return [orjson.Fragment(row[0]) for row in rows]
