"""Evaluate consumers' filters: CEL over `op`, `topic`, `key`, `record`, `old` and `meta`, with three answers.

The answers are true, false and undecidable. A filter is undecidable if its result depends on a column that the WAL did
not carry. Then the message is delivered. The library evaluates CEL. This module finds out which columns an expression
reads, and whether the WAL carried them. Source: the CEL language definition, "Syntax" and "Evaluation". The module is
pure.
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
# A bug in the library raises it. It is no subclass of Exception, and must not stop the bridge.
_PANIC: Final = "PanicException"
_MACROS: Final = frozenset({"all", "exists", "exists_one", "map", "filter"})
_NULL_TESTS: Final = frozenset({("==", "null"), ("!=", "null")})


class FilterError(Exception):
    """The error of an expression that failed on values that the message has.

    The message becomes a dead letter.

    Attributes:
        of_types: Whether it fails on each row with values of these types.
    """

    def __init__(self, message: str, *, of_types: bool = False) -> None:
        super().__init__(message)
        self.of_types = of_types


@dataclass(slots=True)
class _Reads:
    """The columns that an expression reads from one map.

    Attributes:
        columns: The columns that it reads by name.
        tested: The columns that it only tests with has().
        whole: Whether it reads the map as a whole, for example `size(record)`.
    """

    columns: set[str] = field(default_factory=set)
    tested: set[str] = field(default_factory=set)
    whole: bool = False


class Filter:
    """One compiled expression.

    Creating one raises ValueError if the source is not valid CEL, or uses an unknown variable or function.
    """

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
        """The variables that the expression reads, out of VARIABLES."""
        return VARIABLES & frozenset(self._program.variables())

    @property
    def record_columns(self) -> frozenset[str] | None:
        """The columns of `record` that the expression reads.

        None: it may read all of them.
        """
        reads = self._reads["record"]
        return None if reads.whole else frozenset(reads.columns | reads.tested)

    def wants(self, environment: dict[str, Any], unchanged: Sequence[str] = ()) -> bool:
        """Return whether the message is to be delivered: the filter is true, or cannot be decided.

        Args:
            environment: A value for each of VARIABLES.
            unchanged: The columns that the WAL did not carry.

        Raises:
            FilterError: The expression failed on values that the message has, reads a value that CEL cannot hold, or
                gives no boolean.
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
            raise self._failure(error, environment) from error
        if not isinstance(result, bool):
            raise FilterError(f"the filter gave {type(result).__name__} {result!r}, not true or false")
        return result or any(
            self._reads[name].whole or absent & self._reads[name].tested for name, absent in missing.items() if absent
        )

    def value(self, environment: dict[str, Any]) -> Any:
        """Return the value of the expression, which need not be a boolean.

        Args:
            environment: A value for each of VARIABLES.

        Raises:
            FilterError: The expression failed on these values, or reads a value that CEL cannot hold.
        """
        if type(environment["record"]) is PartialRow or type(environment["old"]) is PartialRow:
            self._refuse_unreadable(environment)
        try:
            return self._result(environment)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
                raise
            raise self._failure(error, environment) from error

    def _failure(self, error: BaseException, environment: dict[str, Any]) -> FilterError:
        """Return the error that explains which part of the expression failed."""
        field = str(error.args[0]) if isinstance(error, KeyError) else None
        reason = self._reason(str(error).split(". ")[0], environment, field)
        return FilterError(reason.text.replace("\0", "\\0"), of_types=reason.of_types)

    def _result(self, environment: dict[str, Any]) -> Any:
        return self._deciding.execute({**environment, **self._functions} if self._functions else environment)

    def _reason(self, message: str, environment: dict[str, Any], field: str | None) -> Reason:
        """Find the part of the expression that failed, and explain why."""

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
        """Raise FilterError if the expression reads a value that CEL cannot hold.

        Other such values do not matter.
        """
        for name, reads in self._reads.items():
            row = environment[name]
            if type(row) is PartialRow:
                for column, why in row.unreadable.items():
                    if reads.whole or column in reads.columns or column in reads.tested:
                        raise FilterError(f"a value that CEL cannot hold: {name}.{column}: {why}")

    def reads(self, name: str) -> frozenset[str]:
        """Return the columns of `record` or `old` that the expression names.

        Args:
            name: `record` or `old`.
        """
        return frozenset(self._reads[name].columns | self._reads[name].tested)

    def missing(self, environment: dict[str, Any], unchanged: Sequence[str] = ()) -> frozenset[str]:
        """Return the columns without which the filter cannot be decided, for a message that it wants.

        A column is named like `record.amount`, and a map that is read as a whole like `record`. If the filter is true,
        the result is empty.
        """
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
        """Return the columns that the expression reads and the WAL did not carry, by map.

        A map that is read as a whole has the column '*' if the WAL may not have carried all of it.
        """
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
    """Return the tokens of an expression, in order."""
    return [text for text, _ in placed_tokens(source)]


def placed_tokens(source: str) -> list[Token]:
    """Return the tokens of an expression with their places, in order, without comments."""
    return [(match[0], match.start()) for match in _TOKEN.finditer(source) if match.lastgroup != "comment"]


def refuse_on_leave(mode: str, source: str | None, operations: Sequence[str]) -> None:
    """Raise ValueError if `on_leave: delete` could not work: it must be possible to see that a row leaves the filter.

    Args:
        mode: The consumer's mode.
        source: The consumer's filter, or None.
        operations: The operations that the consumer takes.
    """
    if mode == "stream":
        raise ValueError("a stream reads the log as it is: on_leave: delete cannot be given")
    if source is None:
        raise ValueError("on_leave: delete needs a filter that a row can leave")
    if "update" not in operations:
        raise ValueError("on_leave: delete needs the operation update: a row leaves the filter by an update")
    if "old" in Filter(source).variables:
        raise ValueError(
            "on_leave: delete needs a filter over the row, and this one reads `old`: its result depends on the"
            " change, not on the row alone"
        )


def _macro_variables(tokens: list[str]) -> set[str]:
    """Return the variables that macros such as `list.exists(name, …)` introduce."""
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
    """A row without the columns whose values CEL cannot hold, for example a json number 1e400.

    Attributes:
        unreadable: Why each of these columns is left out, by its name.
    """

    def __init__(self, columns: Iterable[tuple[str, str | bytes]]) -> None:
        """Read the columns, given as names and values.

        A value is JSON text.
        """
        super().__init__()
        self.unreadable: dict[str, str] = {}
        for name, text in columns:
            try:
                self[name] = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                self.unreadable[name] = error.msg


def natives(row: Mapping[str, Any] | None) -> Any:
    """Return the row after a conversion to JSON text and back, so that CEL sees inside numeric and json values.

    If a value cannot be read back, the result is a PartialRow.
    """
    try:
        return orjson.loads(orjson.dumps(row))
    except orjson.JSONDecodeError:
        return PartialRow((name, orjson.dumps(value)) for name, value in (row or {}).items())
