"""Consumers' filters: CEL over `op`, `topic`, `key`, `record`, `old` and `meta`, with three answers.

A filter that reads a column which the WAL did not carry cannot be decided, and an undecided message is delivered.
Pure. CEL itself is the library's; what is ours is knowing which columns an expression reads, and whether the WAL
had them. Source: the CEL language definition, "Syntax" and "Evaluation".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from cdcbridge.routing.cel_library import cel
from cdcbridge.routing.filter_arithmetic import with_one_arithmetic
from cdcbridge.routing.filter_failures import Failed, Reason, failing_node, failure, operation_reason
from cdcbridge.routing.filter_tree import Node, Token, tree_of
from cdcbridge.routing.filter_words import function_words, syntax_words, variable_words

VARIABLES: Final = frozenset({"op", "topic", "key", "record", "old", "meta"})
_FUNCTIONS: Final = frozenset(
    {"size", "contains", "startsWith", "endsWith", "matches", "int", "uint", "double", "string", "bytes", "timestamp"}
    | {"duration", "type", "dyn", "getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear"}
    | {"getHours", "getMinutes", "getSeconds", "getMilliseconds"}
)
_TOKEN: Final = re.compile(
    r"""(?P<string>[rRbB]{0,2}(?:'''(?:\\.|[^\\])*?'''|\"\"\"(?:\\.|[^\\])*?\"\"\"|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"))"""
    r"""|(?P<comment>//[^\n]*)|(?P<name>[A-Za-z_]\w*)"""
    r"""|(?P<number>0[xX][\da-fA-F]+[uU]?|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?\w*|\.\d+(?:[eE][-+]?\d+)?)"""
    r"""|(?P<mark>==|!=|&&|\|\||<=|>=|[^\s])""",
    re.DOTALL,
)
_PANIC: Final = "PanicException"  # what a bug in the library raises: no Exception, and no reason to stop
_MACROS: Final = frozenset({"all", "exists", "exists_one", "map", "filter"})
_NULL_TESTS: Final = frozenset({("==", "null"), ("!=", "null")})


class FilterError(Exception):
    """The expression failed on values that are there: the message becomes a dead letter.

    of_types: it fails on each row with values of these types.
    """

    def __init__(self, message: str, *, of_types: bool = False) -> None:
        super().__init__(message)
        self.of_types = of_types


@dataclass(slots=True)
class _Reads:
    """What an expression reads of one map: columns by name, columns only tested with has(), the map as a whole."""

    columns: set[str] = field(default_factory=set)
    tested: set[str] = field(default_factory=set)
    whole: bool = False


class Filter:
    """One compiled expression. Raises ValueError for what is no usable CEL."""

    def __init__(self, source: str) -> None:
        self.source = source
        placed = placed_tokens(source)
        tokens = self._tokens = [text for text, _ in placed]
        self.tree = tree_of(placed)
        try:
            self._program = cel.compile(source)
        except ValueError as error:
            raise ValueError(syntax_words(source, tokens, str(error))) from error
        unknown = set(self._program.variables()) - VARIABLES - _macro_variables(tokens)
        if unknown:
            raise ValueError(variable_words(min(unknown), sorted(VARIABLES)))
        functions = {name for name in self._program.functions() if name[0] not in "_@!-?"} - _FUNCTIONS
        functions -= {"!_", "-_"}
        if functions:
            raise ValueError(function_words(min(functions)))
        self._parts: dict[Node, Any] = {}
        written, self._functions = with_one_arithmetic(source, self.tree)
        self._deciding = cel.compile(written) if self._functions else self._program
        self._reads = {name: _reads(tokens, name) for name in ("record", "old")}
        self.reads_op = "op" in self._program.variables()

    @property
    def columns(self) -> frozenset[str]:
        """The columns of `record` and `old` that the expression names."""
        return frozenset().union(*(reads.columns | reads.tested for reads in self._reads.values()))

    @property
    def variables(self) -> frozenset[str]:
        """The variables that it reads: some of VARIABLES."""
        return VARIABLES & frozenset(self._program.variables())

    @property
    def record_columns(self) -> frozenset[str] | None:
        """The columns of `record` that it reads; None where it may read all of them."""
        reads = self._reads["record"]
        return None if reads.whole else frozenset(reads.columns | reads.tested)

    def wants(self, environment: dict[str, Any], unchanged: Sequence[str] = ()) -> bool:
        """Whether the message is to be delivered; `unchanged` names columns that the WAL did not carry.

        `environment` has a value for each of VARIABLES. Raises FilterError.
        """
        if type(environment["record"]) is PartialRow or type(environment["old"]) is PartialRow:
            self._refuse_unreadable(environment)
        missing = self._missing(environment, unchanged)
        try:
            result = self._result(environment)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
                raise
            if any(missing.values()):
                return True
            field = str(error.args[0]) if isinstance(error, KeyError) else None
            reason = self._reason(str(error).split(". ")[0], environment, field)
            raise FilterError(reason.text.replace("\0", "\\0"), of_types=reason.of_types) from error
        if not isinstance(result, bool):
            raise FilterError(f"the filter gave {type(result).__name__} {result!r}, not true or false")
        return result or any(
            self._reads[name].whole or absent & self._reads[name].tested for name, absent in missing.items() if absent
        )

    def _result(self, environment: dict[str, Any]) -> Any:
        return self._deciding.execute({**environment, **self._functions} if self._functions else environment)

    def _reason(self, message: str, environment: dict[str, Any], field: str | None) -> Reason:
        """Find the part of the expression that failed, and say why."""

        def evaluate(node: Node) -> Any:
            if node not in self._parts:
                text = node.text(self.source)
                written, functions = with_one_arithmetic(text, tree_of(placed_tokens(text)))
                self._parts[node] = (cel.compile(written), functions)
            program, functions = self._parts[node]
            try:
                return program.execute({**environment, **functions})
            except BaseException as error:
                if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
                    raise
                raise Failed(str(error)) from error

        node = failing_node(self.tree, evaluate) if self.tree else None
        operation = operation_reason(node, self.source, evaluate) if node else None
        return failure(message, self._tokens, environment, field, operation)

    def _refuse_unreadable(self, environment: dict[str, Any]) -> None:
        """Raise FilterError where it reads a value that CEL cannot hold. Others do not matter."""
        for name, reads in self._reads.items():
            row = environment[name]
            if type(row) is PartialRow:
                for column, why in row.unreadable.items():
                    if reads.whole or column in reads.columns or column in reads.tested:
                        raise FilterError(f"a value that CEL cannot hold: {name}.{column}: {why}")

    def reads(self, name: str) -> frozenset[str]:
        """The columns of `record` or of `old` that it names."""
        return frozenset(self._reads[name].columns | self._reads[name].tested)

    def missing(self, environment: dict[str, Any], unchanged: Sequence[str] = ()) -> frozenset[str]:
        """The columns for lack of which a message that it wants is undecidable; none where the filter gives true."""
        lacking = self._missing(environment, unchanged)
        try:
            decided = self._result(environment) is True
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
                raise
            decided = False
        if decided:
            return frozenset()
        return frozenset(
            f"{name}.{column}".replace(".*", "") for name, columns in lacking.items() for column in columns
        )

    def _missing(self, environment: dict[str, Any], unchanged: Sequence[str]) -> dict[str, set[str]]:
        """By map: the columns that the expression reads and the WAL did not carry ('*' where the map is read whole)."""
        record, old, op = environment["record"], environment["old"], environment["op"]
        missing: dict[str, set[str]] = {"record": set(), "old": set()}
        reads = self._reads["record"]
        if record is None or op == "delete":
            carried = record or {}
            missing["record"] = {name for name in reads.columns | reads.tested if name not in carried}
        elif unchanged:
            missing["record"] = (reads.columns | reads.tested) & set(unchanged)
        if reads.whole and (unchanged or op in ("delete", "truncate")):
            missing["record"].add("*")
        reads = self._reads["old"]
        missing["old"] = {name for name in reads.columns | reads.tested if name not in (old or {})}
        if reads.whole and old is not None:
            missing["old"].add("*")
        return missing


def tokens_of(source: str) -> list[str]:
    """The tokens of an expression, in order."""
    return [text for text, _ in placed_tokens(source)]


def placed_tokens(source: str) -> list[Token]:
    """The tokens of an expression with their places, in order, without comments."""
    return [(match[0], match.start()) for match in _TOKEN.finditer(source) if match.lastgroup != "comment"]


def refuse_on_leave(mode: str, source: str | None, operations: Sequence[str]) -> None:
    """Raise ValueError where nobody could tell that a row leaves a consumer's filter."""
    if mode == "stream":
        raise ValueError("a stream reads the log as it is: on_leave: delete cannot be given")
    if source is None:
        raise ValueError("on_leave: delete needs a filter that a row can leave")
    if "update" not in operations:
        raise ValueError("on_leave: delete needs the operation update: a row leaves the filter by an update")
    if "old" in Filter(source).variables:
        raise ValueError(
            "on_leave: delete needs a filter over the row, and this one reads `old`: it tells changes apart, not rows"
        )


def _macro_variables(tokens: list[str]) -> set[str]:
    """The names that `list.exists(name, …)` and its like introduce."""
    return {
        tokens[i + 2] for i, token in enumerate(tokens[:-2]) if token in _MACROS and i and tokens[i - 1 : i] == ["."]
    }


def _reads(tokens: list[str], name: str) -> _Reads:
    reads = _Reads()
    for i, token in enumerate(tokens):
        if token != name or (i and tokens[i - 1] == "."):
            continue
        following = tokens[i + 1 : i + 4]
        if following[:1] == ["."] and len(following) > 1:
            column = following[1]
            if column in _MACROS:
                reads.whole = True
            else:
                (reads.tested if tokens[max(0, i - 2) : i] == ["has", "("] else reads.columns).add(column)
        elif following[:1] == ["["] and following[2:3] == ["]"] and following[1][:1] in "'\"":
            reads.columns.add(following[1][1:-1])
        elif tuple(following[:2]) not in _NULL_TESTS:
            reads.whole = True
    return reads


class PartialRow(dict[str, Any]):
    """A row without the columns whose values CEL cannot hold, for example a json number 1e400, and the reasons."""

    def __init__(self, columns: Iterable[tuple[str, str | bytes]]) -> None:
        """columns: names, and values as JSON texts."""
        super().__init__()
        self.unreadable: dict[str, str] = {}
        for name, text in columns:
            try:
                self[name] = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                self.unreadable[name] = error.msg


def natives(row: Mapping[str, Any] | None) -> Any:
    """The row through JSON text, so that CEL sees what is inside numeric and json values."""
    try:
        return orjson.loads(orjson.dumps(row))
    except orjson.JSONDecodeError:
        return PartialRow((name, orjson.dumps(value)) for name, value in (row or {}).items())
