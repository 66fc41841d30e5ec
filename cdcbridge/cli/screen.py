"""Lay out text for people on a terminal.

Lines are wrapped between words, and never inside a word. In a pipe, lines are not wrapped.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TextIO

import click
from rich.cells import cell_len


def width(stream: TextIO | None = None) -> int | None:
    """Return the columns of the terminal that the stream, or else stdout, is. None for a pipe or a file."""
    stream = sys.stdout if stream is None else stream
    return max(20, shutil.get_terminal_size().columns) if stream is not None and stream.isatty() else None


def wrapped(text: str, columns: int | None, *, first: str = "", rest: str = "") -> str:
    """Break each line of the text between words.

    A word that is longer than a line, such as a URL, stays whole. `first` is put before the first line of the result,
    and `rest` before each other line. Without `columns`, lines are not broken.
    """
    lines: list[str] = []
    for line in text.splitlines() or [""]:
        begin = first if not lines else rest
        if columns is None or len(begin) + len(line) <= columns:
            lines.append(begin + line)
            continue
        inner = len(line) - len(line.lstrip())
        lines += textwrap.wrap(
            line.lstrip(),
            columns,
            initial_indent=begin + " " * inner,
            subsequent_indent=rest + " " * inner,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def column_widths(rows: Sequence[Sequence[str]], columns: int | None) -> list[int] | None:
    """Return the width of each column of a table, or None if a word would have to be broken.

    The columns have two spaces between them. Each is at least as wide as its longest word. The remaining room is given
    to the columns in turn, first to the one that needs the least.
    """
    everything = list(zip(*rows, strict=True))
    wanted = [max(cell_len(cell) for cell in column) for column in everything]
    if columns is None:
        return wanted
    widths = [max(cell_len(word) for cell in column for word in (cell.split() or [""])) for column in everything]
    left = columns - sum(widths) - 2 * (len(widths) - 1)
    if left < 0:
        return None
    for number in sorted(range(len(widths)), key=lambda n: wanted[n] - widths[n]):
        more = min(left, wanted[number] - widths[number])
        widths[number] += more
        left -= more
    return widths


def bullets(texts: Iterable[str], *, err: bool = False) -> None:
    """Print a bullet for each text."""
    columns = width(sys.stderr if err else sys.stdout)
    for text in texts:
        click.echo(wrapped(text, columns, first="  - ", rest="    "), err=err)


def facts(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    most = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        click.echo(wrapped(value, width(), first=f"{name:<{most}}  ", rest=" " * (most + 2)))
