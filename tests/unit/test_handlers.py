"""The parts of the Python clients that need no server."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

import pytest

from cdcbridge.client._contents import json_text, refuse_bad_text
from cdcbridge.client._handlers import reason_of, refuse_handler, refuse_unrun
from cdcbridge.client._limits import NoAnswer, limited, now
from cdcbridge.errors import UnusableHandler, UsageError


def plain(message: Any) -> None: ...


async def coroutine(message: Any) -> None: ...


def generator(message: Any) -> Iterator[None]:
    yield


async def asynchronous_generator(message: Any) -> AsyncIterator[None]:
    yield


@functools.wraps(coroutine)
def wrapped(message: Any) -> Any:
    return coroutine(message)


class Plain:
    def __call__(self, message: Any) -> None: ...
    def method(self, message: Any) -> None: ...


class Coroutine:
    async def __call__(self, message: Any) -> None: ...
    async def method(self, message: Any) -> None: ...


PLAIN = [plain, functools.partial(plain), Plain(), Plain().method, print, lambda message: None]
COROUTINES = [coroutine, functools.partial(coroutine), Coroutine(), Coroutine().method]
GENERATORS = [
    generator,
    asynchronous_generator,
    functools.partial(generator),
    functools.partial(asynchronous_generator),
]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_handler_that_would_not_run_is_refused(asynchronous: bool) -> None:
    for handler in COROUTINES if asynchronous else PLAIN:
        refuse_handler(handler, asynchronous=asynchronous)
    for handler in [*(PLAIN if asynchronous else COROUTINES), *GENERATORS, None, 1]:
        with pytest.raises(TypeError, match=r"handler must be|would not be run") as raised:
            refuse_handler(handler, asynchronous=asynchronous)
        assert isinstance(raised.value, UsageError)
    refuse_handler(wrapped, asynchronous=asynchronous)


def test_what_a_handler_left_unrun_is_refused() -> None:
    for result in (coroutine(1), generator(1), asynchronous_generator(1)):
        with pytest.raises(UnusableHandler, match="which nobody runs"):
            refuse_unrun(plain, result)
    refuse_unrun(plain, [1])


class Speechless(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


class Wordless(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value] # noqa: PLE0307 - that is it


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("oh"), "ValueError: oh"),
        (ValueError("a\0b"), "ValueError: a\\x00b"),
        (ValueError("\ud800é"), "ValueError: \\ud800é"),
        (Speechless(), "Speechless: its text cannot be had: ValueError"),
        (Wordless(), "Wordless: its text cannot be had: TypeError"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_every_error_has_a_reason_that_postgresql_can_store(error: BaseException, reason: str) -> None:
    assert reason_of(error) == reason
    assert len(reason_of(ValueError("x" * 10_000))) == 500


@dataclasses.dataclass
class Price:
    amount: float


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (math.nan, "data is nan"),
        ({"a": [1, {"b": math.inf}]}, r"data\['a'\]\[1\]\['b'\] is inf"),
        ({"p": Price(-math.inf)}, r"data\['p'\]\.amount is -inf"),
        ([(0.0, math.nan)], r"data\[0\]\[1\] is nan"),
    ],
)
def test_a_number_that_json_does_not_have_is_refused_with_its_place(data: Any, place: str) -> None:
    with pytest.raises(UsageError, match=place):
        json_text(data)


def test_json_keeps_what_it_has_in_every_encoding() -> None:
    data = {"null": None, "é": "☃ 😀 \\ \0", "n": 1.5e300}
    assert json.loads(json_text(data)) == data
    escaped = json_text(data, ascii_only=True)
    assert escaped.isascii() and json.loads(escaped) == data


def test_texts_that_postgresql_cannot_hold_are_named() -> None:
    refuse_bad_text(topic="t", key=None, dedup_id="é😀")
    with pytest.raises(UsageError, match="key is"):
        refuse_bad_text(key="a\0")
    with pytest.raises(UsageError, match=r"dedup_id is .*surrogate"):
        refuse_bad_text(dedup_id="\udcff")


def test_an_exchange_ends_where_the_server_is_silent_and_not_where_it_is_slow() -> None:
    def steps() -> Generator[str, int, int]:
        got: list[int] = []
        while len(got) < 3:
            if ready := (yield "read"):
                got.append(ready)
        return sum(got)

    assert _run(limited(steps(), 60), [1, 0, 1, 1]) == 3
    with pytest.raises(NoAnswer, match="no answer within 0 s"):
        _run(limited(steps(), 0), [1, 0, 0, 0])
    assert _run(limited(iter(()), 1), []) is None  # type: ignore[arg-type]
    assert now() <= now()


def _run(steps: Generator[Any, Any, Any], answers: list[int]) -> Any:
    try:
        next(steps)
        for answer in answers:
            steps.send(answer)
    except StopIteration as end:
        return end.value
    raise AssertionError("it goes on")
