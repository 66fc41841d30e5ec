"""Settings of a server that are lists of names, such as output_plugin_libraries. Pure.

Reads a list as PostgreSQL does: `"a, b"` is one name, `a, b` are two, and a name without quotes is in small letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_NAME: Final = re.compile(r'\s*(?:"((?:[^"]|"")*)"?|([^,"]*))\s*(?:,|$)')


def names(shown: str) -> list[str]:
    """The names in a setting, as `show` prints it."""
    found: list[str] = []
    place = 0
    while place < len(shown) and (match := _NAME.match(shown, place)):
        quoted, bare = match.groups()
        found.append(quoted.replace('""', '"') if quoted is not None else bare.strip().lower())
        place = match.end()
    return found


def meant(given: Iterable[str]) -> list[str]:
    """The names that somebody meant who put a whole list, quotes or spaces into one name. Each once."""
    parts = (part.strip(" \t\n\"'") for name in given for part in name.split(","))
    return list(dict.fromkeys(part for part in parts if part))


def literals(given: Iterable[str]) -> str:
    """The list for ALTER SYSTEM SET: each name has quotes of its own. Around all of them they would make one name."""
    return ", ".join("'" + name.replace("'", "''") + "'" for name in given)
