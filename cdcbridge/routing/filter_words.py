"""Explain errors of CEL in plain words: which part of the filter is wrong, and the text to write instead.

The library reports `token recognition error at: '= '`, but people need "write == to compare: record.status == 'paid'".
The module is pure. It must never raise: where it has no better words, it returns the first line of the library's
message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from cdcbridge.words import one_line

_SYNTAX: Final = re.compile(r"ERROR: <input>:(\d+):(\d+): Syntax error: (.*)")
_EXPECTING: Final = re.compile(r" expecting (\{.*\}|'.*'|<EOF>)$")
_TEXT: Final = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'")
_CONSTANTS: Final = {"null": "null", "none": "null", "nil": "null", "true": "true", "false": "false"}
_IN_SQL: Final = {
    "lower": "CEL has no lower(): compare with each spelling, or `record.name.matches('(?i)^paid$')`",
    "upper": "CEL has no upper(): compare with each spelling, or `record.name.matches('(?i)^paid$')`",
    "length": "write size(…) instead of length(…)",
    "len": "write size(…) instead of len(…)",
    "coalesce": "write `record.a != null ? record.a : 0` instead of coalesce(record.a, 0)",
    "now": "a filter has no clock: compare columns with each other or with constants",
}


def syntax_words(source: str, tokens: Sequence[str], error: str) -> str:
    """Explain in one line why CEL cannot parse an expression.

    Args:
        source: The expression.
        tokens: Its tokens.
        error: The library's message.
    """
    for said in (*_open_quotes(source), *_habits(source, tokens), *_brackets(source)):
        return one_line(said)
    found = _SYNTAX.search(error)
    if found is None:
        return (error.splitlines() or ["unknown"])[0]
    line, column, text = int(found[1]), int(found[2]), _EXPECTING.sub("", found[3])
    lines = source.splitlines() or [""]
    rest = lines[min(line, len(lines)) - 1][column - 1 :].split(" ")[0]
    place = f"line {line}, column {column}" if len(lines) > 1 else f"column {column}"
    if not source.strip():
        return "the filter is empty: write for example record.status == 'paid'"
    if "<EOF>" in text or not rest:
        return f"the filter ends too early, at {place}: something is missing after {source.rstrip()[-20:]!r}"
    return f"{rest!r} is not expected at {place} ({text})"


def variable_words(name: str, known: Sequence[str]) -> str:
    """Explain what to write instead of a variable that filters do not have.

    Args:
        name: The unknown variable.
        known: The variables that a filter knows.
    """
    if name.lower() in _CONSTANTS:
        return f"unknown variable {name!r}: write {_CONSTANTS[name.lower()]}"
    return f"unknown variable {name!r}. A filter knows {', '.join(known)}. A column is record.{name}"


def function_words(name: str) -> str:
    """Explain what to write instead of a function that CEL does not have."""
    if name.lower() in _IN_SQL:
        return f"unknown function {name!r}: {_IN_SQL[name.lower()]}"
    return f"unknown function {name!r}"


def _habits(source: str, tokens: Sequence[str]) -> Iterator[str]:
    """Yield advice for habits from SQL, Python or JavaScript, for example `=` or `AND`, with the place of the token."""
    ends = _ends(source, tokens)
    for at, written in enumerate(tokens):
        word, after = written.lower(), tokens[at + 1] if at + 1 < len(tokens) else ""
        if at and tokens[at - 1] == ".":
            continue  # the name of a column
        before = _operand(tokens, at)
        after_all = _operand_after(tokens, at + 1)
        said = _HABITS[word](before, after_all, after) if word in _HABITS else None
        if said is None and written == "in" and after == "(":
            said = f"write {before} in ['a', 'b']: a list has square brackets"
        if written in ("IN", "In"):
            said = f"write in instead of {written}"
        if said is not None:
            place = ends[at] - len(written) + 1
            yield f"{said} (column {place})" if "\n" not in source else said


def _equals(before: str, after_all: str, after: str) -> str | None:
    if before in ("==", "!="):
        return f"write {before} instead of {before}="
    if after in ("<", ">"):
        return f"write {'>=' if after == '>' else '<='} instead of ={after}"
    return f"write == to compare: {before} == {after_all}"


def _is(before: str, after_all: str, after: str) -> str:
    del after_all
    if after.lower() == "not":
        return f"write {before} != null instead of IS NOT NULL"
    return f"write {before} == null instead of IS NULL"


def _less(before: str, after_all: str, after: str) -> str | None:
    del after_all
    return f"write != instead of <>: {before} != …" if after == ">" else None


def _doubled(mark: str) -> Callable[[str, str, str], str | None]:
    return lambda _before, _after_all, _after: f"write {mark * 2} instead of {mark}"


def _like(before: str, after_all: str, after: str) -> str:
    del after_all, after
    return f"write {before}.startsWith('x'), .endsWith('x'), .contains('x') or .matches('regex') instead of LIKE"


_HABITS: Final[dict[str, Callable[[str, str, str], str | None]]] = {
    "=": _equals,
    "and": lambda _before, _after_all, _after: "write && instead of AND",
    "or": lambda _before, _after_all, _after: "write || instead of OR",
    "not": lambda _before, after_all, _after: f"write !({after_all or '…'}) instead of NOT",
    "is": _is,
    "<": _less,
    "&": _doubled("&"),
    "|": _doubled("|"),
    "like": _like,
    "ilike": _like,
    "~": _like,
    "between": lambda before, _after_all, _after: f"write {before} >= 1 && {before} <= 9 instead of BETWEEN",
    ";": lambda _before, _after_all, _after: "a filter is one expression: leave out the semicolon",
}


def _open_quotes(source: str) -> Iterator[str]:
    without = _TEXT.sub("", source)
    for quote in "'\"":
        if quote in without:
            at = _TEXT.sub(lambda match: " " * len(match[0]), source).index(quote)
            yield f"the quote {quote} at column {at + 1} is not closed"


def _brackets(source: str) -> Iterator[str]:
    """Yield advice for a doubled quote, which CEL reads as two texts, and for brackets that do not match."""
    if re.search(r"'[^'\n]*''[^'\n]*'", source):
        yield 'write a quote inside a text as \\\' or put the text in "double quotes"'
    without = _TEXT.sub("", source)
    for opened, closed in ("()", "[]", "{}"):
        difference = without.count(opened) - without.count(closed)
        if difference:
            more, less = (opened, closed) if difference > 0 else (closed, opened)
            yield f"the filter has {abs(difference)} {more} more than {less}"


def _ends(source: str, tokens: Sequence[str]) -> list[int]:
    ends, at = [], 0
    for token in tokens:
        at = source.index(token, at) + len(token)
        ends.append(at)
    return ends


def _operand(tokens: Sequence[str], end: int) -> str:
    """Return the column or value before a token, for example record.status."""
    if end >= 3 and tokens[end - 2] == ".":
        return "".join(tokens[end - 3 : end])
    if end >= 4 and tokens[end - 1] == "]" and tokens[end - 3] == "[":
        return "".join(tokens[end - 4 : end])
    return tokens[end - 1] if end else "record.a"


def _operand_after(tokens: Sequence[str], start: int) -> str:
    while start < len(tokens) and tokens[start] == "=":
        start += 1
    if tokens[start + 1 : start + 2] == ["."]:
        return "".join(tokens[start : start + 3])
    return tokens[start] if start < len(tokens) else "…"
