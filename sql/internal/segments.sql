-- Segments: the log's partitions of 1,000,000 seqs each, made before they are needed.

-- segment_name(seq) -> the segment that a seq belongs to, made or not. No SET clause, so that it is inlined.
create or replace function segment_name(seq bigint) returns text
language sql immutable as $$
    select 'messages_' || lpad((seq / 1000000)::text, 6, '0')
$$;

-- create_segments(at) -> how many segments were made: the one of seq `at` (null: of the log's end) and the next one, where they are
-- missing. The table settings are pinned, because a publisher may call this in a session with others.
-- Raises 55P03 where another session holds the lock for longer than 500 ms: it makes a segment and has not committed.
-- Locks: SHARE UPDATE EXCLUSIVE on messages, to the end of the transaction; receivers, publishers and the bridge continue.
create or replace function create_segments(at bigint default null) returns int
language plpgsql set search_path from current set lock_timeout = '500ms' set default_tablespace = ''
set default_table_access_method = 'heap' as $$
declare
    size constant bigint := 1000000;
    first constant bigint := coalesce(at, (select last_value from messages_seq)) / size;
    made int := 0;
    name text;
begin
    for number in first .. first + 1 loop
        name := segment_name(number * size);
        continue when to_regclass(quote_ident(name)) is not null;
        lock table messages in share update exclusive mode; -- before CREATE TABLE: only one session at a time makes a segment
        continue when to_regclass(quote_ident(name)) is not null;
        execute format('create table %I (like messages including defaults including constraints)
                        with (autovacuum_vacuum_insert_scale_factor = 0.5)', name);
        execute format('alter table %I add check (seq >= %s and seq < %s)', name, number * size, (number + 1) * size);
        execute format('alter table messages attach partition %I for values from (%s) to (%s)',
                       name, number * size, (number + 1) * size);
        execute format('alter table %I drop constraint %I', name, name || '_seq_check');
        perform create_partition_indexes();
        made := made + 1;
    end loop;
    return made;
end $$;

-- ensure_segment(seq): a publisher makes the segments that it needs. Without a bridge nobody else does.
-- The next segment is made while the present one still has room: the others fill that while this transaction is open, since
-- they cannot see the new one before it commits. Whoever needs a segment that such a transaction has made waits for its end.
-- Raises 55P03 after 5 s of waiting. Locks: as create_segments().
create or replace function ensure_segment(seq bigint) returns void
language plpgsql volatile set search_path from current as $$
declare
    until constant timestamptz := clock_timestamp() + interval '5 s';
begin
    if to_regclass(segment_name(seq)) is not null
        and exists (select from pg_locks l where l.relation = 'messages'::regclass and l.mode = 'ShareUpdateExclusiveLock'
                    and l.granted and l.pid <> pg_backend_pid())
    then
        return; -- another session is making the next one; there is time
    end if;
    loop
        begin
            perform create_segments(seq);
            return;
        exception
            when lock_not_available then
                exit when to_regclass(segment_name(seq)) is not null; -- a later publisher makes the next one
                if clock_timestamp() > until then
                    raise exception 'the segment of seq % is not there: a transaction that makes it, or locks the log, is open: pid %',
                        seq, (select string_agg(distinct l.pid::text, ', ') from pg_locks l
                              where l.relation = 'messages'::regclass and l.granted and l.pid <> pg_backend_pid()
                                and l.mode not in ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock'))
                        using errcode = 'lock_not_available', hint = 'End that transaction, and publish again.';
                end if;
        end;
    end loop;
end $$;

-- create_partition_indexes(only_one) -> whether one was made: what groups read the log by, on each segment that has none.
-- Without groups nobody pays for it. only_one: on the first such segment alone, before there is a group.
-- Raises 55P03 where a transaction has written into the segment, or makes a segment or an index, and stays open for 500 ms. Names it.
-- Locks: SHARE on a segment while its index is made: the bridge waits for the last one's, about a second for a full one.
-- SHARE UPDATE EXCLUSIVE on messages, so that only one session at a time makes an index.
create or replace function create_partition_indexes(only_one boolean default false) returns boolean
language plpgsql volatile set search_path from current set lock_timeout = '500ms' as $$
declare
    segment regclass;
    index text;
begin
    for segment in select s from log_segments() s where only_one or exists (select from consumers c where c.mode = 'stream') loop
        index := (select c.relname || '_partition' from pg_class c where c.oid = segment);
        continue when to_regclass(quote_ident(index)) is not null; -- not IF NOT EXISTS, which locks first
        lock table messages in share update exclusive mode;
        continue when to_regclass(quote_ident(index)) is not null;
        execute format('create index %I on %s (partition, seq)', index, segment);
        if only_one then
            return true;
        end if;
    end loop;
    return false;
exception
    when lock_not_available then
        raise exception 'an index on % has to wait for transactions that published, or make one too, and stay open: pid %', segment,
            (select string_agg(distinct l.pid::text, ', ') from pg_locks l
             where l.granted and l.pid <> pg_backend_pid()
               and (l.relation = segment and l.mode = 'RowExclusiveLock'
                    or l.relation = 'messages'::regclass and l.mode = 'ShareUpdateExclusiveLock'))
            using errcode = 'lock_not_available', hint = 'End them, and try again.';
end $$;
