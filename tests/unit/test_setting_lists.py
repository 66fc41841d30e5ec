"""Settings of PostgreSQL that are lists of names: read as the server reads them."""

from __future__ import annotations

import pytest

from cdcbridge.source.setting_lists import literals, names


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("pgoutput, wal2json", ["pgoutput", "wal2json"]),
        ('pgoutput,"wal2json"', ["pgoutput", "wal2json"]),
        ("  pgoutput ,\twal2json ", ["pgoutput", "wal2json"]),
        ('"pgoutput, wal2json"', ["pgoutput, wal2json"]),
        ('"""pgoutput"", ""wal2json"""', ['"pgoutput", "wal2json"']),
        ('"Wal2Json", Wal2Json', ["Wal2Json", "wal2json"]),
        ('" wal2json "', [" wal2json "]),
        ('""', [""]),
        ("", []),
        ('"unfinished', ["unfinished"]),
    ],
)
def test_the_names_of_a_list(shown: str, expected: list[str]) -> None:
    assert names(shown) == expected


def test_each_name_has_quotes_of_its_own() -> None:
    assert literals(["pgoutput", "wal2json"]) == "'pgoutput', 'wal2json'"
    assert literals(["it's"]) == "'it''s'"
