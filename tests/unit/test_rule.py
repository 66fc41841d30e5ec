"""One decision for each kind of encounter. tests/properties/test_mirror_rule.py has all histories."""

from __future__ import annotations

import pytest

from cdcbridge.config.mirror import ConflictRule
from cdcbridge.mirrors.rule import Decision, Incoming, Local, Write, decide

SEEN, UNSEEN = 50, 60


def incoming(op: str, at: int = 1000) -> Incoming:
    return Incoming(Write(op, 500, at, "A"), SEEN)


def own(op: str, lsn: int = UNSEEN, at: int = 2000) -> Write:
    return Write(op, lsn, at, "B")


@pytest.mark.parametrize("op", ["insert", "update", "delete"])
def test_a_row_that_the_mirror_wrote_last_is_written_again(op: str) -> None:
    assert decide(incoming(op), Local(True, True, own("update")), "newest") == Decision(True)


@pytest.mark.parametrize("rule", ["newest", "prefer_target", "hold"])
def test_a_write_that_the_source_had_seen_loses_by_every_rule(rule: ConflictRule) -> None:
    assert decide(incoming("update"), Local(True, False, own("update", SEEN)), rule) == Decision(True)
    assert decide(incoming("delete"), Local(True, False, None), rule) == Decision(True)


@pytest.mark.parametrize(
    ("op", "exists", "rival", "kind"),
    [
        ("insert", True, "insert", "insert_exists"),
        ("update", True, "update", "update_origin_differs"),
        ("update", False, "delete", "update_missing"),
        ("insert", False, "delete", "update_missing"),
        ("delete", True, "update", "delete_origin_differs"),
    ],
)
def test_the_later_of_two_concurrent_writes_wins(op: str, exists: bool, rival: str, kind: str) -> None:
    local = Local(exists, False, own(rival))
    assert decide(incoming(op, 1000), local, "newest") == Decision(False, kind, "target")  # type: ignore[arg-type]
    assert decide(incoming(op, 3000), local, "newest") == Decision(True, kind, "source")  # type: ignore[arg-type]
    assert decide(incoming(op), local, "prefer_source") == Decision(True, kind, "source")  # type: ignore[arg-type]
    assert decide(incoming(op, 3000), local, "prefer_target") == Decision(False, kind, "target")  # type: ignore[arg-type]
    assert decide(incoming(op), local, "hold") == Decision(False, kind, None)  # type: ignore[arg-type]


def test_equal_times_go_by_the_side() -> None:
    assert decide(incoming("update", 2000), Local(True, False, own("update")), "newest").winner == "target"
    other = Incoming(Write("update", 500, 2000, "C"), SEEN)
    assert decide(other, Local(True, False, own("update")), "newest").winner == "source"


def test_two_deletes_lose_nothing() -> None:
    assert decide(incoming("delete"), Local(False, False, own("delete")), "hold") == Decision(
        False, "delete_missing", "target"
    )


def test_a_row_that_the_mirror_removed_later_competes_no_more() -> None:
    found = decide(incoming("update"), Local(False, False, own("update")), "newest")
    assert found == Decision(True, "update_missing", "source")


def test_without_a_rival_the_source_wins_and_the_surprise_is_reported() -> None:
    assert decide(incoming("insert"), Local(False, False, None), "newest") == Decision(True)
    assert decide(incoming("insert"), Local(True, False, None), "newest") == Decision(True, "insert_exists", "source")
    assert decide(incoming("update"), Local(False, False, None), "newest") == Decision(True, "update_missing", "source")
    assert decide(incoming("delete"), Local(False, False, None), "newest") == Decision(
        False, "delete_missing", "source"
    )
