"""The guide "Undo a mistake" is followed literally."""

from __future__ import annotations

import re

from tests.acceptance.test_docs import BLOCK, ROOT, Reader
from tests.harness.world import World
from tests.revert.conftest import caught_up, rows

PAGE = (ROOT / "docs" / "REVERT.md").read_text()


def test_the_guide_undoes_its_mistake(world18: World) -> None:
    reader = Reader(world18)
    written = {}
    try:
        for name, kind, text in BLOCK.findall(PAGE):
            written[name] = reader.follow(kind, text)
            if name == "the mistake":
                assert caught_up(world18) == 4
                assert rows(world18, "select id, status from orders order by id") == [
                    (1, "cancelled"),
                    (2, "cancelled"),
                ]
    finally:
        reader.close()
    shown = re.search(r"```text\n(seq 4 .*?commit;\n)", PAGE, re.DOTALL)
    assert shown is not None and written["the plan"] == shown[1]
    assert rows(world18, "select id, status, amount::text from orders order by id") == [
        (1, "new", "12.50"),
        (2, "paid", "7"),
    ]
