"""One case for each type of sink: the fixture of its server, and the class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.sinks.case import Case
from tests.sinks.cases.file import FileCase

CASES: dict[str, tuple[str | None, Callable[..., Case]]] = {
    "file": (None, FileCase),
}
