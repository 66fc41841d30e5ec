"""Find json columns whose documents make a filter fail: null, {}, [], or a member that is null. Pure.

For example, `record.meta.vip == true` fails on a row whose meta is {}. This module must never propose a filter that it
has not tried on these documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from cdcbridge.routing.filters import tokens_of

Path = tuple[str, ...]
_LEAVES: Final = (True, "x", 1, ["x"], {"a": 1}, "2026-01-01T00:00:00Z")


class Failing(NamedTuple):
    """The documents that the filter fails on, as JSON texts, and what to write instead."""

    documents: tuple[str, ...]
    fix: str


def failing_documents(
    source: str, column: str, *, nullable: bool, literals: Sequence[Any], fails: Callable[[str, Any], bool]
) -> Failing | None:
    """Try documents in a json column. None where all work, or where no document is known that does.

    literals: values that the filter compares with.
    fails: whether a filter fails on a row whose column has this document.
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
    for depth, name in enumerate(path):
        above = _written(column, path[:depth])
        yield f"type({above}) == type({{}})"
        yield f"has({_written(column, path[: depth + 1])})" if name.isidentifier() else f"{name!r} in {above}"
    if with_null:
        yield f"{_written(column, path)} != null"


def _written(column: str, path: Path) -> str:
    return "record" + "".join(f".{name}" if name.isidentifier() else f"[{name!r}]" for name in (column, *path))


def _paths(tokens: Sequence[str], column: str) -> Iterator[Path]:
    """The members that the expression reads of the column: ("b", "c") of `record.meta.b['c']`."""
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
    """Where each `record.column` ends."""
    for at, name in enumerate(tokens):
        if name != "record" or (at and tokens[at - 1] == "."):
            continue
        if tokens[at + 1 : at + 3] == [".", column]:
            yield at + 3
        elif tokens[at + 1 : at + 2] == ["["] and tokens[at + 2 : at + 3] in ([f"'{column}'"], [f'"{column}"']):
            yield at + 4


def _reads_inside(tokens: Sequence[str], column: str) -> bool:
    """Whether it takes an element of the document by its number."""
    return any(tokens[at : at + 1] == ["["] for at in _places(tokens, column))


def _document(paths: Sequence[Path], leaf: Any) -> dict[str, Any]:
    """A document that has all these members."""
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
