"""The settings of a session as startup options, and the first statement that repeats them."""

from __future__ import annotations

from psycopg.conninfo import conninfo_to_dict

from cdcbridge.database import conninfo
from cdcbridge.database.session import SETTINGS, pin, startup_options


def test_options_escape_blanks_and_backslashes() -> None:
    assert startup_options({"a": "read committed", "b": "x\\y"}) == r"-c a=read\ committed -c b=x\\y"


def test_a_setting_that_a_role_may_not_change_is_no_startup_option() -> None:
    assert startup_options({"track_activities": "on", "session_replication_role": "origin"}) == ""


def test_options_are_always_given_and_a_users_own_come_first() -> None:
    ours = conninfo_to_dict(conninfo("host=h options='-c work_mem=1MB -c timezone=Asia/Tokyo'", "x"))
    assert str(ours["options"]).startswith("-c work_mem=1MB -c timezone=Asia/Tokyo -c client_encoding=UTF8 ")
    assert ours["client_encoding"] == "UTF8"
    pooled = conninfo_to_dict(conninfo("host=h", "x", pooler=True))
    assert pooled["options"] == ""  # empty, not missing: else libpq would take PGOPTIONS


def test_the_first_statement_sets_all_of_them() -> None:
    text = pin({"search_path": '"a ""b""", pg_temp'}, 42).as_string(None)
    assert all(f"'{name}'" in text for name in SETTINGS)
    assert "pg_backend_pid() = 42" in text
    assert '"a ""b""", pg_temp' in text
