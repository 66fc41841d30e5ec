"""Each error code of PostgreSQL has a verdict, the manual has the same table, and each verdict becomes its error."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from cdcbridge.bridge.supervisor import Bridge
from cdcbridge.cli.context import App
from cdcbridge.config import load
from cdcbridge.database import source_errors, store_errors
from cdcbridge.database.sqlstates import CLASSES, CODES, PASSING, verdict
from cdcbridge.errors import (
    CdcbridgeError,
    OperatorNeeded,
    SourceUnavailable,
    StaleReceipt,
    StoreUnavailable,
    UsageError,
)
from tests.conftest import NEWER
from tests.harness.forked import command

MANUAL = Path(__file__).parents[2] / "docs" / "OPERATIONS.md"
KNOWN = sorted(code for code in psycopg.errors._sqlcodes if re.fullmatch("[0-9A-Z]{5}", code))


def rows() -> list[str]:
    """The table as the manual has it: codes that are judged like their neighbours are not named."""
    judged = sorted({**CLASSES, **CODES}.items())
    return [f"| {code} | {one} | {why} |" for code, (one, why) in judged]


def test_every_code_that_psycopg_knows_is_in_the_table() -> None:
    assert len(KNOWN) > 240
    assert {code for code in KNOWN if code not in CODES and code[:2] not in CLASSES} == set()
    assert all(code[:2] in CLASSES and verdict(code) != CLASSES[code[:2]][0] for code in CODES), "no exception"
    assert verdict("ZZ999") == verdict("") == "wrong"


@pytest.mark.parametrize("server", ["pg15", "pg18"])
def test_every_code_of_a_servers_own_list_is_in_the_table(server: str) -> None:
    """PostgreSQL installs the list that its manual is made of. Classes 00 and 01 are no errors."""
    share = Path("/usr/share/postgresql/15") if server == "pg15" else NEWER.parent / "share"
    text = (share / "errcodes.txt").read_text()
    codes = set(re.findall(r"^([0-9A-Z]{5}) +E ", text, re.MULTILINE))
    assert len(codes) > 200
    assert {code for code in codes if code[:2] not in CLASSES} == set()


def test_the_manual_has_the_same_table() -> None:
    lines = MANUAL.read_text().splitlines()
    start = lines.index("| SQLSTATE | verdict | for example |")
    table = lines[start + 2 : lines.index("", start)]
    assert table == rows(), "replace the table by:\n" + "\n".join(rows())


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        # A server that is away: the connection, a restart, a promotion, limits that pass, locks.
        *((code, "away") for code in (
            "08000", "08001", "08003", "08004", "08006", "08P01", "25006", "25P03", "25P04", "28000", "28P01",
            "3D000", "40001", "40P01", "53100", "53200", "53300", "53400", "55000", "55006", "55P03", "57014", "57P01",
            "57P02", "57P03", "57P04", "57P05", "58000", "58030", "72000", "HV00N",
        )),
        # A mistake: of the program, of its user, or of a trigger of the application.
        *((code, "wrong") for code in (
            "0A000", "22021", "22023", "22P02", "22P05", "23505", "25001", "25P01", "25P02", "26000", "2F000", "3F000", "42601",
            "42883", "42P01", "54000", "55P02", "CB001", "HV000", "P0001", "XX000",
        )),
        *((code, "operator") for code in ("42501", "58P01", "58P02", "F0000", "F0001", "XX001", "XX002")),
    ],
)  # fmt: skip
def test_verdicts(code: str, expected: str) -> None:
    assert verdict(code) == expected


def test_what_is_not_supported_passes_in_three_functions_of_the_server_alone() -> None:
    assert {verdict("0A000", function) for function in PASSING} == {"away"}
    assert verdict("0A000", "parse_extension_control_file") == "wrong"
    assert verdict("42601", "RevalidateCachedQuery") == "wrong"


def raised(code: str | None, kind: type[psycopg.Error] = psycopg.OperationalError) -> psycopg.Error:
    """An error as psycopg raises it, with its code."""
    error = psycopg.errors.lookup(code)("it failed") if code and code in KNOWN else kind("it failed")
    error.sqlstate = code
    return error


@pytest.mark.parametrize(
    ("errors", "away"), [(source_errors, SourceUnavailable), (store_errors, StoreUnavailable)], ids=["source", "store"]
)
def test_each_code_becomes_the_error_of_its_verdict(errors: object, away: type[CdcbridgeError]) -> None:
    becomes = {"away": away, "wrong": CdcbridgeError, "operator": OperatorNeeded}
    cases: list[tuple[str | None, type[CdcbridgeError]]] = [(code, becomes[verdict(code)]) for code in KNOWN]
    cases += [("CB001", UsageError), ("CB006", StaleReceipt), (None, away)]
    for code, expected in cases:
        with pytest.raises(CdcbridgeError) as caught, errors():  # type: ignore[operator]
            raise raised(code)
        assert type(caught.value) is expected, code
    with pytest.raises(away), errors():  # type: ignore[operator]
        raise raised(None, psycopg.InterfaceError)  # a session that was closed
    with pytest.raises(CdcbridgeError) as caught, errors():  # type: ignore[operator]
        raise raised(None, psycopg.DataError)  # a text with NUL, which psycopg does not send
    assert type(caught.value) is CdcbridgeError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bridge.yaml"
    path.write_text("source: {dsn: host=nowhere}\nhttp: null\nconsumers: [{name: c, tables: [public.t]}]\n")
    return path


def test_a_bridge_judges_an_error_that_nothing_translated(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def fails(code: str) -> None:
        tries.append(code)
        if len(tries) == 3:
            bridge.stop()
        raise raised(code)

    bridge = Bridge(load(file))
    monkeypatch.setattr("cdcbridge.bridge.supervisor.BridgeStore", lambda *_: fails("25006"))
    bridge.run()
    assert tries == ["25006"] * 3, "tried again until it was stopped"
    for code, expected in (("42P01", CdcbridgeError), ("XX001", OperatorNeeded)):
        monkeypatch.setattr("cdcbridge.bridge.supervisor.BridgeStore", lambda *_, code=code: fails(code))
        with pytest.raises(CdcbridgeError) as caught:
            Bridge(load(file)).run()
        assert type(caught.value) is expected


@pytest.mark.parametrize(("code", "exit_code"), [("57P01", 1), ("42P01", 1), ("42501", 3), ("CB001", 2)])
def test_a_command_judges_an_error_that_nothing_translated(
    file: Path, monkeypatch: pytest.MonkeyPatch, code: str, exit_code: int
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise raised(code)

    monkeypatch.setattr(App, "store", fails)
    result = command(["-c", str(file), "peek", "c"])
    assert result.code == exit_code and result.err.startswith(b"error: "), result
