"""Print errors for people: several problems as a list with bullets, and mistakes in the command line in plain words.

Everything is printed on stderr.
"""

from __future__ import annotations

import re
import sys
from typing import Final

import click

from cdcbridge.cli.screen import bullets, width, wrapped
from cdcbridge.errors import CdcbridgeError, CheckFailed, ConfigError
from cdcbridge.words import did_you_mean, one_of

_UNKNOWN_CONSUMER: Final = re.compile(r"no consumer named '([^']+)'")
_RANGE: Final = re.compile(r"(.+) is not in the range x(>=|<=|>|<)([\d.]+)\.")
_BOUNDS: Final = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
_NUMBERS: Final = {"integer": "a whole number", "float": "a number", "integer range": "a whole number"}


def complain(error: CdcbridgeError) -> None:
    """Print an error on stderr, with its hint."""
    text = str(error)
    several: list[str] = []
    if isinstance(error, CheckFailed):
        several = [f"{p.object}: {p.message}\nfix: {p.brief}" for p in error.problems]
    elif isinstance(error, ConfigError):
        several = text.splitlines()
    if len(several) > 1:
        click.echo(f"error: {len(several)} problems", err=True)
        bullets(several, err=True)
    else:
        _print("error", text)
    hint = _hint(text, error.hint)
    if hint:
        _print("hint", hint)


def _hint(text: str, hint: str | None) -> str | None:
    """Return the hint.

    If it lists the known consumers, and the error names an unknown one, "Did you mean …?" with the most similar name is
    put before it.
    """
    match = _UNKNOWN_CONSUMER.search(text)
    if match is None or not hint or not hint.startswith("Known: "):
        return hint
    known = re.findall(r"[\w.-]+", hint.removeprefix("Known: "))
    near = did_you_mean(match[1], known).removeprefix("; d")
    return f"D{near} {hint}" if near else hint


def complain_of_usage(error: click.ClickException) -> None:
    """Print the mistake in the command line, and the command that prints its help."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    _print("error", _words(error))
    context = getattr(error, "ctx", None)
    if context is not None:
        _print("hint", f"{context.command_path} --help")


def _words(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    if isinstance(error, click.NoSuchOption):
        near = error.possibilities or []
        return f"no such option: {error.option_name}" + (f"; did you mean {one_of(sorted(near))}?" if near else "")
    if isinstance(error, click.MissingParameter):
        return f"{_name(error.param)} is missing"
    if isinstance(error, click.BadParameter):
        return f"{_name(error.param)}: {_bad_value(error)}"
    text = error.format_message().rstrip(".")
    if match := re.match(r"No such command ['\"]([^'\"]*)['\"]", text):
        group = context.command if context is not None else None
        commands = group.list_commands(context) if context and isinstance(group, click.Group) else []
        return f"No such command {match[1]!r}{did_you_mean(match[1], commands)}"
    if match := re.match(r"Got unexpected extra arguments? \((.*)\)", text):
        return f"too many arguments: {match[1]}"
    if match := re.match(r"Option '(.*)' requires an argument", text):
        return f"{match[1]} needs a value"
    return text


def _name(parameter: click.Parameter | None) -> str:
    if parameter is None:
        return "a value"
    if isinstance(parameter, click.Argument):
        return (parameter.metavar or str(parameter.name).upper()).strip("[].")
    return parameter.opts[-1] if parameter.opts[-1].startswith("--") else " / ".join(parameter.opts)


def _bad_value(error: click.BadParameter) -> str:
    text = error.message
    kind = error.param.type if error.param is not None else None
    if match := _RANGE.fullmatch(text):
        return f"{match[1]} is out of range: write {_BOUNDS[match[2]]} {match[3]}"
    if isinstance(kind, click.Choice):
        choices = [str(choice) for choice in kind.choices]
        given = text.partition("'")[2].rpartition("' is not")[0]
        return f"{given!r} is not {one_of(choices)}{did_you_mean(given, choices)}"
    if match := re.fullmatch(r"'(.*)' is not a valid ([\w ]+?)( range)?\.", text):
        return f"{match[1]!r} is not {_NUMBERS.get(match[2], f'a {match[2]}')}"
    return text.rstrip(".")


def _print(what: str, text: str) -> None:
    click.echo(wrapped(f"{what}: {text}", width(sys.stderr), rest="    "), err=True)
