-- Consumers: adding one, removing one, and the functions that each queue and fifo consumer has for itself.

-- lock_consumers(): one change of consumers at a time, to the end of the transaction. Take it before the fence, and before all else.
-- Raises CB005 (isolation level above READ COMMITTED).
create or replace function lock_consumers() returns void
language plpgsql volatile set search_path from current as $$
begin
    perform require_read_committed('a change of consumers');
    perform pg_advisory_xact_lock('consumers'::regclass::oid::bigint << 32 | 1);
end $$;

-- note_consumer_change(): publishers whose snapshot does not see this transaction are refused from now on. Call it last, under
-- lock_consumers(): so the last noted transaction is the last one that commits.
create or replace function note_consumer_change() returns void
language sql volatile set search_path from current as $$
    select setval('consumers_xid_seq', pg_current_xact_id()::text::bigint)
$$;

-- mend_consumer_change(): in a store that was restored on another server the noted transaction may lie in the future. Call it under
-- lock_consumers().
create or replace function mend_consumer_change() returns void
language sql volatile set search_path from current as $$
    select setval('consumers_xid_seq', pg_snapshot_xmin(pg_current_snapshot())::text::bigint - 1)
    where pg_sequence_last_value('consumers_xid_seq') >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint
$$;

-- sees_consumers() -> whether the caller's snapshot sees the last change of consumers.
create or replace function sees_consumers() returns boolean
language sql volatile as $$
    select coalesce(pg_visible_in_snapshot(pg_sequence_last_value('consumers_xid_seq')::text::xid8, pg_current_snapshot()), true)
$$;

-- add_consumer(name, mode, config) -> its id. Makes its partitions and its functions, or a group's offsets. make_dispatch() must follow in the same
-- transaction. Locks: SHARE UPDATE EXCLUSIVE on waiting and dead_messages: readers, publishers and the bridge go on.
create or replace function add_consumer(name text, mode text, config jsonb) returns int
language plpgsql set search_path from current as $$
declare
    new_id int;
begin
    perform require_read_committed('add_consumer()');
    insert into consumers (name, mode, config) values (name, mode, config) returning id into new_id;
    if mode = 'stream' then
        perform begin_group(new_id, config);
        return new_id;
    end if;
    -- Attached, not made as a partition, which would lock everybody out of the parent until the transaction ends.
    execute format('create table %I (like waiting including all)
                    with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
                          autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off)', 'waiting_' || new_id);
    execute format('alter table waiting attach partition %I for values in (%s)', 'waiting_' || new_id, new_id);
    if mode = 'fifo' then
        execute format('create index %I on %I (ord, tie) where barrier', 'barriers_' || new_id, 'waiting_' || new_id);
        execute format('create index %I on %I (not_before) where not_before is not null',
                       'later_' || new_id, 'waiting_' || new_id);
    end if;
    execute format('create table %I (like dead_messages including all)', 'dead_messages_' || new_id);
    execute format('alter table dead_messages attach partition %I for values in (%s)', 'dead_messages_' || new_id, new_id);
    insert into hints (consumer_id, waiting_floor, token_floor, tokens) values (new_id, 0, 0, '{}');
    perform make_consumer_code(new_id);
    return new_id;
end $$;

-- make_consumer_code(id): the functions that work on the consumer's own partition. Static SQL on a table of its own is
-- planned once a session; on the partitioned table every call would lock all partitions, or be planned anew.
create or replace function make_consumer_code(id int) returns void
language plpgsql set search_path from current as $$
declare
    template text;
begin
    for template in select t.code from code_templates t where t.name like 'per_consumer/%' loop
        execute replace(template, '__id__', id::text);
    end loop;
end $$;

-- make_code(): all of it, when this version's functions replace another's.
create or replace function make_code() returns void
language sql set search_path from current as $$
    select make_consumer_code(id) from consumers where mode <> 'stream';
    select make_dispatch();
$$;

-- make_dispatch(): the functions that call a consumer's own claim by its id. A dynamic statement would be parsed and planned
-- anew at each claim; these find the call by halves, with comparisons alone.
-- Locks: other changes of consumers, to the end of the transaction.
create or replace function make_dispatch() returns void
language plpgsql set search_path from current as $$
declare
    template record;
    call text;
    otherwise text;
begin
    perform lock_consumers();
    for template in select t.name, t.code from code_templates t where t.name like 'dispatch/%' loop
        if template.name = 'dispatch/claim_waiting' then
            call := 'k := claim_waiting_<id>(hint, places, taken, claimed, moment, until);';
            otherwise := 'execute format(''select * from claim_waiting_%s($1, $2, $3, $4, $5, $6)'', consumer_id) into k
                          using hint, places, taken, claimed, moment, until;';
        else
            call := 'taken := claim_in_order_<id>(hint, places, taken, claimed, moment, until, safe);';
            otherwise := 'execute format(''select claim_in_order_%s($1, $2, $3, $4, $5, $6, $7)'', consumer_id) into taken
                          using hint, places, taken, claimed, moment, until, safe;';
        end if;
        execute replace(template.code, '__calls__', call_by_id(
            array(select c.id from consumers c
                  where c.mode = case template.name when 'dispatch/claim_waiting' then 'queue' else 'fifo' end order by c.id),
            call, otherwise));
    end loop;
end $$;

-- call_by_id(ids, call, otherwise) -> PL/pgSQL that finds consumer_id among the ids, which rise, and does the call with <id>
-- replaced. Otherwise: a session that stays in its transaction can have an older version, from before the consumer was added.
create or replace function call_by_id(ids int[], call text, otherwise text) returns text
language plpgsql immutable set search_path from current as $$
declare
    middle constant int := cardinality(ids) / 2 + 1;
begin
    if cardinality(ids) > 1 then
        return format('if consumer_id < %s then %s else %s end if;', ids[middle],
                      call_by_id(ids[:middle - 1], call, otherwise), call_by_id(ids[middle:], call, otherwise));
    end if;
    return format('if consumer_id = %s then %s else %s end if;', coalesce(ids[1], 0),
                  replace(call, '<id>', ids[1]::text), otherwise);
end $$;

-- remove_consumer(name): the consumer, what waits for it, what it has in flight and its dead letters are gone at once.
-- Raises CB001, CB005, and 55P03 where a transaction uses the consumer or the log for longer than 500 ms: roll back and try again.
-- Locks, in this order: lock_consumers(); for a queue SHARE on messages, ACCESS EXCLUSIVE on the consumer's own tables, then on
-- waiting and dead_messages; else a group's partitions. So no transaction is open that uses what goes.
create or replace function remove_consumer(name text) returns void
language plpgsql set search_path from current set lock_timeout = '500ms' as $$
declare
    consumer consumers;
    code text;
begin
    perform lock_consumers();
    consumer := consumer_named(name);
    if consumer.mode <> 'stream' then
        lock table only messages in share mode; -- a publisher looks for its consumers after it has locked messages
        execute format('lock table %I, %I in access exclusive mode', 'waiting_' || consumer.id, 'dead_messages_' || consumer.id);
        lock table only waiting, only dead_messages in access exclusive mode;
    end if;
    perform pg_advisory_xact_lock(partition_lock(consumer.id, o.partition)) from newest_offsets(consumer.id) o;
    for code in select p.oid::regprocedure from pg_proc p
                where p.pronamespace = current_schema()::regnamespace
                  and p.proname = any (array(
                      select f || '_' || consumer.id
                      from unnest('{live_waiting,find_floor,claim_waiting,claim_in_order,free_messages,remove_front,
                                    cut_up,claim_barrier,visible,delayed}'::text[]) f))
    loop
        execute 'drop function ' || code;
    end loop;
    -- A stream has none. DROP TABLE IF EXISTS would say so to whoever removes it.
    foreach code in array array['waiting_' || consumer.id, 'dead_messages_' || consumer.id] loop
        continue when to_regclass(quote_ident(code)) is null;
        execute format('drop table %I', code);
    end loop;
    delete from offsets where consumer_id = consumer.id;
    delete from leases where consumer_id = consumer.id;
    delete from settled where consumer_id = consumer.id;
    delete from delayed where consumer_id = consumer.id;
    delete from redriven where consumer_id = consumer.id;
    delete from hints where consumer_id = consumer.id;
    delete from consumers where id = consumer.id;
    perform make_dispatch();
    perform note_consumer_change();
end $$;
