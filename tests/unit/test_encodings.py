"""What is said of encodings that the bridge cannot work with."""

from __future__ import annotations

from typing import Literal

import pytest

from cdcbridge.database import encodings
from cdcbridge.problem import script


@pytest.mark.parametrize(
    ("message", "encoding"),
    [
        ("conversion between UTF8 and MULE_INTERNAL is not supported", "MULE_INTERNAL"),
        ('default conversion function for encoding "SQL_ASCII" to "UTF8" does not exist', "SQL_ASCII"),
        ("database SQL_ASCII does not exist", None),
        ("conversion between UTF8 and LATIN1", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_refused_connection_names_the_encoding(message: str, encoding: str | None) -> None:
    assert encodings.without_conversion(message) == encoding


@pytest.mark.parametrize("side", ["source", "store"])
def test_the_way_out_is_sql_that_can_be_run(side: Literal["source", "store"]) -> None:
    problem = encodings.unusable(side, "SQL_ASCII")
    assert (problem.severity, problem.object) == ("error", side) and "SQL_ASCII" in problem.message
    assert f"{side}.dsn" in problem.fix and script([problem]).splitlines()[1].startswith("create database ")


def test_a_text_that_an_encoding_lacks_is_shown() -> None:
    problem = encodings.lacks("store", "LATIN1", "consumers.0.topics", "☃")
    assert problem.object == "consumers.0.topics"
    assert problem.message == "'☃' has a character that the store's encoding LATIN1 lacks"
    assert encodings.narrow_store("LATIN1", "UTF8").code == "store_encoding"
