"""`cdcbridge sinks …`: deliver messages to other systems, and look at these deliveries."""

from __future__ import annotations

import asyncio

import click

from cdcbridge.cli.context import App, as_json, name_argument, pass_app, print_json, print_line
from cdcbridge.cli.screen import width, wrapped
from cdcbridge.cli.sink_words import print_sinks
from cdcbridge.config import load
from cdcbridge.errors import UsageError
from cdcbridge.observe.consumer_lag import consumer_lags
from cdcbridge.observe.sinks import sink_states
from cdcbridge.problem import Problem
from cdcbridge.sinks.check import check_sinks
from cdcbridge.sinks.process import SinkProcess, with_sinks
from cdcbridge.sinks.trial import trial


@click.group()
def sinks() -> None:
    """Deliver messages to brokers, webhooks and files."""


@sinks.command()
@click.argument("names", nargs=-1)
@click.option("--until-stdin-ends", is_flag=True, hidden=True)
@pass_app
def run(app: App, names: tuple[str, ...], until_stdin_ends: bool) -> None:
    """Deliver the messages of the file's consumers that have a sink.

    `cdcbridge run` does the same in a process of its own, unless it is started with `--no-sinks`. Any number of these
    processes may run, on any machine. They share the partitions of each consumer. When one dies, the others take over
    its partitions within five seconds.


    \b
    Examples:
      cdcbridge sinks run              all consumers with a sink
      cdcbridge sinks run events       only this one
    """
    with_sinks(app.config, names)
    process = SinkProcess(app.config, lambda: load(app.path), names)
    asyncio.run(process.run(until_stdin_ends=until_stdin_ends))


@sinks.command("check")
@click.argument("names", nargs=-1)
@as_json
@pass_app
def check_command(app: App, names: tuple[str, ...], as_json: bool) -> int:
    """Reach each destination, and list the problems, each with its fix.

    Exits with 2 if something is missing.
    """
    problems = check_sinks(app.config, with_sinks(app.config, names).values())
    if as_json:
        fields = ("code", "severity", "object", "message", "fix")
        print_json({"ok": not problems, "problems": [{f: getattr(one, f) for f in fields} for one in problems]})
    else:
        for problem in problems:
            _print(problem)
        click.echo("not ok" if problems else "ok")
    return 2 if problems else 0


def _print(problem: Problem) -> None:
    click.echo(wrapped(f"{problem.severity}: {problem.object}: {problem.message}", width(), rest="    "))
    if problem.fix:
        click.echo(f"    fix: {problem.brief}")


@sinks.command("list")
@as_json
@pass_app
def list_command(app: App, as_json: bool) -> None:
    """Show the destination, state and counters of each sink.

    \b
    DELIVERED   messages that the target has acknowledged
    FAILED      messages that became dead letters
    BEHIND      messages that are not delivered yet
    OLDEST      how long the oldest of these has waited
    """
    with app.store() as store:
        found = sink_states(store, app.config, consumer_lags(store))
    if as_json:
        print_json([one.as_json() for one in found])
        return
    print_sinks(found, empty=f"{app.path} has no consumer with a sink")


@sinks.command()
@name_argument
@pass_app
def pause(app: App, name: str) -> None:
    """Deliver nothing more for a consumer, until `resume`.

    Its messages wait in the store. The sink stops within about a second.
    """
    _pause(app, name, paused=True)


@sinks.command()
@name_argument
@pass_app
def resume(app: App, name: str) -> None:
    """Deliver the messages of a paused consumer again."""
    _pause(app, name, paused=False)


def _pause(app: App, name: str, *, paused: bool) -> None:
    with_sinks(app.config, (name,))
    with app.store() as store:
        row = store.execute(
            "update consumers set paused = %s, updated_at = now() where name = %s returning name", (paused, name)
        ).fetchone()
    if row is None:
        raise UsageError(f"the store has no consumer {name!r} yet", hint="`cdcbridge run` adds it.")
    print_line({"paused" if paused else "resumed": name})


@sinks.command("test")
@name_argument
@click.argument("seqs", nargs=-1, type=int)
@pass_app
def test_command(app: App, name: str, seqs: tuple[int, ...]) -> None:
    """Print the messages that would be sent, and send nothing.

    Without SEQ, it shows the last five messages of the log that the consumer takes. Each line has the destination, the
    headers and the body of a message, or the reason why it would become a dead letter.


    \b
    Examples:
      cdcbridge sinks test events
      cdcbridge sinks test events 1742 1743
    """
    consumer = with_sinks(app.config, (name,))[name]
    with app.store() as store:
        for line in trial(store, app.config, consumer, seqs):
            print_line(line)


COMMANDS = (sinks,)
