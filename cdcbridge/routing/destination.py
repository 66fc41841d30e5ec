"""Fill in the name of a message's destination, for example the Kafka topic `shop.{schema}.{table}`.

A template is text with placeholders in braces. The module is pure and never contacts a destination.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from cdcbridge.words import did_you_mean

PLACEHOLDERS: Final = ("source", "schema", "table", "topic", "op", "key", "partition")
_OF_TABLES: Final = frozenset({"schema", "table"})
_PART: Final = re.compile(r"\{([^{}]*)\}")


class NoDestination(Exception):
    """A message that lacks a value for a placeholder, for example a key. It becomes a dead letter."""


class Destination:
    """A template of destinations, ready to be filled in.

    Args:
        template: The text, for example `shop.{schema}.{table}`.
        shown: The same text without secrets, for messages. None: the template has none.

    Attributes:
        placeholders: The names of the placeholders that the template contains.

    Raises:
        ValueError: The template contains an unknown placeholder or a single brace.
    """

    def __init__(self, template: str, shown: str | None = None) -> None:
        self.template = template
        self._shown = template if shown is None else shown
        names = _PART.findall(template)
        for name in names:
            if name not in PLACEHOLDERS:
                known = ", ".join(f"{{{one}}}" for one in PLACEHOLDERS)
                raise ValueError(
                    f"{{{name}}} is not a placeholder{did_you_mean(name, PLACEHOLDERS)}; there are {known}"
                )
        if "{" in (rest := _PART.sub("", template)) or "}" in rest:
            raise ValueError(f"{self._shown!r} has a brace without a partner; a placeholder is for example {{topic}}")
        self.placeholders = frozenset(names)

    @property
    def of_tables(self) -> bool:
        """True if only changes of tables have a destination, because published messages have no table."""
        return bool(self.placeholders & _OF_TABLES)

    def fill(self, values: Mapping[str, str | None]) -> str:
        """Return the destination of a message.

        Args:
            values: The value of each placeholder. None: the message has no such value.

        Raises:
            NoDestination: A placeholder of the template has no value.
        """
        if not self.placeholders:
            return self.template
        return _PART.sub(lambda part: self._value(values, part[1]), self.template)

    def _value(self, values: Mapping[str, str | None], name: str) -> str:
        value = values.get(name)
        if value is None:
            raise NoDestination(f"the message has no {name}, which {self._shown!r} needs")
        return value
