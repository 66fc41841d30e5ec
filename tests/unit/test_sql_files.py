"""The SQL files of the package: one public function in a file that has its name, headers, templates, and an index of all."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from cdcbridge.store import sql_files

SQL = Path(__file__).parents[2] / "sql"
API = sorted((SQL / "api").glob("*.sql"))


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_a_public_function_has_a_file_of_its_name(path: Path) -> None:
    names = set(re.findall(r"^create or replace function (\w+)", path.read_text(), re.MULTILINE))
    assert names == {path.stem}


def test_the_header_of_a_file_becomes_the_comment_of_its_function() -> None:
    found = {one.name: one for one in sql_files.code().public}
    assert set(found) == {path.stem for path in API}
    header = found["receive"].header
    assert header.startswith("receive(consumer, max_messages, visibility_timeout, durable): ")
    assert "--" not in header and "create or replace" not in header and "CB001" in header


def test_publishing_alone_needs_a_grant() -> None:
    assert [one.name for one in sql_files.code().public if one.needs_grant] == ["publish"]


def test_templates_have_the_place_that_is_replaced() -> None:
    templates = dict(sql_files.code().templates)
    assert sorted(templates) == [
        "dispatch/claim_waiting",
        "dispatch/claim_waiting_in_order",
        "per_consumer/claim_in_order",
        "per_consumer/claim_waiting",
        "per_consumer/live_waiting",
        "per_consumer/peek",
    ]
    for text in templates.values():
        assert "__id__" in text


def test_any_change_of_a_file_changes_the_checksum() -> None:
    code = sql_files.code()
    public = (dataclasses.replace(code.public[0], text="-- x"), *code.public[1:])
    changed = [
        dataclasses.replace(code, public=public),
        dataclasses.replace(code, views=(*code.views, "-- x")),
        dataclasses.replace(code, internal=(*code.internal, "-- x")),
        dataclasses.replace(code, templates=(("per_consumer/x", code.templates[0][1]), *code.templates[1:])),
    ]
    assert len({one.checksum for one in (code, *changed)}) == 5


def test_releases_are_compared_by_their_numbers() -> None:
    assert sql_files.release("0.9.2") < sql_files.release("0.10.0") < sql_files.release("1.0")
    assert sql_files.release("") < sql_files.release("0.1.0")


def test_a_new_store_begins_with_version_1_and_migrations_follow() -> None:
    assert sql_files.tables().startswith("-- The tables of a store")
    assert all(version > 1 for version, _, _ in sql_files.migrations())


def test_the_index_names_every_file() -> None:
    linked = set(re.findall(r"\]\(([\w/]+\.sql)\)", (SQL / "README.md").read_text()))
    assert linked == {str(path.relative_to(SQL)) for path in SQL.rglob("*.sql")}
