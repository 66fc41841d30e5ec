"""LSNs as integers and as texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.lsn import format_lsn, parse_lsn


@given(st.integers(0, (1 << 64) - 1))
def test_an_lsn_survives_its_text(lsn: int) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn


@pytest.mark.parametrize("bad", ["", "1", "1/", "/1", "1/2/3", "g/0", "123456789/0", " 0/0"])
def test_what_is_no_lsn_is_named(bad: str) -> None:
    with pytest.raises(ValueError, match="not an LSN"):
        parse_lsn(bad)
