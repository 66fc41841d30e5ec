"""Commands about the bridge itself: demo, check, migrate, run, decode, config, completion."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from typing import Any, BinaryIO

import click
import orjson
import structlog
import yaml
from click.shell_completion import get_completion_class

from cdcbridge import __version__
from cdcbridge.background import log_failure
from cdcbridge.bridge.child_process import ChildProcess, MirrorSupervisor, SinkSupervisor
from cdcbridge.bridge.supervisor import Bridge
from cdcbridge.changes.wal2json_file import decode_file
from cdcbridge.checks.server import check, refuse_unconvertible
from cdcbridge.cli.alerts import needs_apprise
from cdcbridge.cli.context import App, as_json, pass_app, print_json, print_line, say
from cdcbridge.cli.schema import file_schema
from cdcbridge.cli.screen import width, wrapped
from cdcbridge.cli.serve import require_web
from cdcbridge.config import Alerts, Config, load
from cdcbridge.database import connect_store, database_place
from cdcbridge.demo.run import demo as run_demo
from cdcbridge.errors import DecodeError, NotLeader, UsageError
from cdcbridge.mirrors.check import check_mirrors
from cdcbridge.observe.health import Health
from cdcbridge.observe.lag_watcher import Watcher
from cdcbridge.observe.metrics import Metrics
from cdcbridge.observe.monitor import HttpServer, Watchdog
from cdcbridge.problem import Problem, script
from cdcbridge.routing.copy_format import encode_data
from cdcbridge.store.migrate import migrate as migrate_store

log = structlog.get_logger()


@click.command()
def demo() -> None:
    """Show a bridge at work on an embedded PostgreSQL.

    It starts a server and a bridge, makes changes, receives and acks messages, and prints the lag.


    It needs no database and removes everything at the end. All that it prints was read back from the server.
    """
    run_demo()


@click.command("check")
@as_json
@click.option("--fixes", is_flag=True, help="Print all fixes as one script for psql.")
@pass_app
def check_command(app: App, as_json: bool, fixes: bool) -> int:
    """List every reason why `run` would fail, with its fix.

    Exits with 2 if one of them is an error.


    \b
    Examples:
      cdcbridge check
      cdcbridge check --fixes > fixes.sql
    """
    problems = [*check(app.config), *check_mirrors(app.config), *_alert_problems(app.config)]
    ok = not any(problem.severity == "error" for problem in problems)
    if fixes and not as_json:
        click.echo(script(problems), nl=False)
        say("ok" if ok else "not ok")
    elif as_json:
        print_json({"ok": ok, "problems": [_problem(problem) for problem in problems]})
    else:
        for problem in problems:
            colour = "red" if problem.severity == "error" else "yellow"
            text = wrapped(f"{problem.severity}: {problem.object}: {problem.message}", width(), rest="    ")
            click.echo(click.style(problem.severity, fg=colour) + text.removeprefix(problem.severity))
            click.echo(f"    fix: {problem.brief}")
        click.echo("ok" if ok else "not ok")
    return 0 if ok else 2


def _alert_problems(config: Config) -> list[Problem]:
    """Return the reason why `run` would refuse the section `alerts`, if there is one."""
    if config.alerts is None:
        return []
    try:
        from cdcbridge.alerts.delivery import urls

        urls(config.alerts)
    except ModuleNotFoundError as error:
        refused = needs_apprise(error)
    except UsageError as error:
        refused = error
    else:
        return []
    return [Problem("alerts_unusable", "error", "alerts", str(refused), refused.hint or "")]


def _problem(problem: Problem) -> dict[str, str]:
    fields = ("code", "severity", "object", "message", "fix")
    return {field: getattr(problem, field) for field in fields}


@click.command()
@as_json
@pass_app
def migrate(app: App, as_json: bool) -> None:
    """Bring the store's schema to this version.

    `run` does the same when it starts.
    """
    schema = app.config.store.schema_
    with connect_store(app.config.store_dsn, schema, "cdcbridge migrate") as connection:
        refuse_unconvertible(connection)
        done = migrate_store(connection, schema, downgrade=True)
    if as_json:
        print_json({"schema": schema, "before": done.before, "after": done.after, "code_replaced": done.code_replaced})
    elif done.before == done.after and not done.code_replaced:
        click.echo(f"schema {schema} is at version {done.after} already")
    else:
        click.echo(f"schema {schema}: version {done.before} → {done.after}")


@click.command()
@click.option("--no-wait", is_flag=True, help="Exit with 1 if another bridge leads, instead of standing by.")
@click.option(
    "--consistent",
    is_flag=True,
    help="On the first start, fill consumers with start: snapshot from the slot's own snapshot, before streaming:"
    " faster; holds one snapshot, and all WAL, until that is done.",
)
@click.option("--no-sinks", is_flag=True, help="Leave the sinks to `cdcbridge sinks run`.")
@click.option("--no-mirrors", is_flag=True, help="Leave the mirrors to `cdcbridge mirror run`.")
@click.option("--serve", is_flag=True, help="Also answer the HTTP API, in a process of its own.")
@pass_app
def run(app: App, no_wait: bool, consistent: bool, no_sinks: bool, no_mirrors: bool, serve: bool) -> None:
    """Run the bridge.

    It migrates the store, applies the file's consumers, and streams changes until SIGTERM or SIGINT.

    While another bridge leads, it waits as a standby. While a server is away, it keeps trying. Sinks have a process of
    their own, which `run` starts again whenever it ends. Mirrors have one as well, and so has the API with `--serve`.
    """
    config = app.config
    if serve:
        require_web()
    health = Health()
    bridge = Bridge(config, wait=not no_wait, reload=lambda: load(app.path), consistent=consistent, health=health)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: bridge.stop())
    name = config.source.name or database_place(config.source_dsn)
    metrics = Metrics(health, __version__, name, config.source.slot)
    threading.excepthook = log_failure
    with ExitStack() as beside:
        _serve(config, health, metrics, beside)
        beside.enter_context(Watchdog(health))
        watcher = beside.enter_context(Watcher(config, metrics))
        if not no_sinks:
            beside.enter_context(SinkSupervisor(app.path))
        if not no_mirrors:
            beside.enter_context(MirrorSupervisor(app.path))
        if serve:
            beside.enter_context(ChildProcess(app.path, "api", ["serve"]))
        with ExitStack() as last:
            if config.alerts is not None:
                _alert(config, config.alerts, watcher, health, metrics, last)
            bridge.run()


def _alert(config: Config, alerts: Alerts, watcher: Watcher, health: Health, metrics: Metrics, last: ExitStack) -> None:
    """Start the threads of the alerts. If the bridge ends with an error, they tell people before the program ends."""
    try:
        from cdcbridge.alerts.alerting import Alerting
    except ModuleNotFoundError as error:
        raise needs_apprise(error) from error
    name = config.source.name or database_place(config.source_dsn)
    alerting = last.enter_context(Alerting(config, alerts, name, watcher, health, metrics))

    def ended(_kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, NotLeader):
            alerting.bridge_ended(error)

    last.push(ended)


def _serve(config: Config, health: Health, metrics: Metrics, beside: ExitStack) -> None:
    """Start the HTTP server, unless the configuration turns it off.

    If the default address cannot be used, log a warning and continue without HTTP: the user did not ask for it. An
    address that the configuration gives must work, so that one raises UsageError.
    """
    if config.http is None:
        return
    try:
        server = beside.enter_context(HttpServer(config.http.address, health, metrics))
    except UsageError as error:
        if "http" in config.model_fields_set:
            raise
        log.warning("http.unavailable", error=str(error), hint=error.hint)
    else:
        log.info("http.listening", listen=config.http.listen if server.port == config.http.address[1] else server.port)


@click.command()
@click.option(
    "--plugin",
    type=click.Choice(["wal2json"]),
    required=True,
    expose_value=False,
    help="The plugin of the input.",
)
@click.argument("file", type=click.File("rb"), default="-")
def decode(file: BinaryIO) -> None:
    """Turn output of wal2json into messages of cdcbridge.

    FILE, or stdin, has wal2json's format 1 or 2. Each message is printed as a JSON line.


    \b
    Example:
      pg_recvlogical -d app --slot=s --start -o format-version=2 -o include-lsn=1 -f - |
        cdcbridge decode --plugin wal2json
    """
    try:
        for row in decode_file(file):
            data = orjson.Fragment(encode_data(row.op, row.record, row.old, ()))
            print_line(
                {"topic": row.topic, "key": row.key, "data": data, "commit_lsn": row.commit_lsn, "ordinal": row.ordinal}
            )
    except DecodeError as error:
        raise UsageError(f"{file.name}: {error}") from None


@click.group()
def config() -> None:
    """Check and show the configuration."""


@config.command("check")
@pass_app
def config_check(app: App) -> None:
    """Report mistakes in the file, without connecting."""
    mirrors = len(app.config.mirrors)
    count = len(app.config.consumers) - mirrors
    also = f", {mirrors} mirror{'' if mirrors == 1 else 's'}" if mirrors else ""
    click.echo(f"{app.path}: ok, {count} consumer{'' if count == 1 else 's'}{also}")


@config.command("show")
@as_json
@pass_app
def config_show(app: App, as_json: bool) -> None:
    """Show the configuration with defaults and environment.

    Secrets are masked.
    """
    shown = _masked(app.config.model_dump(mode="json", by_alias=True))
    mirrors = {mirror["name"] for mirror in shown["mirrors"]}
    shown["consumers"] = [consumer for consumer in shown["consumers"] if consumer["name"] not in mirrors]
    if as_json:
        print_json(shown)
    else:
        click.echo(yaml.safe_dump(shown, sort_keys=False).rstrip())


@config.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the file, for editors."""
    print_json(file_schema())


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example:
      cdcbridge completion bash > ~/.local/share/bash-completion/completions/cdcbridge
    """
    root = context.find_root()
    made = get_completion_class(shell)
    if made is not None:
        click.echo(made(root.command, {}, "cdcbridge", "_CDCBRIDGE_COMPLETE").source())


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: "**********" if key == "dsn" and item else _masked(item) for key, item in value.items()}
    return [_masked(item) for item in value] if isinstance(value, list) else value


COMMANDS = (demo, check_command, migrate, run, decode, config, completion)
