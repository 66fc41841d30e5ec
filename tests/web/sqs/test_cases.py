"""The table of the peer's cases names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
ROW = re.compile(r"\| (?P<case>[a-z0-9_]+) \| (?P<here>.+) \|")
FILE = re.compile(r"(test_\w+\.py): ((?:[a-z0-9_]+(?:, )?)+)")


def test_each_case_has_a_verdict_and_each_test_exists() -> None:
    rows = [row for line in (HERE / "CASES.md").read_text().splitlines() if (row := ROW.fullmatch(line))]
    assert len(rows) > 200
    named = 0
    for row in rows[1:]:
        assert row["here"].startswith(("holds", "does not apply: ", "missing: ")), row["case"]
        for file, tests in FILE.findall(row["here"]):
            text = (HERE / file).read_text()
            for test in tests.split(", "):
                named += 1
                assert not test or f"def test_{test}(" in text, (row["case"], file, test)
    assert named > 140
