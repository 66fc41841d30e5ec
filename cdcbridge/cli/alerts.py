"""`cdcbridge alerts …`: test the destinations of alerts, list what is open, and silence rules."""

from __future__ import annotations

import datetime as dt
from typing import Any

import click

from cdcbridge.alerts import store as queue
from cdcbridge.alerts.notices import KINDS
from cdcbridge.alerts.tracking import Open
from cdcbridge.cli.context import DURATION, App, as_json, pass_app, print_json, print_line, print_table, say
from cdcbridge.config.alerts import RULES, Alerts
from cdcbridge.database import database_place
from cdcbridge.errors import UsageError
from cdcbridge.words import did_you_mean


@click.group()
def alerts() -> None:
    """Tell people when something is wrong: test, list, silence."""


def needs_apprise(error: ModuleNotFoundError) -> UsageError:
    """Return the error for a client library of the alerts that is not installed."""
    if error.name is None or error.name.startswith("cdcbridge"):
        raise error
    return UsageError(
        f"`alerts` needs the Python package {error.name}, which is not installed",
        hint="pip install 'cdcbridge[alerts]'",
    )


@alerts.command("test")
@click.argument("name", required=False)
@as_json
@pass_app
def test_command(app: App, name: str | None, as_json: bool) -> int:
    """Send a test message, and show each answer.

    It is sent to each destination, or to the one that is named. Exits with 1 if one of them did not accept it. Of a
    URL, only the kind of service is shown.


    \b
    Examples:
      cdcbridge alerts test
      cdcbridge alerts test oncall
    """
    settings = _settings(app)
    names = [one.name for one in settings.to]
    if name is not None and name not in names:
        raise UsageError(
            f"{app.path} has no destination {name!r}{did_you_mean(name, names)}; it has: {', '.join(names)}"
        )
    try:
        from cdcbridge.alerts.trial import try_out
    except ModuleNotFoundError as error:
        raise needs_apprise(error) from error
    source = app.config.source.name or database_place(app.config.source_dsn)
    answers = []
    for answer in try_out(settings, name, source):
        answers.append(answer)
        if not as_json:
            click.echo(f"{answer.destination}: {answer.service}: {answer.error or 'ok'}")
    if as_json:
        print_json([answer.as_json() for answer in answers])
    return 1 if any(answer.error for answer in answers) else 0


def _settings(app: App) -> Alerts:
    if app.config.alerts is None:
        raise UsageError(f"{app.path} has no section `alerts`", hint="docs/ALERTS.md shows one.")
    return app.config.alerts


@alerts.command("list")
@as_json
@pass_app
def list_command(app: App, as_json: bool) -> None:
    """Show open alerts, silences and undelivered messages.

    \b
    SINCE      when the condition was found first
    NOTIFIED   when a notification was made last; -: not yet, or in a silence
    ATTEMPTS   how often a URL was tried, with its last error
    """
    with app.store() as store:
        found, silences, waiting = queue.open_conditions(store), queue.silences(store), queue.undelivered(store)
    began = [one for one in found if one.began_at is not None]
    if as_json:
        print_json(
            {
                "open": [_as_json(one) for one in began],
                "silences": [{"rule": rule, "until": until} for rule, until in silences.items()],
                "undelivered": waiting,
            }
        )
        return
    print_table(
        ("SEVERITY", "RULE", "SUBJECT", "SINCE", "NOTIFIED", "TEXT"),
        [(o.severity, o.key.rule, o.key.subject, o.since, o.notified_at, o.text) for o in began],
        empty="no alert is open",
    )
    if silences:
        click.echo()
        print_table(("SILENCED", "UNTIL"), list(silences.items()))
    if waiting:
        click.echo()
        rows = [row for one in waiting for row in _attempts(one)]
        print_table(("DESTINATION", "SERVICE", "NOTIFICATION", "CREATED", "ATTEMPTS", "ERROR"), rows)


def _as_json(one: Open) -> dict[str, Any]:
    return {
        "rule": one.key.rule,
        "subject": one.key.subject,
        "severity": one.severity,
        "text": one.text,
        "query": one.query or None,
        "since": one.since,
        "notified_at": one.notified_at,
    }


def _attempts(waiting: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return a row for each URL that was tried in vain, or one row if none was tried yet."""
    title = f"{KINDS[waiting['kind']]}{waiting['title']}"
    failed = [one for one in waiting["deliveries"] if not one["delivered"]]
    tried = [(one["service"], one["attempts"], one["error"]) for one in failed] or [(None, 0, None)]
    return [(waiting["destination"], service, title, waiting["created_at"], n, why) for service, n, why in tried]


@alerts.command()
@click.argument("rule")
@click.option("--for", "seconds", type=DURATION, required=True, help="How long, for example 2h. 0 ends the silence.")
@pass_app
def silence(app: App, rule: str, seconds: float) -> None:
    """Make no notifications of a rule for some time.

    A condition that still holds afterwards is notified then. The end of a condition that was notified before is told
    even in a silence.


    \b
    Examples:
      cdcbridge alerts silence dead_letters --for 2h
      cdcbridge alerts silence dead_letters --for 0      end the silence
    """
    if rule not in RULES:
        raise UsageError(f"there is no rule {rule!r}{did_you_mean(rule, RULES)}; the rules are: {', '.join(RULES)}")
    with app.store() as store:
        until = queue.silence(store, rule, seconds)
    if seconds:
        say(f"no notifications of {rule} until {until.astimezone(dt.UTC):%Y-%m-%d %H:%M:%S} UTC")
    else:
        say(f"{rule} makes notifications again")
    print_line({"rule": rule, "until": until})


COMMANDS = (alerts,)
