"""Format values for people, in logs and listings: `yes` or `billing, audit`.

This module is pure. Never shows a list or a truth value in Python's own notation.
"""

from __future__ import annotations

import datetime as dt
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any


def as_text(value: Any) -> str:
    """Return a value as text for people.

    `True` becomes `yes`, `('a', 'b')` becomes `a, b`, and `None` becomes `-`. A time ends with its seconds. A string
    stays as it is.
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) or hasattr(type(value), "commit_lsn"):  # a position has its own text form
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
    """Return an element of a list or mapping as text, with brackets if it is itself a list or mapping.

    The brackets show where the inner list or mapping ends.
    """
    if isinstance(value, Mapping):
        return f"{{{as_text(value)}}}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{as_text(value)}]" if value else "[]"
    return as_text(value)


def as_given(value: Any) -> str:
    """Return a value of a configuration file as it is written there, for example `'soon'`, `true` or `[a, b]`.

    A null value becomes `nothing`.
    """
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
    """Join names for a sentence: `a`, `a or b`, `a, b or c`."""
    *most, end = names
    return f"{', '.join(most)} {last} {end}" if most else end


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return a suggestion such as `; did you mean mode?`, or '' if no known name is close."""
    near = difflib.get_close_matches(given.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near and near[0] != given else ""


def one_line(text: str) -> str:
    """Escape line ends, and every other character that is not printable.

    A terminal could take such a character for a command.
    """
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def without_secrets(address: str) -> str:
    """Return an address without its user and password: `https://user:secret@host/x` becomes `https://host/x`."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", address)


def without_path(address: str) -> str:
    """Return an address with `***` for each part that may be secret. Placeholders in braces remain.

    For example, `https://user:secret@host/T0/{table}?key=x` becomes `https://host/***/{table}?***`.
    """
    found = re.fullmatch(r"(\w+://)(?:[^/?#]*@)?([^/?#]*)([^?#]*)(.*)", address, re.DOTALL)
    if found is None:
        return "***"
    scheme, host, path, rest = found.groups()
    path = re.sub(r"(\{[^{}]*\})|[^/{}]+", lambda part: part[1] or "***", path)
    return f"{scheme}{host}{path}" + ("?***" if rest else "")
