"""Handlers of messages: which ones are refused, and the reason that an error becomes."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from cdcbridge.client._handlers import reason_of, refuse_handler, refuse_unrun
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
        with pytest.raises(TypeError, match=r"handler must be|would not run") as raised:
            refuse_handler(handler, asynchronous=asynchronous)
        assert isinstance(raised.value, UsageError)
    refuse_handler(wrapped, asynchronous=asynchronous)


def test_what_a_handler_left_unrun_is_refused() -> None:
    for result in (coroutine(1), generator(1), asynchronous_generator(1)):
        with pytest.raises(UnusableHandler, match="which was not run"):
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
        (Speechless(), "Speechless: its text cannot be read: ValueError"),
        (Wordless(), "Wordless: its text cannot be read: TypeError"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_every_error_has_a_reason_that_postgresql_can_store(error: BaseException, reason: str) -> None:
    assert reason_of(error) == reason
    assert len(reason_of(ValueError("x" * 10_000))) == 500
