"""The table of sinks that `lag` and `sinks list` print.

Results are printed on stdout, the reasons of failures on stderr.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from cdcbridge.cli.context import print_table, say
from cdcbridge.observe.sinks import SinkState
from cdcbridge.units import human_duration

_HEADINGS: Final = ("SINK", "TYPE", "DESTINATION", "STATE", "DELIVERED", "FAILED", "BEHIND", "OLDEST")


def print_sinks(sinks: Sequence[SinkState], *, empty: str = "") -> None:
    """Print the sinks, and the reason of each one that does not deliver."""
    print_table(_HEADINGS, [_row(one) for one in sinks], empty=empty)
    for one in sinks:
        if one.reason:
            say(f"{one.name}: {one.reason}")


def _row(one: SinkState) -> Sequence[Any]:
    oldest = "-" if one.oldest_seconds is None else human_duration(one.oldest_seconds)
    return (one.name, one.type, one.destination, one.state, one.delivered, one.failed, one.behind, oldest)
