"""`cdcbridge revert`: undo changes of the source with the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import orjson

from cdcbridge.cli.context import App, as_json, pass_app, print_json, say
from cdcbridge.database.rights import as_owner
from cdcbridge.errors import UsageError
from cdcbridge.revert.messages import TextRow
from cdcbridge.revert.plan import RevertConflict, RevertPlan, UndoStep
from cdcbridge.revert.selection import Selection
from cdcbridge.revert.undo import Revert, apply, prepare, refuse
from cdcbridge.words import one_line

_LONGEST = 80  # characters of a value that are shown


@click.command()
@click.argument("seqs", metavar="[SEQ]...", nargs=-1, type=click.IntRange(1))
@click.option(
    "--transaction", metavar="COMMIT_LSN", help="Undo all changes of this transaction, for example 0/1B5C8C0."
)
@click.option("--table", metavar="TABLE", help="Undo changes of this table, for example public.orders.")
@click.option("--key", metavar="KEY", help="With --table: undo only changes of this key.")
@click.option("--to", type=click.IntRange(0), metavar="SEQ", help="With --key: return to the state after this message.")
@click.option("--from", "begin", metavar="TIME", help="With --table: undo the changes committed at this time or later.")
@click.option("--until", "end", metavar="TIME", help="With --from: undo only changes committed before this time.")
@click.option("--apply", "run", is_flag=True, help="Undo the changes. Without it, the command only shows the plan.")
@click.option("--force", is_flag=True, help="Undo also changes whose columns changed again since.")
@as_json
@pass_app
def revert(
    app: App,
    seqs: Sequence[int],
    transaction: str | None,
    table: str | None,
    key: str | None,
    to: int | None,
    begin: str | None,
    end: str | None,
    run: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Undo changes in the source, in reverse order.

    Without --apply, the command prints a plan and its SQL, and changes nothing. The row before a change
    comes from `old` of its message, or from earlier messages of its key. If the log has neither, the command says so.

    A row whose same columns changed since is a conflict. The command shows all versions of it, and needs --force to
    undo the change.

    --apply undoes everything in one transaction. Its changes reach all consumers, with an annotation.
    It exits with 2 if a change cannot be undone, or is in conflict.

    \b
    Examples:
      cdcbridge revert 17
      cdcbridge revert --transaction 0/1B5C8C0 --apply
      cdcbridge revert --table public.orders --key 42 --to 16
      cdcbridge revert --table public.orders --from -10m --until -5m
    """
    selection = Selection(tuple(sorted(set(seqs))), transaction, table, key, to, begin, end)
    _refuse_mixture(selection)
    with app.store() as store, as_owner(store, "`cdcbridge revert`"):
        found = prepare(app.config, store, selection, force=force)
    if not as_json:
        _show(found)
    refused = bool(found.plan.problems) or (bool(found.plan.conflicts) and not force)
    if run and not refused and _effective(found):
        found.plan.steps = apply(app.config, found, force=force)
    if as_json:
        print_json(_document(found, applied=run and not refused))
    refuse(found.plan, force=force)
    if not as_json:
        _tell_end(found, applied=run)
    return 0


def _refuse_mixture(given: Selection) -> None:
    """Raise UsageError unless the changes are named in exactly one way."""
    ways = [bool(given.seqs), given.transaction is not None, given.table is not None]
    if sum(ways) != 1:
        raise UsageError(
            "name the changes in one way: seqs, --transaction, or --table",
            hint="For example: cdcbridge revert 17. `cdcbridge revert --help` shows the others.",
        )
    if given.table is None:
        others = {"--key": given.key, "--to": given.to, "--from": given.begin, "--until": given.end}
        useless = [name for name, value in others.items() if value is not None]
        if useless:
            raise UsageError(f"{useless[0]} needs --table")
    elif given.to is not None and (given.key is None or given.begin is not None or given.end is not None):
        raise UsageError("--to needs --key, and excludes --from and --until")
    elif given.to is None and given.begin is None:
        raise UsageError(
            "--table needs --key with --to, or --from",
            hint="For example: --table public.orders --key 42 --to 16, or --table public.orders --from -10m",
        )


def _show(found: Revert) -> None:
    """Print the plan for people, and then the SQL."""
    plan = found.plan
    for seq, reason in sorted(plan.problems.items()):
        click.echo(f"seq {seq}: cannot be undone: {reason}")
    for step in plan.steps:
        _show_step(step)
    if plan.steps and not plan.problems:
        click.echo()
        for line in ("begin", *found.script(plan.steps), "commit"):
            click.echo(f"{line};")


def _show_step(step: UndoStep) -> None:
    message = step.change.message
    key = "a row without a key" if message.key is None else f"key {one_line(message.key)}"
    click.echo(f"seq {message.seq} ({message.op}) {message.topic}, {key}: {_ACTS[step.act]}")
    for name, (before, after) in _values(step).items():
        click.echo(f"    {one_line(name)}: {_short(before)} -> {_short(after)}")
    for note in step.notes:
        click.echo(f"    note: {note}")
    if step.conflict is not None:
        _show_conflict(step, step.conflict)


_ACTS = {"insert": "insert it again", "update": "update", "delete": "delete", "nothing": "nothing to do"}


def _show_conflict(step: UndoStep, conflict: RevertConflict) -> None:
    """Print all versions of a row in conflict: before the change, after it, later changes, and now."""
    click.echo(f"    conflict: {conflict.reason}")
    for name, row in _versions(step, conflict).items():
        click.echo(f"      {name}: {_row(row, conflict.columns)}")
    if conflict.later:
        click.echo(f"      later changes: seq {', '.join(map(str, conflict.later))}")


def _versions(step: UndoStep, conflict: RevertConflict) -> dict[str, TextRow | None]:
    before, after = step.change.before, step.change.after
    return {
        "before": None if before is None else before.columns,
        "change": None if after is None else after.columns,
        "now": conflict.now,
    }


def _row(row: TextRow | None, columns: Sequence[str]) -> str:
    if row is None:
        return "no row"
    return ", ".join(f"{one_line(n)}: {_short(value)}" for n, value in row.items() if not columns or n in columns)


def _values(step: UndoStep) -> dict[str, tuple[str | None, str | None]]:
    """Return the values of each column before and after the step."""
    start, result = step.start or {}, step.result or {}
    if step.act in ("nothing", "delete"):
        return {name: (value, None) for name, value in start.items()} if step.act == "delete" else {}
    return {name: (start.get(name), result.get(name)) for name in step.values}


def _short(value: str | None) -> str:
    if value is None:
        return "-"
    text = one_line(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"


def _document(found: Revert, *, applied: bool) -> dict[str, Any]:
    plan: RevertPlan = found.plan
    return {
        "applied": applied and _effective(found) > 0,
        "reverts": found.reverts,
        "problems": [{"seq": seq, "reason": reason} for seq, reason in sorted(plan.problems.items())],
        "steps": [_step_document(step) for step in plan.steps],
        "sql": [] if plan.problems else found.script(plan.steps),
    }


def _step_document(step: UndoStep) -> dict[str, Any]:
    message, conflict = step.change.message, step.conflict
    return {
        "seq": message.seq,
        "topic": message.topic,
        "key": message.key,
        "op": message.op,
        "act": step.act,
        "columns": {
            name: {"from": _fragment(before), "to": _fragment(after)} for name, (before, after) in _values(step).items()
        },
        "notes": list(step.notes),
        "conflict": None
        if conflict is None
        else {
            "reason": conflict.reason,
            "columns": list(conflict.columns),
            "later": list(conflict.later),
            "versions": {name: _row_document(row) for name, row in _versions(step, conflict).items()},
        },
    }


def _row_document(row: TextRow | None) -> dict[str, Any] | None:
    return None if row is None else {name: _fragment(value) for name, value in row.items()}


def _fragment(text: str | None) -> Any:
    return None if text is None else orjson.Fragment(text)


def _effective(found: Revert) -> int:
    """Return the number of steps that change a row."""
    return sum(step.act != "nothing" for step in found.plan.steps)


def _tell_end(found: Revert, *, applied: bool) -> None:
    number = _effective(found)
    changes = f"{number} change{'' if number == 1 else 's'}"
    if not number:
        say("There is nothing to undo.")
    elif applied:
        say(f"Undid {changes} in one transaction.")
    else:
        say(f"Nothing was changed. --apply undoes {changes} in one transaction.")


COMMANDS = (revert,)
