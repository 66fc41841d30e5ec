-- A consumer in plain SQL: psql -v ON_ERROR_STOP=1 -v consumer=billing -f examples/consumer.sql
-- Takes up to 100 messages, does something with them, and acks them, in one transaction: all of it happens, or nothing.

create table if not exists seen (seq bigint primary key, op text, record jsonb);

begin;
create temporary table batch on commit drop as
    select * from cdcbridge.receive(:'consumer', 100);
insert into seen select seq, data ->> 'op', (data -> 'record')::jsonb from batch;
select cdcbridge.ack(:'consumer', array(select receipt from batch), strict => true) as acked;
commit;
