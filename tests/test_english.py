"""The wording of docstrings, messages, SQL comments, help texts and pages: plain enough for a colleague who is new to the project."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cdcbridge.cli import cli
from tests.harness import plain_english

ROOT = Path(__file__).parents[1]


def helps(command: click.Command) -> Iterator[str]:
    yield command.help or ""
    yield from (option.help or "" for option in command.params if isinstance(option, click.Option))
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child
            yield from helps(child)


RAISED = [text for path in sorted((ROOT / "sql").rglob("*.sql")) for text in plain_english.messages(path)]
GROUPS = {
    "docstrings": [
        text for path in sorted((ROOT / "cdcbridge").rglob("*.py")) for text in plain_english.docstrings(path)
    ],
    "SQL comments": [plain_english.comments(path) for path in sorted((ROOT / "sql").rglob("*.sql"))],
    "messages": [text for path in sorted((ROOT / "cdcbridge").rglob("*.py")) for text in plain_english.messages(path)]
    + RAISED,
    "help texts": list(helps(cli)),
    "pages": [
        path.read_text()
        for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    ],
    "guides of sinks": [
        path.read_text() for path in (ROOT / "docs" / "SINKS.md", *sorted((ROOT / "docs" / "sinks").glob("*.md")))
    ],
}


@pytest.mark.parametrize("group", GROUPS)
def test_hard_words_are_rare(group: str) -> None:
    number = sum(plain_english.words(text) for text in GROUPS[group])
    assert number > 1000
    for kind in plain_english.hard_places(""):
        found = [place for text in GROUPS[group] for place in plain_english.hard_places(text)[kind]]
        assert len(found) * 1000 / number <= plain_english.LIMIT, (kind, found)


def test_no_message_of_sql_has_a_hard_word() -> None:
    """All of them have about 1,000 words, so one hard word would stay within the limit of one per 1,000."""
    assert len(RAISED) > 90
    found = {text: kind for text in RAISED for kind, places in plain_english.hard_places(text).items() if places}
    assert not found


def test_hard_words_are_found() -> None:
    text = "Of rows that came beside the stream; nobody tells who sends them. What is a lease? A lease ends."
    found = {kind: len(places) for kind, places in plain_english.hard_places(text).items()}
    assert set(found.values()) == {1}, found


def test_messages_are_found_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '''"""Nobody reads this docstring."""

def check(name):
    """Nobody reads this one, either."""
    connection.execute("update t set nobody = 1 where false")
    log.error("slot.lost", reason="nobody reads the slot")
    yield f"nobody reads {name} now", "alter table t set logged;"
    option(help="nobody reads the help")
    raise UsageError(f"the slot {name} is"
                     " away", hint=f"drop table {name}; -- then ask somebody")
'''
    )
    assert sorted(plain_english.messages(path)) == [
        "nobody reads the help",
        "nobody reads the slot",
        "nobody reads x now",
        "the slot x is away",
        "x -- then ask somebody",
    ]


def test_messages_of_sql_are_found_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "function.sql"
    path.write_text(
        """-- nobody reads this comment; not as a message
begin
    raise notice 'nobody waits for consumer %', quote_literal(name);
    if delay < 0 then
        raise exception 'delay is %; it must'
            ' not be negative', delay
            using errcode = 'CB004', detail = 'nobody''s fault; it happens',
                  hint = format('nobody reads %1$s', 'a text without a kind');
    end if;
    perform tell('nobody reads this value');
    raise exception 'held' using errcode = 'lock_not_available';
end $$;
"""
    )
    assert list(plain_english.messages(path)) == [
        "nobody waits for consumer x",
        "delay is x; it must not be negative",
        "nobody's fault; it happens",
        "nobody reads x",
        "a text without a kind",
    ]
