-- The bridge's side of the store: segments, leadership, append. Called by the bridge alone.

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

-- fence_key() -> the advisory lock that an append and a change of leader exclude each other by.
create or replace function fence_key() returns bigint
language sql stable set search_path from current as $$
    select ('leaders'::regclass::oid::bigint << 32) | 1
$$;

-- advisory_holders(classid, objid, objsubid) -> the sessions that hold this advisory lock of this database.
create or replace function advisory_holders(classid oid, objid oid, objsubid int) returns setof pg_stat_activity
language sql stable as $$
    select a.* from pg_locks l join pg_stat_activity a using (pid)
    where l.locktype = 'advisory' and l.granted and l.classid = $1 and l.objid = $2 and l.objsubid = $3
      and l.database = (select oid from pg_database where datname = current_database())
$$;

-- evict_leader(silence) -> whether the session that has the lead was ended, because it has shown no sign of life for so long:
-- any statement is one. Without rights to see or end it (another role's): false, and its connection has to time out.
create or replace function evict_leader(silence interval) returns boolean
language sql volatile set search_path from current as $$
    select coalesce(bool_or(pg_terminate_backend(a.pid)), false)
    from advisory_holders('leaders'::regclass, 0, 2) a
    where clock_timestamp() - a.state_change > silence and pg_has_role(a.usename, 'member')
$$;

-- take_lead(holder, patience) -> the new epoch. From the moment it commits no older bridge can append.
-- Locks: the fence, to the end of the transaction: waits so long for an append that is under way, then ends its session. The bridge
-- that began it may be stopped or cut off in its middle.
create or replace function take_lead(holder text, patience interval default '1 s') returns bigint
language plpgsql set search_path from current set lock_timeout = '1s' as $$
declare
    new_epoch bigint;
begin
    perform require_read_committed('take_lead()');
    begin
        perform set_config('lock_timeout', (extract(epoch from patience) * 1000)::int::text, true);
        perform pg_advisory_xact_lock(fence_key());
    exception when lock_not_available then
        perform set_config('lock_timeout', '10s', true),
                pg_terminate_backend(a.pid)
        from advisory_holders('leaders'::regclass, 1, 1) a where pg_has_role(a.usename, 'member');
        perform pg_advisory_xact_lock(fence_key());
    end;
    insert into leaders (holder, pid) values (holder, pg_backend_pid()) returning epoch into new_epoch;
    delete from leaders where epoch < new_epoch - 20;
    return new_epoch;
end $$;

-- begin_append(epoch, messages) -> the first of `messages` consecutive seqs.
-- Raises CB005 (isolation level above READ COMMITTED), CB010 where a newer epoch leads.
-- Locks: the fence, and the gap guard's, to the end of the transaction.
create or replace function begin_append(epoch bigint, messages int) returns bigint
language plpgsql set search_path from current as $$
declare
    newest leaders;
    low bigint;
begin
    perform require_read_committed('begin_append()');
    perform pg_advisory_xact_lock(fence_key());
    -- A statement of its own: its snapshot is younger than the lock.
    select * into newest from leaders l order by l.epoch desc limit 1;
    if newest.epoch is distinct from begin_append.epoch then
        raise exception 'epoch % is over: % leads with epoch %', begin_append.epoch, newest.holder, newest.epoch
            using errcode = 'CB010';
    end if;
    if messages = 0 then
        return 0;
    end if;
    low := draw('messages_seq', messages);
    return low;
end $$;

-- finish_append(commit_lsn, ordinal, end_lsn, unfinished, commit_time, consumers): the position of what was appended.
-- commit_time: of the last transaction, in microseconds since 2000-01-01 UTC; null = the source had nothing more.
-- consumers: ids that got rows, for one notification on the channel named like the schema.
create or replace function finish_append(commit_lsn pg_lsn, ordinal int, end_lsn pg_lsn, unfinished jsonb,
                                         commit_time bigint, consumers text) returns void
language plpgsql set search_path from current as $$
declare
    -- From the right end of the index: dead versions that an old snapshot keeps are all to its left.
    previous constant bigint := (select p.id from positions p order by p.id desc limit 1);
begin
    insert into positions (commit_lsn, ordinal, end_lsn, unfinished, commit_time)
    values (commit_lsn, ordinal, end_lsn, unfinished,
            coalesce(timestamptz '2000-01-01 00:00:00+00' + commit_time * interval '1 microsecond', clock_timestamp()));
    delete from positions where id = previous;
    if consumers is not null then
        perform pg_notify(current_schema(), case when length(consumers) < 7900 then consumers else '' end);
    end if;
end $$;

-- keep_own(consumer_ids, seqs, keys, documents): keeps data that replaces the log's for a consumer. For example, a delete of a row that
-- left the consumer's filter. It is kept with the data of redriven messages, but in the message's own place: tie is 0.
create or replace function keep_own(consumer_ids int[], seqs bigint[], keys text[], documents text[]) returns void
language sql set search_path from current as $$
    insert into redriven (consumer_id, seq, topic, key, data, commit_lsn, ordinal, commit_time, inserted_at, ord)
    select o.consumer_id, m.seq, m.topic, o.key, o.document::json, m.commit_lsn, m.ordinal, m.commit_time, m.inserted_at, m.seq
    from unnest(consumer_ids, seqs, keys, documents) as o (consumer_id, seq, key, document)
    join messages m on m.seq = o.seq
$$;

-- bury_appended(consumer_ids, seqs, reasons, keys): dead letters of messages that are in the log; keys are the consumers'.
create or replace function bury_appended(consumer_ids int[], seqs bigint[], reasons text[], keys text[]) returns void
language sql set search_path from current as $$
    with own as (
        delete from redriven r using unnest(consumer_ids, seqs) as d (consumer_id, seq)
        where r.consumer_id = d.consumer_id and r.seq = d.seq
        returning r.consumer_id, r.seq, r.data)
    insert into dead_messages (consumer_id, seq, topic, key, data, deliver_count, reason, history, commit_lsn, ordinal,
                               commit_time, inserted_at)
    select d.consumer_id, m.seq, m.topic, d.key, coalesce(o.data, m.data), 0, d.reason, '[]', m.commit_lsn, m.ordinal,
           m.commit_time, m.inserted_at
    from unnest(consumer_ids, seqs, reasons, keys) as d (consumer_id, seq, reason, key)
    join messages m on m.seq = d.seq
    left join own o on o.consumer_id = d.consumer_id and o.seq = d.seq
    order by m.seq, d.consumer_id
$$;

-- delay_appended(consumer_ids, seqs, keys, times): messages of the log that are delivered from these times on, as publish() does it with
-- deliver_at. Beyond store.max_retention they are dead letters.
create or replace function delay_appended(consumer_ids int[], seqs bigint[], keys text[], times timestamptz[]) returns void
language plpgsql set search_path from current as $$
declare
    moment constant timestamptz := moment();
    most constant interval := (select l.max_retention from limits l);
    last constant timestamptz := later(moment, most);
begin
    perform bury_appended(array_agg(d.consumer_id), array_agg(d.seq), array_agg(
                format('undecodable: deliver_at is %s, more than %s ahead', time_text(d.at), justify_hours(most))), array_agg(d.key))
    from unnest(consumer_ids, seqs, keys, times) as d (consumer_id, seq, key, at) where d.at > last;
    insert into delayed (consumer_id, seq, key, deliver_count, last_delivered_at, visible_at, history, inserted_at, ord)
    select d.consumer_id, d.seq, d.key, 0, '-infinity', greatest(d.at, moment), '[]', moment, d.seq
    from unnest(consumer_ids, seqs, keys, times) as d (consumer_id, seq, key, at)
    join consumers c on c.id = d.consumer_id and c.mode = 'queue' where d.at <= last;
    insert into waiting (consumer_id, ord, seqs, keys, not_before)
    select d.consumer_id, d.seq, array[d.seq], array[d.key], case when d.at > moment then d.at end
    from unnest(consumer_ids, seqs, keys, times) as d (consumer_id, seq, key, at)
    join consumers c on c.id = d.consumer_id and c.mode = 'fifo' where d.at <= last;
end $$;

-- insert_barriers(consumer_ids, seqs): truncates, for fifo consumers: behind all before them, before all behind them.
create or replace function insert_barriers(consumer_ids int[], seqs bigint[]) returns void
language sql set search_path from current as $$
    insert into waiting (consumer_id, ord, seqs, keys, barrier)
    select b.consumer_id, b.seq, array[b.seq], array[null::text], true
    from unnest(consumer_ids, seqs) as b (consumer_id, seq)
$$;
