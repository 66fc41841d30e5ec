"""The configuration file: what it accepts, and how it names what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdcbridge.config import load
from cdcbridge.errors import ConfigError

GOOD = "source: {dsn: host=db}\nconsumers:\n  - {name: a, tables: [public.t]}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "bridge.yaml"
    path.write_text(text)
    return path


def refused(folder: Path, text: str, **environment: str) -> str:
    path = write(folder, text)
    with pytest.raises(ConfigError) as raised:
        load(path, environment)
    assert str(raised.value).startswith(f"{path}:")
    return str(raised.value)


def test_defaults_file_and_environment_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, GOOD + "store: {schema: mine}\n")
    monkeypatch.setenv("CDCBRIDGE_SOURCE__SLOT", "from_env")
    monkeypatch.setenv("CDCBRIDGE_STORE__SCHEMA", "over")
    config = load(path)
    assert (config.source.slot, config.store.schema_, config.source.publication) == ("from_env", "over", "cdcbridge")
    assert config.store_dsn == config.source_dsn == "host=db"
    assert config.consumers[0].visibility_timeout == 30


def test_variables_are_substituted_after_parsing(tmp_path: Path) -> None:
    path = write(tmp_path, 'source: {dsn: "${URL}", slot: "${SLOT:-fallback}"}\n')
    config = load(path, {"URL": "host=x password=': {[ #'"})
    assert config.source_dsn == "host=x password=': {[ #'"
    assert config.source.slot == "fallback"


def test_an_unset_variable_is_an_error_with_its_path(tmp_path: Path) -> None:
    assert "source.dsn: the environment variable URL is not set" in refused(tmp_path, 'source: {dsn: "${URL}"}')
    both = refused(tmp_path, 'source: {dsn: "${URL} ${PASSWORD}"}\nstore: {dsn: "${STORE}", schema: "${S:-s}"}')
    assert [line.partition("variable ")[2].split()[0] for line in both.splitlines()] == ["URL", "PASSWORD", "STORE"]


CONSUMER = "source: {dsn: host=db}\nconsumers:\n  - "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "nonsense: 1\n", "nonsense: unknown key"),
        ("source: {dsn: x=y, slott: a}\n", "source.slott: unknown key"),
        ("consumers: []\n", "source: missing"),
        ("- 1\n", "expected a mapping"),
        ("a: [\n", "not YAML"),
        ("source: {dsn: a=b}\nsource: {dsn: c=d}\n", "the key 'source' is given twice"),
        ("source: {dsn: x=y, heartbeat_interval: 10}\n", "source.heartbeat_interval: 10 is not a duration"),
        ("source: {dsn: x=y, max_retained_wal: 10gb}\n", "source.max_retained_wal: '10gb' is not a size"),
        ("source: {dsn: x=y, plugin: test_decoding}\n", "source.plugin: 'test_decoding' is not one of auto, pgoutput or wal2json"),
        ("source: {dsn: x=y, slot: 'Bad Slot'}\n", "source.slot: "),
        (CONSUMER + "{name: a, tables: [t]}", "consumers.a.tables: 't' is not a table"),
        (CONSUMER + "{name: a, tables: ['s*.t']}", "consumers.a.tables: 's*.t' is not a table"),
        (CONSUMER + "{name: a}", "consumers.a: a consumer needs tables"),
        (CONSUMER + "{name: a, tables: [s.t], filter: 'record.x =='}", "consumers.a.filter: not a CEL expression"),
        (CONSUMER + "{name: a, tables: [s.t], filter: 'recrod.x == 1'}", "unknown variable 'recrod'"),
        (CONSUMER + "{name: a, tables: [s.t], operations: [upsert]}", "consumers.a.operations.0: 'upsert' is not one of"),
        (CONSUMER + "{name: a, tables: [s.t], columns: {include: [a], exclude: [b]}}", "either include or exclude"),
        (CONSUMER + "{name: a, tables: [s.t], max_in_flight: 0}", "consumers.a.max_in_flight: 0 is out of range: write at least 1"),
        (CONSUMER + "{name: a, tables: [s.t], visibility_timeout: soon}", "'soon' is not a duration"),
        (CONSUMER + "{name: 'A b', tables: [s.t]}", "consumers.0.name: "),
        ("source: {dsn: x=y, failover: maybe}\n", "source.failover"),
        ("source: {dsn: x=y, max_slot_inactive: 5}\n", "source.max_slot_inactive: 5 is not a duration"),
        (GOOD + "http: {listen: 9187}\n", "http.listen: "),
        (GOOD + "http: {listen: '127.0.0.1:70000'}\n", "http.listen: a port is at most 65535"),
        (GOOD + "  - {name: a, tables: [public.u]}\n", "consumers: two consumers are named 'a'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_file_and_path(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, text)


def test_all_problems_are_told_at_once_and_no_secret(tmp_path: Path) -> None:
    message = refused(tmp_path, "source: {dsn: [password=hush], slot: 'A B', nope: 1}\n")
    assert len(message.splitlines()) == 3
    assert "hush" not in message


def test_a_missing_file_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file") as raised:
        load(tmp_path / "absent.yaml")
    assert raised.value.hint is not None and "-c FILE" in raised.value.hint


def test_the_example_in_config_is_valid() -> None:
    example = Path(__file__).parents[2] / "config" / "cdcbridge.example.yaml"
    assert load(example, {"DATABASE_URL": "host=db"}).consumers


@pytest.mark.parametrize("setting", ["filter: 'true'", "columns: {include: [a]}", "key: [a]"])
def test_a_stream_reads_the_log_as_it_is(tmp_path: Path, setting: str) -> None:
    message = refused(tmp_path, CONSUMER + "{name: a, tables: [s.t], mode: stream, " + setting + "}")
    assert f"a stream reads the log as it is: {setting.partition(':')[0]} cannot be given" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("mode: fifo", "compact works only in mode stream"),
        ("mode: stream, operations: [insert]", "compact keeps a table's state, which needs all operations"),
    ],
)
def test_compaction_is_of_a_whole_state(tmp_path: Path, settings: str, message: str) -> None:
    assert message in refused(tmp_path, CONSUMER + "{name: a, tables: [s.t], compact: true, " + settings + "}")


def test_messages_are_kept_for_consumers_as_long_as_for_anybody(tmp_path: Path) -> None:
    message = refused(tmp_path, GOOD + "store: {retention: 7d, max_retention: 1d}\n")
    assert "max_retention is shorter than retention" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (r'x: "\ud800"', "x: the text has half a character"),
        (r'"\udfff": 1', "the text has half a character"),
        (r'store: {dsn: "\udc80"}', "store.dsn: the text has half a character"),
        (r'store: {dsn: "host=\0"}', "store.dsn: the text has a NUL character"),
        ("store: {dsn: '${LATIN}'}", "store.dsn: the text has half a character"),
        ("1: 2", "the key 1 is not a text"),
        ("~: 2", "the key None is not a text"),
        ("x: 2026-02-30", "not YAML: day is out of range"),
        ("x: " + "9" * 5000, "not YAML: "),
        ("x: " + "[" * 3000, "nested too deeply"),
        ("x: &a [*a]", "nested too deeply"),
    ],
)
def test_odd_yaml_is_an_error_and_no_traceback(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, GOOD + text, LATIN="caf\udce9")


def test_a_character_in_two_halves_is_one_as_in_json(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(r'{"source": {"dsn": "host=db"}, "consumers": [{"name": "a", "topics": ["\ud83e\udd80"]}]}')
    assert load(path).consumers[0].topics == ("🦀",)


def test_the_file_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(GOOD.encode() + "# caf\xe9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "CDCBRIDGE_SOURCE__DSN",
            "host=caf\udce9",
            "the environment variable CDCBRIDGE_SOURCE__DSN: the text has half",
        ),
        ("CDCBRIDGE_CONSUMERS", "[", "the environment: error parsing value"),
    ],
)
def test_an_odd_environment_is_an_error_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    assert message in refused(tmp_path, GOOD)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("visibility_timeout: 0s", "consumers.a.visibility_timeout: '0s' is out of range: write more than 0"),
        ("visibility_timeout: 3000000d", "'3000000d' is longer than 36500d"),
        ("visibility_timeout: 31d", "consumer 'a': visibility_timeout is 31d, longer than store.max_retention, 30d"),
        ("retry_delay: {max: 31d}", "retry_delay.max is 31d, longer than"),
        ("retry_delay: {initial: 721h}", "retry_delay.initial is 721h, longer than"),
        (f"max_message_bytes: {'9' * 400}GB", "is not a size"),
    ],
)
def test_no_wait_is_endless_or_longer_than_the_log_is_kept(tmp_path: Path, settings: str, message: str) -> None:
    assert message in refused(tmp_path, CONSUMER + "{name: a, tables: [s.t], " + settings + "}")


def test_a_short_log_does_not_refuse_waits_that_nobody_wrote(tmp_path: Path) -> None:
    config = load(write(tmp_path, GOOD + "store: {retention: 5s, max_retention: 10s}\n"), {})
    assert (config.consumers[0].visibility_timeout, config.consumers[0].retry_delay.max) == (30, 600)


def test_a_mask_may_be_yamls_null(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + 'api: {mask: {ssn: null, phone: "null", email: hash}}\n')
    assert load(path, {}).api.mask == {"ssn": "null", "phone": "null", "email": "hash"}
    assert "last4" in refused(tmp_path, GOOD + "api: {mask: {ssn: last5}}\n")
