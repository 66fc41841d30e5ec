"""The events that the program logs, read from its source: each name with the levels at which it is logged. Pure."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

_EVENT = re.compile(r"[a-z_]+\.[a-z_]+")
# The level of each method. `log.exception` adds the traceback to an error.
_LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}
# Functions that note an event for a later log line, with the level of that line.
_NOTED = {"_refuse": "warning"}


def events(folder: Path) -> dict[str, set[str]]:
    """Return the levels of each event, for example `{"bridge.retry": {"warning"}, ...}`."""
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for level, argument in _logged(tree):
            for name in _names(argument, tree):
                found.setdefault(name, set()).add(level)
    return found


def _logged(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            of = ast.unparse(node.func.value)
            if of == "log" and node.func.attr in _LEVELS:
                yield _LEVELS[node.func.attr], node.args[0]
            elif node.func.attr in _NOTED:
                yield _NOTED[node.func.attr], node.args[0]


def _names(argument: ast.expr, tree: ast.Module) -> Iterator[str]:
    """Yield the event names in an argument. A variable has those of the values that the module assigns to it."""
    if isinstance(argument, ast.Name):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [argument.id]:
                yield from _names(node.value, tree)
        return
    for node in ast.walk(argument):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _EVENT.fullmatch(node.value):
            yield node.value
