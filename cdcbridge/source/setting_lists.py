"""Read and write server settings that are lists of names, such as output_plugin_libraries.

Lists are read as PostgreSQL reads them: `"a, b"` is one name, `a, b` are two, and a name without quotes is converted to
lower case. This module never connects to a server.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_NAME: Final = re.compile(r'\s*(?:"((?:[^"]|"")*)"?|([^,"]*))\s*(?:,|$)')


def names(shown: str) -> list[str]:
    """Return the names in a setting, given the value that `show` prints."""
    found: list[str] = []
    place = 0
    while place < len(shown) and (match := _NAME.match(shown, place)):
        quoted, bare = match.groups()
        found.append(quoted.replace('""', '"') if quoted is not None else bare.strip().lower())
        place = match.end()
    return found


def meant(given: Iterable[str]) -> list[str]:
    """Return the names that the user meant, even if a whole list, quotes or spaces were written as one name.

    Each name is returned once.
    """
    parts = (part.strip(" \t\n\"'") for name in given for part in name.split(","))
    return list(dict.fromkeys(part for part in parts if part))


def literals(given: Iterable[str]) -> str:
    """Return the list for ALTER SYSTEM SET, with quotes around each name.

    Quotes around the whole list would make it a single name.
    """
    return ", ".join("'" + name.replace("'", "''") + "'" for name in given)
