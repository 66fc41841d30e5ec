-- A consumer in plain SQL: psql -v ON_ERROR_STOP=1 -v consumer=billing -f examples/consumer.sql
-- Keeps a copy of rows by their column id. A table without one stops it, and nothing is acked. Takes up to 100 messages, applies them, and acks them, in one transaction: all of it
-- happens, or nothing. Run it again until it acks nothing: a truncate comes alone. It needs a consumer with `mode: fifo`, and it writes into a schema of its own, which no consumer takes.

create schema if not exists shop_effects;
create table if not exists shop_effects.copies (topic text, id text, record jsonb not null, primary key (topic, id));

-- Whatever the server's defaults are: receive() refuses other isolation levels.
begin isolation level read committed read write;
create temporary table batch on commit drop as
    select *, row_number() over () as place, :'consumer'::text as consumer from cdcbridge.receive(:'consumer', 100);

do $$
declare
    message record;
begin
    for message in select * from batch order by place loop
        begin
            if message.data ->> 'op' in ('insert', 'update', 'read', 'delete')
               and message.data #> '{record,id}' is null and not (message.data -> 'unchanged')::jsonb ? 'id' then
                raise exception '% has no column id: this example does not fit it', message.topic
                    using detail = format('message %s: %s', message.seq, message.data), hint = 'Write your column instead of id.';
            end if;
            case message.data ->> 'op'
                when 'insert', 'update', 'read', 'message' then
                    -- An update that changes the id leaves no row under the old one.
                    delete from shop_effects.copies c where c.topic = message.topic and c.id = message.data #>> '{old,id}';
                    insert into shop_effects.copies as c
                    values (message.topic, coalesce(message.data #>> '{record,id}', message.key, message.seq::text),
                            (message.data -> 'record')::jsonb)
                    -- Columns that the message does not carry (`unchanged`) stay as they are.
                    on conflict (topic, id) do update set record = c.record || excluded.record;
                when 'delete' then
                    delete from shop_effects.copies c where c.topic = message.topic and c.id = message.data #>> '{record,id}';
                when 'truncate' then
                    delete from shop_effects.copies c where c.topic = message.topic;
                when 'gap' then
                    raise warning 'changes are missing: %', message.data -> 'record';
            end case;
        exception when data_exception or integrity_constraint_violation then -- a row that can never be applied
            perform cdcbridge.nack(message.consumer, array[message.receipt], reason => sqlerrm, dead => true);
            delete from batch b where b.receipt = message.receipt;
        end;
    end loop;
end $$;

select cdcbridge.ack(:'consumer', array(select receipt from batch), strict => true) as acked;
commit;
