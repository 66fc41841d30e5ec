"""`cdcbridge filter …`: try a consumer's filter before it is applied."""

from __future__ import annotations

from collections import Counter

import click
import orjson

from cdcbridge.cli.context import App, as_json, name_argument, pass_app, print_json, print_table, say
from cdcbridge.store.filter_trial import Trial, trials, wanted


@click.group("filter")
def filter_group() -> None:
    """Try a consumer's filter on messages of the log."""


@filter_group.command("test")
@name_argument
@click.option("--last", type=click.IntRange(1, 10_000), default=20, show_default=True, metavar="N",
              help="The number of messages to look at, the latest ones.")  # fmt: skip
@as_json
@pass_app
def test_command(app: App, name: str, last: int, as_json: bool) -> None:
    """Show the result of NAME's filter for recent messages.

    The consumer is read from the file, whether it was applied or not. Its tables, topics and operations choose the
    messages. Nothing is delivered, and nothing changes. The log contains only messages that some consumer
    subscribed to: it lacks a table that no consumer has had until now.

    \b
    RESULT is one of
      delivered              the filter gives true
      delivered as a delete  the row matched before, and on_leave is delete
      delivered, undecidable the filter reads a column that the WAL did not carry
      left out               the filter gives false
      dead letter            the filter fails on values that are there

    \b
    Example:
      cdcbridge filter test billing --last 100
    """
    with app.store(pooled=True) as store:
        subscription = wanted(app.config, store, name)
        found = trials(store, subscription, last)
    if as_json:
        print_json([_document(trial) for trial in found])
        return
    if subscription.filter is not None:
        say(f"filter: {subscription.filter.source}")
    print_table(
        ("SEQ", "TOPIC", "KEY", "OP", "RESULT", "WHY"),
        [(t.seq, t.topic, t.key, t.op, t.result, _why(t)) for t in found],
        empty=f"the log has no message of the tables and topics of {name}",
    )
    counts = Counter(trial.result for trial in found)
    if counts:
        say(f"{len(found)} messages: " + ", ".join(f"{count} {result}" for result, count in counts.most_common()))


def _why(trial: Trial) -> str:
    values = ", ".join(f"{name} is {text}" for name, text in trial.values.items())
    return f"{trial.why} ({values})" if values else trial.why


def _document(trial: Trial) -> dict[str, object]:
    return {**trial._asdict(), "values": {name: orjson.Fragment(text) for name, text in trial.values.items()}}


COMMANDS = (filter_group,)
