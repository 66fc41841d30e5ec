"""Check the handlers of workers, and describe the errors that they raise.

This module is pure. Never calls a handler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

from cdcbridge.errors import UnusableHandler
from cdcbridge.units import human_duration

_SOON: Final = 0.05  # seconds below which a delay is described as "at once"
REASON: Final = 500  # characters of an error that the message's history keeps


def clean(text: str) -> str:
    """Replace NUL and halves of surrogate pairs, which PostgreSQL's text cannot hold, by escapes."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def reason_of(error: BaseException) -> str:
    """Describe an error for the message's history, for example "ValueError: no such order"."""
    try:
        text = str(error)
    except Exception as worse:  # noqa: BLE001 - the message is given back after any error
        text = f"its text cannot be read: {type(worse).__name__}"
    return clean(f"{type(error).__name__}: {text}"[:REASON])


def fate_of(consumer: str, row: tuple[Any, ...] | None) -> str:
    """Describe the result of nack_failed(), for example "delivery 2 of 5, again in 2 s".

    Args:
        consumer: Name of the consumer.
        row: Row of nack_failed(), or None if the delivery had ended before.
    """
    if row is None:
        return "its delivery had ended before, so the message may have been delivered again"
    number, of, again_in, dead_id = row
    if dead_id is not None:
        return f"delivery {number} of {of}, now a dead letter: cdcbridge dead show {consumer} {dead_id}"
    if again_in is None or again_in < _SOON:
        return f"delivery {number} of {of}, again at once"
    seconds = round(again_in, 1)
    return f"delivery {number} of {of}, again in {f'{seconds:g} s' if seconds < 60 else human_duration(seconds)}"


def refuse_handler(handler: object, *, asynchronous: bool) -> None:
    """Raise UnusableHandler if calling the handler would not run it to its end.

    Args:
        handler: The object that was given to worker().
        asynchronous: True for AsyncQueue, which needs an `async def` function. False for Queue, which needs a plain
            one.
    """
    if not callable(handler):
        raise UnusableHandler(f"a handler must be a function, and {handler!r} is a {type(handler).__name__}")
    kind = _kind(handler)
    if asynchronous and kind == "a plain function" and _is_coroutine_function(inspect.unwrap(handler)):
        return  # made by a decorator, and returns the coroutine of the wrapped function
    wanted = "an `async def` function" if asynchronous else "a plain function"
    if kind != wanted:
        client = "an AsyncQueue" if asynchronous else "a Queue"
        other = "Queue" if asynchronous else "AsyncQueue"
        hint = f"Use {other} for it." if not kind.endswith("generator") else "A handler may not `yield`."
        raise UnusableHandler(
            f"the worker of {client} needs {wanted}, but {_name(handler)} is {kind}, which would not run", hint=hint
        )


def _kind(handler: Callable[..., Any]) -> str:
    """Return the kind of function that the handler is, in the words of the error message."""
    targets = (handler, getattr(handler, "__call__", None))  # noqa: B004 - an instance may have an async __call__
    if any(map(inspect.isasyncgenfunction, targets)):
        return "an asynchronous generator"
    if any(map(inspect.isgeneratorfunction, targets)):
        return "a generator"
    if any(map(_is_coroutine_function, targets)):
        return "an `async def` function"
    return "a plain function"


def _is_coroutine_function(function: object) -> bool:
    return inspect.iscoroutinefunction(function)


def _name(handler: object) -> str:
    return str(getattr(handler, "__qualname__", None) or repr(handler))


def refuse_unrun(handler: object, result: object) -> None:
    """Raise UnusableHandler if a handler returned an object that has yet to be run, such as a coroutine."""
    if inspect.iscoroutine(result) or inspect.isgenerator(result):
        result.close()
    elif not inspect.isasyncgen(result):
        return
    raise UnusableHandler(
        f"the handler {_name(handler)} returned a {type(result).__name__}, which was not run",
        hint="Wait for it inside the handler, or use AsyncQueue with an `async def` function.",
    )
