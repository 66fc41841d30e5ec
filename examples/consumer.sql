-- A consumer in plain SQL: psql -v ON_ERROR_STOP=1 -v consumer=billing -f examples/consumer.sql
-- Takes up to 100 messages, does something with them, and acks them, in one transaction: all of it happens, or nothing.

-- Whatever the server's defaults are: receive() refuses other isolation levels.
begin isolation level read committed read write;
create table if not exists seen (seq bigint primary key, op text, record jsonb);
create temporary table batch on commit drop as
    select * from cdcbridge.receive(:'consumer', 100);
insert into seen select seq, data ->> 'op', (data -> 'record')::jsonb from batch;
select cdcbridge.ack(:'consumer', array(select receipt from batch), strict => true) as acked;
commit;
