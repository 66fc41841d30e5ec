"""Values as people read them, in logs and listings: `yes`, `billing, audit`, never Python's own notation. Pure."""

from __future__ import annotations

import datetime as dt
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def as_text(value: Any) -> str:
    """`True` → `yes`, `('a', 'b')` → `a, b`, `None` → `-`; a time to the second; a text as it is."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) or hasattr(type(value), "commit_lsn"):  # a position says itself what it is
        return str(value)
    if isinstance(value, dt.datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S" + (" %Z" if value.tzinfo else ""))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_inner(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(_inner(item) for item in value) or "-"
    return str(value)


def _inner(value: Any) -> str:
    """An element: brackets tell where a list or a mapping inside it ends."""
    if isinstance(value, Mapping):
        return f"{{{as_text(value)}}}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{as_text(value)}]" if value else "[]"
    return as_text(value)


def as_given(value: Any) -> str:
    """A value of a configuration file as the file has it: `'soon'`, `true`, `[a, b]`, and `nothing` for null."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_given, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {as_given(item)}' for key, item in value.items())}}}"
    return str(value)


def one_of(names: Iterable[str], last: str = "or") -> str:
    """`a`, `a or b`, `a, b or c`."""
    *most, end = names
    return f"{', '.join(most)} {last} {end}" if most else end


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean mode?`, or nothing where no known name is close."""
    near = difflib.get_close_matches(given.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near and near[0] != given else ""


def one_line(text: str) -> str:
    """The text without line ends and without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
