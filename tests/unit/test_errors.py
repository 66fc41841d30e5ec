"""Errors: the exit code of each one, and what a decoding error says of its place."""

from __future__ import annotations

import pytest

from cdcbridge import errors
from cdcbridge.errors import CdcbridgeError, DecodeError

EXITS = {
    1: ["SourceUnavailable", "StoreUnavailable", "SlotInUse", "LockedOut", "NotLeader", "Fenced", "StaleReceipt"],
    2: ["UsageError", "ConfigError", "CheckFailed", "BehindPooler", "ClientClosed", "UnreadableData"],
    3: ["OperatorNeeded", "DecodeError"],
}


@pytest.mark.parametrize(("code", "name"), [(code, name) for code, names in EXITS.items() for name in names])
def test_an_error_has_the_exit_code_of_the_contract(code: int, name: str) -> None:
    assert getattr(errors, name).exit_code == code


@pytest.mark.parametrize(
    ("lsn", "where"), [(None, "at byte 7"), (0, "at LSN 0/0, byte 7"), (0x16B374D848, "at LSN 16/B374D848, byte 7")]
)
def test_a_decoding_error_names_its_place(lsn: int | None, where: str) -> None:
    error = DecodeError("pgoutput", "empty message", offset=7, lsn=lsn)
    assert str(error) == f"pgoutput: empty message ({where})"
    assert (error.plugin, error.reason, error.offset, error.lsn) == ("pgoutput", "empty message", 7, lsn)


def test_python_code_catches_bad_input_as_python_calls_it() -> None:
    assert issubclass(errors.UnusableHandler, TypeError) and issubclass(errors.UnreadableData, ValueError)
    assert CdcbridgeError("x", hint="y").hint == "y" and CdcbridgeError("x").hint is None
