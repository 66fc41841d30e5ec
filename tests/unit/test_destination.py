"""Names of destinations with placeholders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.routing.destination import Destination, NoDestination
from cdcbridge.sinks.shaper import Unshaped
from tests.harness.shaping import row, shaped


def test_a_destination_is_filled_in() -> None:
    (outgoing,) = shaped(row(), sink={"path": "{source}/{schema}.{table}/{op}-{key}-{partition}-{topic}"})
    assert outgoing.destination == "shop/public.orders/insert-7-3-public.orders"


def test_a_message_without_a_key_has_no_destination_with_one() -> None:
    found = shaped(row(key=None), sink={"path": "{key}"})
    assert isinstance(found, Unshaped) and "no key" in found.reason


@pytest.mark.parametrize(
    ("template", "named"), [("{tabel}", "did you mean table"), ("{", "brace"), ("a}b", "brace"), ("{}", "placeholder")]
)
def test_a_bad_template_is_refused_with_its_fault(template: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Destination(template)


@given(st.text())
def test_a_template_is_refused_or_filled_in(template: str) -> None:
    try:
        made = Destination(template)
    except ValueError:
        return
    values = dict.fromkeys(("source", "schema", "table", "topic", "op", "key", "partition"), "x")
    assert "{" not in made.fill(values) and "}" not in made.fill(values)
    if made.placeholders:
        with pytest.raises(NoDestination):
            made.fill({})
