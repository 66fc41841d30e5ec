"""What is wrong and how to mend it, for people and programs. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cdcbridge.errors import CheckFailed

Severity = Literal["error", "warning"]


@dataclass(slots=True, frozen=True)
class Problem:
    """One thing found. `fix` is SQL where it is SQL."""

    code: str
    severity: Severity
    object: str
    message: str
    fix: str


def refuse(found: list[Problem]) -> None:
    """Raises CheckFailed if any problem is an error, with all of them in the message."""
    errors = [problem for problem in found if problem.severity == "error"]
    if errors:
        raise CheckFailed("\n".join(f"{p.object}: {p.message}\n    fix: {p.fix}" for p in errors), errors)
