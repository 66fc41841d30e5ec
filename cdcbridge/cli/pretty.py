"""Print messages as readable blocks, for `--pretty`.

Numbers keep every digit. A text can never control the terminal, because unprintable characters are escaped.
"""

from __future__ import annotations

import json
from typing import Any, Final

import click

from cdcbridge.cli.screen import facts
from cdcbridge.words import one_line

pretty_option = click.option("--pretty", is_flag=True, help="A readable block for each message, instead of JSON lines.")
_INDENT: Final = "  "


class _Number(str):
    """A number that keeps the digits of the JSON document."""

    __slots__ = ()


def print_pretty(line: str) -> None:
    """Print a JSON line, which is a message or a dead letter, as a block with an empty line after it."""
    row = json.loads(line, parse_float=_Number, parse_int=_Number)
    data = row.pop("data", None) or {}
    history = row.pop("history", None) or []
    seq, topic, key = (row.pop(name, None) for name in ("seq", "topic", "key"))
    operation = data.pop("op", "") if isinstance(data, dict) else ""
    parts = (f"#{shown(seq)}", shown(topic), shown(operation), f"key {shown(key)}")
    click.echo(click.style(" ".join(part for part in parts if part), bold=True))
    facts([(_INDENT + name, shown(value)) for name, value in row.items() if value is not None])
    _data(data)
    for number, entry in enumerate(history, 1):
        click.echo(f"{_INDENT}history {number}")
        _fields(entry)
    click.echo()


def _data(data: Any) -> None:
    if not isinstance(data, dict):
        click.echo(f"{_INDENT}data  {shown(data)}")
        return
    for name, value in data.items():
        if value is None or value == []:
            continue
        click.echo(f"{_INDENT}{name}")
        _fields(value)


def _fields(value: Any) -> None:
    if isinstance(value, dict):
        facts([(2 * _INDENT + one_line(name), shown(item)) for name, item in value.items()])
    else:
        click.echo(2 * _INDENT + shown(value))


def shown(value: Any, *, inside: bool = False) -> str:
    """Return a value as text on one line. A text that is `inside` a list or a mapping gets quotes."""
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, str):
        return one_line(json.dumps(value, ensure_ascii=False) if inside else value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{one_line(k)}: {shown(v, inside=True)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(shown(item, inside=True) for item in value) + "]"
    return json.dumps(value)  # null, true, false
