"""Compare the consumers of the configuration file with those of the store, for `consumers apply`.

The differences can be printed as text or as JSON. Never changes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from cdcbridge.config import Consumer
from cdcbridge.database import Connection, store_errors
from cdcbridge.store.consumers import stored_config
from cdcbridge.units import format_duration, format_size

_DURATIONS: Final = ("visibility_timeout", "retry_delay.initial", "retry_delay.max")
_UNWRITTEN: Final = {"on_leave": "none"}  # the value of a setting that the store does not contain
_SIZES: Final = ("max_message_bytes",)


@dataclass(slots=True, frozen=True)
class Difference:
    """The differences between the consumers of the file and those of the store, by name.

    Attributes:
        added: The settings of each consumer that only the file has.
        changed: For each changed setting its value in the store and its value in the file. None means that it is not
            set.
        unchanged: The consumers that are equal in both.
        left: The consumers that only the store has. `apply` does not remove them.
    """

    added: dict[str, dict[str, Any]]
    changed: dict[str, dict[str, tuple[Any, Any]]]
    unchanged: tuple[str, ...]
    left: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "added": list(self.added),
            "changed": list(self.changed),
            "unchanged": list(self.unchanged),
            "not_in_file": list(self.left),
            "changes": {
                name: {key: {"old": old, "new": new} for key, (old, new) in changes.items()}
                for name, changes in self.changed.items()
            },
        }

    def as_text(self) -> list[str]:
        """Return the lines that `consumers apply` prints, with the settings indented below each name."""
        lines = []
        for name, settings in self.added.items():
            lines.append(f"added: {name}")
            lines += [f"    {key}: {_shown(key, value)}" for key, value in settings.items()]
        for name, changes in self.changed.items():
            lines.append(f"changed: {name}")
            lines += [f"    {key}: {_shown(key, old)} → {_shown(key, new)}" for key, (old, new) in changes.items()]
        lines += [f"unchanged: {name}" for name in self.unchanged]
        lines += [f"not in the file: {name}" for name in self.left]
        return lines


def difference(connection: Connection, consumers: Sequence[Consumer]) -> Difference:
    """Return the differences between the consumers of the file and those of the store."""
    with store_errors():
        rows = connection.execute("select name, mode, config from consumers order by name").fetchall()
    stored = {name: _flat({"mode": mode, **_UNWRITTEN, **config}) for name, mode, config in rows}
    wanted = {c.name: _flat({"mode": c.mode, **_UNWRITTEN, **stored_config(c)}) for c in consumers}
    changed = {name: _changes(stored[name], new) for name, new in wanted.items() if name in stored}
    return Difference(
        {c.name: {"mode": c.mode, **_written(c, wanted[c.name])} for c in consumers if c.name not in stored},
        {name: changes for name, changes in changed.items() if changes},
        tuple(name for name, changes in changed.items() if not changes),
        tuple(name for name in stored if name not in wanted),
    )


def asked_for(before: Consumer, now: Consumer) -> str:
    """Return the settings that differ between two versions of a consumer, with the new values: `mode: fifo`."""
    old, new = (_flat({"mode": c.mode, **_UNWRITTEN, **stored_config(c)}) for c in (before, now))
    return ", ".join(f"{key}: {_shown(key, value)}" for key, (_, value) in _changes(old, new).items())


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [*new, *(key for key in old if key not in new)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _written(consumer: Consumer, settings: dict[str, Any]) -> dict[str, Any]:
    """Return only the settings that the file contains. The rest are defaults."""
    return {key: value for key, value in settings.items() if key.split(".")[0] in consumer.model_fields_set}


def _flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten nested settings, so that each has one name, for example `retry_delay.max`."""
    made: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            made |= _flat(value, f"{above}{key}.")
        else:
            made[f"{above}{key}"] = value
    return made


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "none"
    if key in _DURATIONS:
        return format_duration(value)
    if key in _SIZES:
        return format_size(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
