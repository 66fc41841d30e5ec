"""Find the pure modules of the program, and the modules that a test imports, by reading their imports.

A module is pure if it imports no database, socket, file, thread or terminal, and no module of the program that does. It
may write to the log. For example, `changes/keys.py` is pure and `store/log.py` is not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
IMPURE: Final = frozenset(
    {"psycopg", "prometheus_client", "pydantic_settings", "click", "rich", "tenacity"}
    | {"asyncio", "concurrent", "multiprocessing", "queue", "signal", "subprocess", "threading"}
    | {"http", "os", "pathlib", "select", "selectors", "shutil", "socket", "socketserver", "ssl", "tempfile", "urllib"}
)


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the program by its dotted name, a package by its `__init__.py`."""
    found = {}
    for path in sorted((root / "cdcbridge").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, known: Iterable[str]) -> Iterator[str]:
    """The modules that a source text imports, wherever in it. known: names that may stand behind `from x import`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in known else node.module


def pure(sources: Mapping[str, str]) -> list[str]:
    """The pure ones of these modules that have code: names and source texts."""
    direct = {name: set(imported(source, sources)) for name, source in sources.items()}
    impure = {name for name, found in direct.items() if any(one.split(".")[0] in IMPURE for one in found)}
    while more := {name for name, found in direct.items() if name not in impure and found & impure}:
        impure |= more
    return [name for name, source in sources.items() if name not in impure and len(ast.parse(source).body) > 1]


def unit_test_of(module: str) -> str:
    """`cdcbridge.client._contents` → `test_contents.py`, whatever its folder."""
    return f"test_{module.rpartition('.')[2].strip('_')}.py"
