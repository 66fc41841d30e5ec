"""What is wrong and how to mend it, for people and programs. Plain data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from cdcbridge.errors import CheckFailed

Severity = Literal["error", "warning"]
# Sentences begin with a capital letter, and commands of the shell have other first words.
_SQL: Final = re.compile(
    r"(--|(alter|comment|create|delete|drop|grant|insert|revoke|select|set|update)\b.*;)", re.DOTALL
)
_LONGEST: Final = 500  # characters of a fix that people can read inside a finding


@dataclass(slots=True, frozen=True)
class Problem:
    """One thing found. `fix` is SQL where it is SQL."""

    code: str
    severity: Severity
    object: str
    message: str
    fix: str

    @property
    def brief(self) -> str:
        """The fix in one line. Long SQL is left to `cdcbridge check --fixes`, which prints all of it."""
        lines = self.fix.count("\n") + 1
        if lines == 1 and len(self.fix) <= _LONGEST:
            return self.fix
        size = f"{lines} lines" if lines > 1 else f"{len(self.fix)} characters"
        return f"`cdcbridge check --fixes` prints the SQL ({size})"


@dataclass(slots=True, frozen=True)
class Alarm:
    """`code` is stable, for programs. `slot` is '' for an alarm about a consumer."""

    code: str
    slot: str
    message: str
    consumer: str | None = None


def script(found: Iterable[Problem]) -> str:
    """All fixes as a script for psql: each after the findings that it is for, and a fix that is no SQL as a comment."""
    reasons: dict[str, list[Problem]] = {}
    for problem in found:
        reasons.setdefault(problem.fix, []).append(problem)
    parts = []
    for fix, problems in reasons.items():
        heads = "".join(_comment(f"{p.severity}: {p.object}: {p.message}") for p in problems)
        parts.append(f"{heads}{fix}\n" if _SQL.match(fix) else f"{heads}{_comment(f'no SQL: {fix}')}")
    return "\n".join(parts)


def _comment(text: str) -> str:
    return "".join(f"-- {line}\n" for line in text.splitlines())


def refuse(found: list[Problem]) -> None:
    """Raises CheckFailed if any problem is an error, with all of them in the message."""
    errors = [problem for problem in found if problem.severity == "error"]
    if errors:
        raise CheckFailed("\n".join(f"{p.object}: {p.message}\n    fix: {p.brief}" for p in errors), errors)
