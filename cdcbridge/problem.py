"""Problems and alarms, with the fix of each problem, for people and programs.

The module has plain data only. Never looks for problems itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from cdcbridge.errors import CheckFailed

Severity = Literal["error", "warning"]
# A fix is SQL if it matches. A sentence begins with a capital letter, and a shell command with another word.
_SQL: Final = re.compile(
    r"(--|(alter|comment|create|delete|drop|grant|insert|revoke|select|set|update)\b.*;)", re.DOTALL
)
_LONGEST: Final = 500  # characters of a fix; a longer one would be hard to read inside a message


@dataclass(slots=True, frozen=True)
class Problem:
    """A problem that a check has found.

    Attributes:
        code: The kind of the problem, for programs.
        severity: refuse() raises for an error, and not for a warning.
        object: The name of the thing that has the problem, for example `public.orders`.
        message: The problem, for people.
        fix: The SQL that fixes the problem, or a sentence if SQL cannot fix it.
    """

    code: str
    severity: Severity
    object: str
    message: str
    fix: str

    @property
    def brief(self) -> str:
        """The fix in one line, or the command that prints the fix if it is long."""
        lines = self.fix.count("\n") + 1
        if lines == 1 and len(self.fix) <= _LONGEST:
            return self.fix
        size = f"{lines} lines" if lines > 1 else f"{len(self.fix)} characters"
        return f"`cdcbridge check --fixes` prints the SQL ({size})"


@dataclass(slots=True, frozen=True)
class Alarm:
    """A slot or a consumer that needs attention.

    Attributes:
        code: The stable name of the alarm, for programs.
        slot: The name of the slot, or '' for an alarm about a consumer.
        message: The alarm, for people.
        consumer: The name of the consumer, or None for an alarm about a slot.
    """

    code: str
    slot: str
    message: str
    consumer: str | None = None


def script(found: Iterable[Problem]) -> str:
    """Return all fixes as a script for psql, each after the problems that it fixes.

    A fix that is not SQL becomes a comment.
    """
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
    """Raise CheckFailed if any problem is an error. The message contains all errors."""
    errors = [problem for problem in found if problem.severity == "error"]
    if errors:
        raise CheckFailed("\n".join(f"{p.object}: {p.message}\n    fix: {p.brief}" for p in errors), errors)
