"""What people read who made a mistake in the configuration: the line, the consumer's name, the value, what is allowed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cdcbridge.config import load
from cdcbridge.errors import ConfigError

TOP = "source:\n  dsn: host=db\n"
ONE = f"{TOP}consumers:\n  - name: billing\n    tables: [public.orders]\n"
DURATION = "Write a number and one of ms, s, m, h, d, as in 30s"
KNOWN = "name, mode, tables, topics, operations, filter, columns, key, start"


def messages(folder: Path, text: str) -> list[str]:
    path = folder / "cdcbridge.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(path, {})
    return str(raised.value).replace(f"{folder}/", "").splitlines()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # choices
        (f"{ONE}    mode: fiffo\n", "6: consumers.billing.mode: 'fiffo' is not one of queue, fifo or stream; did you mean fifo?"),
        (f"{ONE}    mode: Queue\n", "6: consumers.billing.mode: 'Queue' is not one of queue, fifo or stream; did you mean queue?"),
        (f"{ONE}    start: yesterday\n", "6: consumers.billing.start: 'yesterday' is not one of now, earliest or snapshot"),
        (f"{ONE}    operations: [insert, remove]\n", "6: consumers.billing.operations.1: 'remove' is not one of insert, update, delete or truncate"),
        (f"{TOP}  plugin: wal2jsn\n", "3: source.plugin: 'wal2jsn' is not one of auto, pgoutput or wal2json; did you mean wal2json?"),
        (f"{TOP}  failover: maybe\n", "3: source.failover: 'maybe' is not one of auto, true or false"),
        (f"{TOP}log: {{level: verbose}}\n", "3: log.level: 'verbose' is not one of debug, info, warning or error"),
        (f"{TOP}log:\n  # the format\n\n  format: yaml\n", "6: log.format: 'yaml' is not text or json"),
        # keys
        (f"{TOP}  slott: x\n", "3: source.slott: unknown key; did you mean slot?"),
        (f"{TOP}consumer: []\n", "3: consumer: unknown key; did you mean consumers?"),
        (f"{ONE}    visibilty_timeout: 30s\n", "6: consumers.billing.visibilty_timeout: unknown key; did you mean visibility_timeout?"),
        (f"{ONE}    retry_delay: {{initial: 1s, factr: 2}}\n", "6: consumers.billing.retry_delay.factr: unknown key; did you mean factor?"),
        (f"{TOP}http: {{port: 1}}\n", "3: http.port: unknown key. Known: listen"),
        ("consumers: []\n", " source: missing"),
        ("source: {slot: a}\n", "1: source.dsn: missing"),
        (f"{TOP}consumers:\n  - tables: [public.t]\n", "4: consumers.0.name: missing"),
        # kinds
        (f"{TOP}consumers:\n", "3: consumers: nothing is given, but expected a list, as in [a, b]"),
        (f"{ONE}    topics: invoices\n", "6: consumers.billing.topics: 'invoices' is given, but expected a list, as in [a, b]"),
        (f"{ONE}    columns: [a]\n", "6: consumers.billing.columns: ['a'] is given, but expected keys with values, as in {exclude: [card_number]}. Its keys: include, exclude"),
        (f"{ONE}    filter: 5\n", "6: consumers.billing.filter: 5 is given, but expected a text (put it in quotes)"),
        (f"{ONE}    compact: perhaps\n", "6: consumers.billing.compact: 'perhaps' is given, but expected true or false"),
        (f"{ONE}    max_in_flight: many\n", "6: consumers.billing.max_in_flight: 'many' is given, but expected a whole number"),
        (f"{ONE}    max_deliveries: 2.5\n", "6: consumers.billing.max_deliveries: 2.5 is given, but expected a whole number"),
        (f"{ONE}    retry_delay: 1s\n", "6: consumers.billing.retry_delay: '1s' is given, but expected keys with values, as in {initial: 1s, factor: 2, max: 10m}. Its keys: initial, factor, max"),
        (f"{TOP}http: 9187\n", "3: http: 9187 is given, but expected keys with values, as in {listen: 127.0.0.1:9187}. Its keys: listen"),
        ("source: host=db password=hush\n", '1: source: the value is given, but expected keys with values, as in {dsn: "${DATABASE_URL}"}. Its keys: dsn, name, read_dsn, slot, plugin, publication, heartbeat_interval, max_retained_wal, max_slot_inactive, failover, event_trigger'),
        # values
        (f"{ONE}    visibility_timeout: 30\n", f"6: consumers.billing.visibility_timeout: 30 is not a duration. {DURATION}"),
        (f"{ONE}    visibility_timeout:\n", f"6: consumers.billing.visibility_timeout: nothing is not a duration. {DURATION}"),
        (f"{ONE}    max_in_flight: 0\n", "6: consumers.billing.max_in_flight: 0 is out of range: write at least 1"),
        (f"{TOP}store: {{partitions: 5000}}\n", "3: store.partitions: 5000 is out of range: write at most 4096"),
        (f"{TOP}  slot: My Slot\n", "3: source.slot: 'My Slot' cannot be used: write a-z, 0-9 and _, at most 63 of them"),
        (f"{TOP}http: {{listen: 9187}}\n", "3: http.listen: 9187 cannot be used: write host:port, as in 127.0.0.1:9187"),
        (f"{ONE}    role: ''\n", "6: consumers.billing.role: must not be empty"),
        (f"{TOP}store: {{dsn: '${{NOPE}}'}}\n", "3: store.dsn: the environment variable NOPE is not set"),
        # YAML
        (f"{TOP}  dsn: host=b\n", "3: not YAML: the key 'dsn' is given twice"),
        (f"{TOP}consumers:\n\t- name: a\n", "4: not YAML: a tab (indent with spaces)"),
        (f"{TOP}a: b: c\n", "3: not YAML: a colon where none is allowed (quote the value, or check the indentation)"),
        (f'{TOP}store: {{dsn: "x\n', "4: not YAML: a quote or a bracket that is not closed"),
        (f"{TOP}consumers: [\n", "4: not YAML: a bracket or a brace that is not closed"),
        ("", " expected a mapping with source, store and consumers, found nothing"),
        ("- a\n", " expected a mapping with source, store and consumers, found a list"),
    ],
)  # fmt: skip
def test_a_typical_mistake(tmp_path: Path, text: str, message: str) -> None:
    assert messages(tmp_path, text) == [f"cdcbridge.yaml:{message}"]


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("s" * 55, "cannot be used: write a-z, 0-9 and _, at most 54 of them, first no digit"),
        ("mine_internal", "must not end with _internal"),
    ],
)
def test_a_schema_leaves_room_for_its_internal_one(tmp_path: Path, schema: str, said: str) -> None:
    (found,) = messages(tmp_path, f"{TOP}store: {{schema: {schema}}}\n")
    assert said in found, found


def test_each_mistake_has_its_line_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = f"log: {{lvl: x}}\n{ONE}    mode: fiffo\n    tabels: [x]\n  - name: audit\n    filter: 1\n    tables: [t]\n"
    assert messages(tmp_path, text) == [
        "cdcbridge.yaml:1: log.lvl: unknown key; did you mean level?",
        "cdcbridge.yaml:7: consumers.billing.mode: 'fiffo' is not one of queue, fifo or stream; did you mean fifo?",
        "cdcbridge.yaml:8: consumers.billing.tabels: unknown key; did you mean tables?",
        "cdcbridge.yaml:10: consumers.audit.filter: 1 is given, but expected a text (put it in quotes)",
        "cdcbridge.yaml:11: consumers.audit.tables: 't' is not a table. Write schema.table, schema.*, schema.part* or !schema.table",
    ]


def test_a_value_behind_an_anchor_and_a_merged_key(tmp_path: Path) -> None:
    text = f"{TOP}x: &base {{tables: [public.t], mode: bad}}\nconsumers:\n  - <<: *base\n    name: a\n"
    found = messages(tmp_path, text)
    assert [re.split("[.;] ", message)[0] for message in found] == [
        "cdcbridge.yaml:3: consumers.a.mode: 'bad' is not one of queue, fifo or stream",
        "cdcbridge.yaml:3: x: unknown key",
    ]


def test_a_variable_of_the_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDCBRIDGE_SOURCE__SLOT", "My Slot")
    (message,) = messages(tmp_path, TOP)
    assert message == (
        "cdcbridge.yaml: the environment variable CDCBRIDGE_SOURCE__SLOT:"
        " 'My Slot' cannot be used: write a-z, 0-9 and _, at most 63 of them"
    )


def test_no_word_of_the_library_and_no_secret(tmp_path: Path) -> None:
    text = "source: {dsn: [password=hush], slot: 5, heartbeat_interval: [], max_retained_wal: {}, failover: []}\n"
    found = messages(tmp_path, f"{text}store: 5\nlog: []\nhttp: {{listen: []}}\nconsumers: [5, {{name: {{}}}}, null]\n")
    assert len(found) >= 10
    for message in found:
        assert "hush" not in message
        assert not any(word in message.lower() for word in ("input", "valid", "should", "pydantic", "none", "union")), (
            message
        )


@pytest.mark.parametrize("section", [
    "alerts: {to: {name: x, urls: ['slack://HUSH1234/b/c']}}",
    "alerts: {to: ['slack://HUSH1234/b/c']}",
    "alerts: {to: 'slack://HUSH1234/b/c'}",
    "alerts: 'slack://HUSH1234/b/c'",
    "alerts: ['slack://HUSH1234/b/c']",
    "alerts: {to: [{name: x, urls: 'slack://HUSH1234/b/c'}]}",
    "alerts: {to: [{name: x, urls: [['slack://HUSH1234/b/c']]}]}",
    "alerts: {to: [{name: x, urls: [{url: 'slack://HUSH1234/b/c'}]}]}",
    "alerts: {to: [{name: x, urls: [HUSH1234]}]}",
    "alerts: {to: [{name: x, urls: ['slack://HUSH1234', 'slack://HUSH1234']}]}",
    "api: {listen: '127.0.0.1:1', tokens: {name: a, token: HUSH1234, role: admin}}",
    "api: {listen: '127.0.0.1:1', tokens: [HUSH1234]}",
    "api: {listen: '127.0.0.1:1', tokens: HUSH1234}",
    "api: {listen: '127.0.0.1:1', tokens: [{name: a, token: [HUSH1234], role: admin}]}",
    "api: HUSH1234",
    "api: [{token: HUSH1234}]",
    "api: {listen: '127.0.0.1:1', sqs: [{id: a, secret: HUSH1234, token: b}]}",
    "api: {listen: '127.0.0.1:1', sqs: HUSH1234}",
    "api: {listen: '127.0.0.1:1', sqs: {access_keys: {id: a, secret: HUSH1234, token: b}}}",
    "api: {listen: '127.0.0.1:1', sqs: {access_keys: [HUSH1234]}}",
    "api: {listen: '127.0.0.1:1', sqs: {access_keys: [{id: a, secret: 712345678, token: b}]}}",
    "consumers: [{name: a, topics: [t], sink: {type: http, url: [HUSH1234]}}]",
    "consumers: [{name: a, topics: [t], sink: {type: http, url: 'http://x', headers: HUSH1234}}]",
    "consumers: [{name: a, topics: [t], sink: {type: http, url: 'http://x', headers: {Authorization: [HUSH1234]}}}]",
    "consumers: [{name: a, topics: [t], sink: {type: nats, url: 'nats://x', subject: a, credentials: [HUSH1234]}}]",
    "consumers: [{name: a, topics: [t], sink: 'https://HUSH1234'}]",
    "store: {dsn: [HUSH1234]}",
    "store: [HUSH1234]",
])  # fmt: skip
def test_no_secret_is_shown(tmp_path: Path, section: str) -> None:
    shown = "\n".join(messages(tmp_path, f"{TOP}{section}\n"))
    assert "HUSH" not in shown and "12345678" not in shown


def test_what_is_no_secret_is_shown(tmp_path: Path) -> None:
    section = "alerts: {every: often, to: [{name: 'a b', urls: ['json://x'], severity: high}], rules: {dead_letters: {above: x}}}"
    shown = "\n".join(messages(tmp_path, f"{TOP}{section}\n"))
    assert "'often'" in shown and "'a b'" in shown and "'high'" in shown and "'x'" in shown
