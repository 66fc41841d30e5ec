"""Types of parameters for places in the log and for times, the same for every command.

A place is `earliest`, `latest`, a seq or a time. A time is `2026-05-01 10:00+02`, `-1h`, `+10m`, `now` or `yesterday`.
The server reads both, by its own clock, with `time_of()` in SQL. Durations such as `30s` are in context.DURATION.
"""

from __future__ import annotations

import re
from typing import Any, Final

import click

from cdcbridge.cli.context import TextType

PLACE_HELP: Final = "earliest, latest, a seq, or a time: 2026-05-01 10:00+02, -1h (an hour ago), yesterday."
_NEGATIVE: Final = re.compile(r"-\s*\d")


class PlaceType(TextType):
    """A place or a time, without the blank that PlaceCommand puts before it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(value, param, ctx).strip()


PLACE: Final = PlaceType("place")
TIME: Final = PlaceType("time")


class PlaceCommand(click.Command):
    """A command that accepts arguments such as `-1h`, which click would take for options.

    A blank is put before each of these.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [f" {arg}" if _NEGATIVE.match(arg) else arg for arg in args])
