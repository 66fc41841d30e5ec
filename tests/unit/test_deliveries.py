"""The statements of all kinds of queues take the same values, so that one function can run each of them."""

from __future__ import annotations

from dataclasses import fields

import pytest

from cdcbridge.web.sqs.deliveries import ANY_ORDER, IN_ORDER, LETTERS, DeliveryStatements

VALUES = {"receive": 4, "due": 2, "give_back": 2, "delete": 2, "extend": 3}


@pytest.mark.parametrize("statements", [ANY_ORDER, IN_ORDER, LETTERS], ids=lambda one: one.kind)
def test_each_statement_takes_its_values(statements: DeliveryStatements) -> None:
    assert {name: getattr(statements, name).count("%s") for name in VALUES} == VALUES


def test_kinds_differ_and_have_no_colon() -> None:
    kinds = [one.kind for one in (ANY_ORDER, IN_ORDER, LETTERS)]
    assert len(set(kinds)) == 3 and not any(":" in kind for kind in kinds)
    assert {field.name for field in fields(DeliveryStatements)} == {"kind", *VALUES}
