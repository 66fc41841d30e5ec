-- Consumers: how one is added or removed, and the functions that each queue and fifo consumer has.

-- lock_consumers(): Let only one transaction at a time change consumers.
--
-- Take this lock before the fence and before every other lock.
-- Raises: CB005 if the isolation level is above READ COMMITTED.
-- Locks: the advisory lock of consumers, to the end of the transaction.
create or replace function lock_consumers() returns void
language plpgsql volatile set search_path from current as $$
begin
    perform require_read_committed('a change of consumers');
    perform pg_advisory_xact_lock('consumers'::regclass::oid::bigint << 32 | 1);
end $$;

-- note_consumer_change(): Refuse publishers whose snapshot does not see this transaction.
--
-- Call it last and under lock_consumers(). Then the last transaction noted is also the last one
-- that commits.
create or replace function note_consumer_change() returns void
language sql volatile set search_path from current as $$
    select setval('consumers_xid_seq', pg_current_xact_id()::text::bigint)
$$;

-- mend_consumer_change(): Correct the noted transaction after a restore on another server.
--
-- On another server the id of that transaction may lie in the future. Call the function under
-- lock_consumers().
create or replace function mend_consumer_change() returns void
language sql volatile set search_path from current as $$
    select setval('consumers_xid_seq', pg_snapshot_xmin(pg_current_snapshot())::text::bigint - 1)
    where pg_sequence_last_value('consumers_xid_seq')
          >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint
$$;

-- sees_consumers() -> whether the caller's snapshot sees the last change of consumers.
create or replace function sees_consumers() returns boolean
language sql volatile as $$
    select coalesce(pg_visible_in_snapshot(
        pg_sequence_last_value('consumers_xid_seq')::text::xid8, pg_current_snapshot()), true)
$$;

-- add_consumer(name, mode, config) -> the new consumer's id.
--
-- The function makes the partitions and functions of a queue or fifo consumer, or the offsets of a
-- group. make_dispatch() must follow in the same transaction.
-- Raises: CB005 if the isolation level is above READ COMMITTED.
-- Locks: SHARE UPDATE EXCLUSIVE on waiting and dead_messages, to the end of the transaction.
-- Readers, publishers and the bridge continue. For a group, the locks of begin_group().
create or replace function add_consumer(name text, mode text, config jsonb) returns int
language plpgsql set search_path from current as $$
declare
    new_id int;
begin
    perform require_read_committed('add_consumer()');
    insert into consumers (name, mode, config) values (name, mode, config) returning id into new_id;
    if mode = 'stream' then
        perform begin_group(new_id, config);
        if config ? 'sink' then
            perform make_dead_letters(new_id);
        end if;
        return new_id;
    end if;
    -- ATTACH, because CREATE TABLE ... PARTITION OF would lock the parent against all others until
    -- the transaction ends.
    execute format('create table %I (like waiting including all)
                    with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
                          autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off)',
                   'waiting_' || new_id);
    execute format('alter table waiting attach partition %I for values in (%s)',
                   'waiting_' || new_id, new_id);
    if mode = 'fifo' then
        execute format('create index %I on %I (ord, tie) where barrier',
                       'barriers_' || new_id, 'waiting_' || new_id);
        execute format('create index %I on %I (not_before) where not_before is not null',
                       'later_' || new_id, 'waiting_' || new_id);
    end if;
    execute format('create table %I (like dead_messages including all)',
                   'dead_messages_' || new_id);
    execute format('alter table dead_messages attach partition %I for values in (%s)',
                   'dead_messages_' || new_id, new_id);
    perform make_counters(new_id);
    insert into hints (consumer_id, waiting_floor, claim_floor, open_claims)
    values (new_id, 0, 0, '{}');
    perform make_consumer_code(new_id);
    return new_id;
end $$;

-- make_consumer_code(id): Create the functions that work on the consumer's own partition.
--
-- Their SQL is static and names one table, so it is planned once per session. With the partitioned
-- table, each call would lock all partitions or be planned again.
create or replace function make_consumer_code(id int) returns void
language plpgsql set search_path from current as $$
declare
    template text;
begin
    for template in select t.code from code_templates t where t.name like 'per_consumer/%' loop
        execute replace(template, '__id__', id::text);
    end loop;
end $$;

-- make_code(): Create all functions of all consumers.
--
-- `cdcbridge migrate` calls it when it replaces the functions of another version.
create or replace function make_code() returns void
language sql set search_path from current as $$
    select make_consumer_code(id) from consumers where mode <> 'stream';
    select make_dispatch();
$$;

-- make_dispatch(): Create the functions that call a consumer's own claim function by its id.
--
-- A dynamic statement would be parsed and planned at each claim. These functions find the call by
-- binary search instead, with comparisons only: the IF of the template is put into another IF for
-- each half of the ids.
-- Locks: lock_consumers().
create or replace function make_dispatch() returns void
language plpgsql set search_path from current as $$
declare
    template record;
    pieces text[]; -- the function up to its IF, the IF, and the rest
    ids int[];
begin
    perform lock_consumers();
    for template in select t.name, t.code from code_templates t where t.name like 'dispatch/%' loop
        pieces := regexp_match(template.code,
                              '^(.*?)(    if consumer_id = __id__ .*?end if;)(.*)$');
        ids := array(select c.id from consumers c
                     where c.mode = case when template.name like '%in_order' then 'fifo'
                                         else 'queue' end
                     order by c.id);
        execute pieces[1] || search_by_halves(ids, pieces[2]) || pieces[3];
    end loop;
end $$;

-- search_by_halves(ids, one) -> PL/pgSQL that finds consumer_id among the ids, which ascend.
--
-- one: an IF that compares consumer_id with __id__ and calls the function of this consumer.
create or replace function search_by_halves(ids int[], one text) returns text
language plpgsql immutable set search_path from current as $$
declare
    middle constant int := cardinality(ids) / 2 + 1;
begin
    if cardinality(ids) > 1 then
        return format('if consumer_id < %s then %s else %s end if;', ids[middle],
                      search_by_halves(ids[:middle - 1], one),
                      search_by_halves(ids[middle:], one));
    end if;
    return replace(one, '__id__', coalesce(ids[1], 0)::text);
end $$;

-- remove_consumer(name): Remove a consumer with its waiting messages, deliveries and dead letters.
--
-- No transaction that uses them can be open when they are removed, because of the locks.
--
-- Raises:
--   CB001  unknown consumer
--   CB005  the isolation level is above READ COMMITTED
--   55P03  a transaction uses the consumer or the log for longer than 500 ms: roll back and retry
-- Locks, in this order: lock_consumers(). Then, for a queue or fifo consumer, SHARE on messages,
-- ACCESS EXCLUSIVE on the consumer's own tables, and ACCESS EXCLUSIVE on waiting and dead_messages.
-- For a stream, the partitions of the group.
create or replace function remove_consumer(name text) returns void
language plpgsql set search_path from current set lock_timeout = '500ms' as $$
declare
    consumer consumers;
    code text;
begin
    perform lock_consumers();
    consumer := consumer_named(name);
    if consumer.mode <> 'stream' then
        -- A publisher looks for its consumers after it has locked messages.
        lock table only messages in share mode;
        execute format('lock table %I, %I in access exclusive mode',
                       'waiting_' || consumer.id, 'dead_messages_' || consumer.id);
        lock table only waiting, only dead_messages in access exclusive mode;
    end if;
    perform pg_advisory_xact_lock(partition_lock(consumer.id, o.partition))
    from newest_offsets(consumer.id) o;
    for code in select p.oid::regprocedure from pg_proc p
                where p.pronamespace = current_schema()::regnamespace
                  and p.proname = any (array(
                      select f || '_' || consumer.id
                      from unnest(
              '{live_waiting,find_floor,claim_waiting,claim_in_order,free_messages,remove_front,
                                    cut_up,claim_barrier,visible,delayed}'::text[]) f))
    loop
        execute 'drop function ' || code;
    end loop;
    -- A stream has no such tables. DROP TABLE IF EXISTS would raise a NOTICE for each.
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
