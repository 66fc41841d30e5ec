"""A store of an earlier version, with messages in it, is brought to this one."""

from __future__ import annotations

import psycopg

from cdcbridge.database import connect_store
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.store.migrate import migrate, migrations
from tests.harness.world import fresh_database
from tests.sql.queue import StoreQueue
from tests.sql.test_queue import seqs

# What a store of version 1 holds: seq 1 in flight, 2 given back, 3 redriven and waiting, 4 to 6 waiting; and old code.
VERSION_1 = """
    insert into schema_migrations (version, name) values (1, 'store');
    insert into schema_code (checksum, program) values ('old', '0.1');
    create function parse_receipts(receipts text[]) returns table (seq bigint, token bigint)
        language sql as 'select 1::bigint, 1::bigint';
    create view consumer_messages as select consumer_id, seq from leases;
    insert into consumers (name, mode, config) values ('c', 'queue', '{"tables": ["public.t"], "max_in_flight": 1000,
        "visibility_timeout": 30, "max_deliveries": 5, "max_message_bytes": 1048576, "operations": ["insert"],
        "retry_delay": {"initial": 1, "factor": 2, "max": 600}}');
    create table waiting_1 partition of waiting for values in (1);
    create table dead_messages_1 partition of dead_messages for values in (1);
    create table messages_000000 partition of messages for values from (0) to (1000000);
    select setval('messages_seq', 6);
    insert into messages (seq, topic, key, partition, data)
        select n, 'public.t', n::text, 1, '{"op": "insert", "record": {}, "old": null, "unchanged": []}'
        from generate_series(1, 6) n;
    insert into leases values (1, 1, '1', 77, 40, 1, now(), now() + interval '1 hour', '[]', now());
    insert into delayed (consumer_id, seq, key, deliver_count, last_delivered_at, visible_at, history, inserted_at)
        values (1, 2, '2', 1, now(), now() - interval '1 s', '[]', now());
    insert into redriven (consumer_id, seq, topic, key, data, inserted_at) values (1, 3, 'public.t', '3', '{}', now());
    insert into waiting (consumer_id, ord, seqs) values (1, 4, '{4,5,6}');
    insert into waiting (consumer_id, ord, tie, seqs, keys) values (1, 6, 1, '{3}', '{3}');
"""


def test_version_1_keeps_what_it_holds(pg15: EmbeddedServer) -> None:
    with fresh_database(pg15) as database:
        dsn = pg15.dsn(database)
        with psycopg.connect(dsn, autocommit=True) as old:
            old.execute("create schema cdcbridge; set search_path = cdcbridge")
            old.execute(migrations()[0][2].encode())
            old.execute(VERSION_1)
        with connect_store(dsn, "cdcbridge") as store:
            done = migrate(store, "cdcbridge")
            assert (done.before, done.after) == (1, migrations()[-1][0])
        queue = StoreQueue(dsn)
        assert seqs(queue.all("select seq from cdcbridge.consumer_messages order by seq")) == [1, 2, 3, 4, 5, 6]
        assert queue.ack("1-77") == 1, "a receipt of before"
        assert seqs(queue.receive()) == [2, 4, 5, 6, 3]
        queue.close()
