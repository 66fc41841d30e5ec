"""Which subjects a template can have, and which of them a stream takes."""

from __future__ import annotations

import pytest

from cdcbridge.sinks.targets.nats_subjects import overlap, pattern_of, valid


@pytest.mark.parametrize(
    ("template", "pattern"),
    [
        ("shop.{schema}.{table}", "shop.>"),
        ("shop.orders", "shop.orders"),
        ("a.b{key}.c", "a.>"),
        ("{topic}", ">"),
        ("x-{topic}", ">"),
    ],
)
def test_the_subjects_of_a_template(template: str, pattern: str) -> None:
    assert pattern_of(template) == pattern


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("shop.>", "shop.>", True),
        ("shop.>", "shop.*.x", True),
        ("shop.>", "shop", False),
        ("shop.>", "*.orders", True),
        ("shop.orders", "shop.*", True),
        ("shop.orders", "shop.*.x", False),
        ("shop.a", "shop.b", False),
        ("a.>", "b.>", False),
        (">", "anything.at.all", True),
        ("a.b.c", "a.b", False),
    ],
)
def test_patterns_with_a_common_subject(one: str, other: str, both: bool) -> None:
    assert overlap(one, other) is both
    assert overlap(other, one) is both


@pytest.mark.parametrize("subject", ["a", "a.b", "a.b*", "a.ü", "a.>b"])
def test_subjects_that_can_be_published(subject: str) -> None:
    assert valid(subject)


@pytest.mark.parametrize("subject", ["", "a..b", ".a", "a.", "a b", "a\r\nb", "a.*", "a.>", ">", "a\tb", "a\0b"])
def test_subjects_that_cannot_be_published(subject: str) -> None:
    assert not valid(subject)
