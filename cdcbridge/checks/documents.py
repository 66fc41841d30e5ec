"""Find documents in json columns that make a filter fail: null, {}, [], or a member that is null.

For example, `record.meta.vip == true` fails on a row whose meta is {}. This module never proposes a complete filter
that it has not tried on these documents. It never accesses a database.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from cdcbridge.routing.filters import tokens_of

Path = tuple[str, ...]
_LEAVES: Final = (True, "x", 1, ["x"], {"a": 1}, "2026-01-01T00:00:00Z")


class Failing(NamedTuple):
    """The documents on which the filter fails, as JSON texts, and the fix for the filter."""

    documents: tuple[str, ...]
    fix: str


def failing_documents(
    source: str, column: str, *, nullable: bool, literals: Sequence[Any], fails: Callable[[str, Any], bool]
) -> Failing | None:
    """Try a filter on typical documents of a json column.

    Args:
        source: The text of the filter.
        column: The name of the json column.
        nullable: True if the column itself may be null.
        literals: The values that the filter compares with.
        fails: Return whether a filter fails on a row whose column has the given document.

    Returns:
        The documents on which the filter fails, with a fix. None if it works on all of them, or if no document was
        found on which it works.
    """
    paths = list(dict.fromkeys(_paths(tokens_of(source), column)))
    leaves = [*literals, *_LEAVES]
    typical = next((d for leaf in leaves for d in [_document(paths, leaf)] if not fails(source, d)), None)
    if typical is None and not (not paths and _reads_inside(tokens_of(source), column)):
        return None
    tried: list[Any] = [*([None] if nullable else []), {}, []]
    nulls = _document(paths, None)
    documents = [d for d in (*tried, *([nulls] if paths else [])) if fails(source, d)]
    if not documents:
        return None
    fix = _fix(source, column, paths, lambda changed: any(fails(changed, d) for d in (*tried, nulls, typical, "x", 1)))
    return Failing(tuple(json.dumps(d) for d in documents), fix)


def _fix(source: str, column: str, paths: Sequence[Path], still_fails: Callable[[str], bool]) -> str:
    """Return a fix that tests the document before the filter reads it.

    A fix that is a complete filter was tried on the documents.
    """
    if not paths:
        return f"Test the document first: `record.{column} != null && …`."
    tokens = tokens_of(source)
    for with_null in (False, True):
        guard = " && ".join(dict.fromkeys(part for path in paths for part in _guards(column, path, with_null)))
        if still_fails(f"{guard} && ({source})"):
            continue
        if "||" not in tokens and "?" not in tokens:
            return f"Write `{guard} && {source}`."
        reads = _written(column, paths[0])
        return f"Write `({guard} && {reads} == …)` instead of `{reads} == …`."
    return f"Test the document first: `{guard} && …`."


def _guards(column: str, path: Path, with_null: bool) -> Iterator[str]:
    """Yield the CEL tests that make it safe to read one member of the document."""
    for depth, name in enumerate(path):
        above = _written(column, path[:depth])
        yield f"type({above}) == type({{}})"
        yield f"has({_written(column, path[: depth + 1])})" if name.isidentifier() else f"{name!r} in {above}"
    if with_null:
        yield f"{_written(column, path)} != null"


def _written(column: str, path: Path) -> str:
    return "record" + "".join(f".{name}" if name.isidentifier() else f"[{name!r}]" for name in (column, *path))


def _paths(tokens: Sequence[str], column: str) -> Iterator[Path]:
    """Yield the path of each member that the expression reads, for example ("b", "c") for `record.meta.b['c']`."""
    for at in _places(tokens, column):
        path: list[str] = []
        place = at
        while True:
            match tokens[place : place + 4]:
                case [".", name, *rest] if name.isidentifier() and rest[:1] != ["("]:
                    path.append(name)
                    place += 2
                case ["[", name, "]", *_] if name[0] in "'\"":
                    path.append(name[1:-1])
                    place += 3
                case _:
                    break
        if path:
            yield tuple(path)


def _places(tokens: Sequence[str], column: str) -> Iterator[int]:
    """Yield the index of the token after each `record.column`."""
    for at, name in enumerate(tokens):
        if name != "record" or (at and tokens[at - 1] == "."):
            continue
        if tokens[at + 1 : at + 3] == [".", column]:
            yield at + 3
        elif tokens[at + 1 : at + 2] == ["["] and tokens[at + 2 : at + 3] in ([f"'{column}'"], [f'"{column}"']):
            yield at + 4


def _reads_inside(tokens: Sequence[str], column: str) -> bool:
    """Return whether the expression reads an element of the document by its number."""
    return any(tokens[at : at + 1] == ["["] for at in _places(tokens, column))


def _document(paths: Sequence[Path], leaf: Any) -> dict[str, Any]:
    """Return a document that has all these members, each with the value `leaf`."""
    document: dict[str, Any] = {}
    for path in sorted(paths, key=len):
        inner = document
        for name in path[:-1]:
            deeper = inner.get(name)
            if not isinstance(deeper, dict):
                deeper = inner[name] = {}
            inner = deeper
        inner[path[-1]] = leaf
    return document
