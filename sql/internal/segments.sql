-- Segments: the log's partitions of 1,000,000 seqs each. They are made before they are needed.

-- segment_name(seq) -> the name of the segment for this seq, whether it exists or not.
--
-- The function has no SET clause, so that PostgreSQL inlines it.
create or replace function segment_name(seq bigint) returns text
language sql immutable as $$
    select 'messages_' || lpad((seq / 1000000)::text, 6, '0')
$$;

-- create_segments(at) -> the number of segments made.
--
-- The function makes the segment of the seq `at` and the next one, if they are missing. If `at` is
-- null, the segment at the end of the log is meant. The function sets default_tablespace and
-- default_table_access_method, because a publisher's session may have other values.
-- Raises: 55P03 if another session holds the lock for longer than 500 ms. That session is making a
-- segment and has not committed.
-- Locks: SHARE UPDATE EXCLUSIVE on messages, to the end of the transaction. Receivers, publishers
-- and the bridge continue.
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
        -- Before CREATE TABLE, so that only one session at a time makes a segment.
        lock table messages in share update exclusive mode;
        continue when to_regclass(quote_ident(name)) is not null;
        execute format('create table %I (like messages including defaults including constraints)
                        with (autovacuum_vacuum_insert_scale_factor = 0.5)', name);
        execute format('alter table %I add check (seq >= %s and seq < %s)',
                       name, number * size, (number + 1) * size);
        execute format('alter table messages attach partition %I for values from (%s) to (%s)',
                       name, number * size, (number + 1) * size);
        execute format('alter table %I drop constraint %I', name, name || '_seq_check');
        perform create_partition_indexes();
        made := made + 1;
    end loop;
    return made;
end $$;

-- ensure_segment(seq): Make the segments that a publisher needs, because there may be no bridge.
--
-- The next segment is made while the present one still has room. Other transactions cannot see the
-- new segment before this transaction commits, and continue to fill the present one. A publisher
-- that needs the new segment waits until the transaction that made it ends.
-- Raises: 55P03 if the segment of the seq is still missing after 5 s. The message names the open
-- transactions that make the segment or lock the log.
-- Locks: as create_segments().
create or replace function ensure_segment(seq bigint) returns void
language plpgsql volatile set search_path from current as $$
declare
    until constant timestamptz := clock_timestamp() + interval '5 s';
begin
    if to_regclass(segment_name(seq)) is not null
        and exists (select from pg_locks l
                    where l.relation = 'messages'::regclass and l.mode = 'ShareUpdateExclusiveLock'
                    and l.granted and l.pid <> pg_backend_pid())
    then
        return; -- another session is making the next segment, and there is time
    end if;
    loop
        begin
            perform create_segments(seq);
            return;
        exception
            when lock_not_available then
                -- The segment of this seq exists. A later publisher makes the next one.
                exit when to_regclass(segment_name(seq)) is not null;
                if clock_timestamp() > until then
                    raise exception 'the log has no segment for seq % yet, because a transaction '
                        'that creates it or locks the log is open (pid %)',
                        seq, (select string_agg(distinct l.pid::text, ', ') from pg_locks l
                              where l.relation = 'messages'::regclass and l.granted
                                and l.pid <> pg_backend_pid() and l.mode not in (
                                    'AccessShareLock', 'RowShareLock', 'RowExclusiveLock'))
                        using errcode = 'lock_not_available',
                              hint = 'End that transaction, and publish again.';
                end if;
        end;
    end loop;
end $$;

-- create_partition_indexes(only_one): Make the missing indexes by which groups read the log.
--
-- Each segment without such an index gets one if there is a group. A store without groups has no
-- indexes to maintain. With only_one, only the first segment without an index gets one, even before
-- there is a group.
-- Returns: with only_one, whether an index was made. Otherwise false.
-- Raises: 55P03 if another transaction remains open for 500 ms that has written into the segment,
-- or that makes a segment or an index. The message names its pid.
-- Locks: SHARE on a segment while its index is made. The bridge waits for the index of the last
-- segment, about a second for a full one. SHARE UPDATE EXCLUSIVE on messages, so that only one
-- session at a time makes an index.
create or replace function create_partition_indexes(only_one boolean default false) returns boolean
language plpgsql volatile set search_path from current set lock_timeout = '500ms' as $$
declare
    segment regclass;
    index text;
begin
    for segment in
        select s from log_segments() s
        where only_one or exists (select from consumers c where c.mode = 'stream')
    loop
        index := (select c.relname || '_partition' from pg_class c where c.oid = segment);
        -- Not IF NOT EXISTS, which takes the lock first.
        continue when to_regclass(quote_ident(index)) is not null;
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
        raise exception 'the index of % cannot be created yet, because transactions that publish '
            'or create an index are open (pid %)', segment,
            (select string_agg(distinct l.pid::text, ', ') from pg_locks l
             where l.granted and l.pid <> pg_backend_pid()
               and (l.relation = segment and l.mode = 'RowExclusiveLock'
                    or l.relation = 'messages'::regclass and l.mode = 'ShareUpdateExclusiveLock'))
            using errcode = 'lock_not_available', hint = 'End these transactions.';
end $$;
