-- Mirrors: how the applier of a mirror reads the log, and how far it has applied it.
--
-- Only the mirrors' process calls these functions, and it connects as the owner of the store. A
-- mirror reads all partitions of the log together, in order of seq, because it applies whole
-- transactions.

-- mark_transactions(commit_lsns, sources, mirrors, lsns, effective_times): Store notes about
-- transactions.
--
-- The bridge calls it with the transactions of one append. See the table transaction_marks.
create or replace function mark_transactions(commit_lsns pg_lsn[], sources text[], mirrors text[],
                                             lsns pg_lsn[], effective_times bigint[]) returns void
language sql as $$
    insert into transaction_marks as m (commit_lsn, source, mirror, lsn, effective_time)
    select * from unnest(commit_lsns, sources, mirrors, lsns, effective_times)
    on conflict (commit_lsn) do update
    set source = coalesce(excluded.source, m.source), mirror = coalesce(excluded.mirror, m.mirror),
        lsn = coalesce(excluded.lsn, m.lsn),
        effective_time = coalesce(excluded.effective_time, m.effective_time)
$$;

-- begin_mirror_read(consumer_id) -> how scan_mirror() is to be called in the same transaction.
--
-- Two statements, for the reasons that begin_lane_read() names.
--
-- Returns:
--   wish      the messages that the mirror takes
--   complete  the LSN before which the log has every change of each transaction
-- Locks: ACCESS SHARE on messages, to the end of the transaction.
-- Raises:
--   CB009  retention dropped messages that the mirror had not read
create or replace function begin_mirror_read(consumer_id int)
returns table (wish stream_wish, complete pg_lsn)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    c consumers;
    o offsets;
begin
    lock table only messages in access share mode;
    select x.* into c from consumers x where x.id = consumer_id;
    for o in select n.* from newest_offsets(c.id) n where n.lost is not null limit 1 loop
        perform refuse_lost(c.name, o);
    end loop;
    return query select wish_of(c), (select p.end_lsn from positions p order by p.id desc limit 1);
end $$;

-- scan_mirror(after, most, bytes, wish, complete) -> the next messages of a mirror.
--
-- Parameters:
--   after           the seq after which to read
--   most            the most messages to return
--   bytes           the function returns nothing after the message with which the stored size of
--                   the data exceeds this
--   wish, complete  from begin_mirror_read()
-- Returns: the messages of complete transactions, in order of seq. `lsn` is the commit LSN as a
-- number.
-- The function has no SET clause, so that PostgreSQL puts it into the calling statement. The
-- mirror's session has the settings instead.
create or replace function scan_mirror(after bigint, most int, bytes bigint, wish stream_wish,
                                       complete pg_lsn)
returns table (seq bigint, topic text, data text, key text, old_key text, lsn bigint, ordinal int,
               commit_time timestamptz)
language sql stable as $$
    select f.seq, f.topic, f.data::text, f.key, f.old_key, (f.commit_lsn - '0/0')::bigint,
           f.ordinal, f.commit_time
    from (select n.*, sum(pg_column_size(n.data)) over (order by n.seq rows unbounded preceding)
                          - pg_column_size(n.data) as before
          from (select m.seq, m.topic, m.data, m.key, m.old_key, m.commit_lsn, m.ordinal,
                       m.commit_time
                from messages m
                where m.seq > after and m.commit_lsn < complete
                  and is_wanted(m.topic, m.data, m.reader, wish)
                order by m.seq limit most) n) f
    where f.before < bytes
    order by f.seq
$$;

-- mirror_continues(consumer_id, after, lsn) -> whether the mirror has a message after `after` of
-- the transaction that committed at the LSN.
create or replace function mirror_continues(consumer_id int, after bigint, lsn pg_lsn)
returns boolean
language plpgsql stable
set search_path from current set jit = off
set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    w constant stream_wish := (select wish_of(c) from consumers c where c.id = consumer_id);
begin
    return coalesce((select m.commit_lsn = lsn from messages m
                     where m.seq > after and m.commit_lsn is not null
                       and is_wanted(m.topic, m.data, m.reader, w)
                     order by m.seq limit 1), false);
end $$;

-- mirror_end(consumer_id, after) -> a seq up to which the mirror has no messages after `after`, now
-- or later.
--
-- The mirror moves its offset there, so that it does not look at other consumers' messages again.
create or replace function mirror_end(consumer_id int, after bigint) returns bigint
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    safe constant bigint := max_safe_seq(); -- read before the log is
    w constant stream_wish := (select wish_of(c) from consumers c where c.id = consumer_id);
    next_one bigint;
begin
    -- A message of an unfinished transaction counts, too.
    select m.seq into next_one from messages m
    where m.seq > after and m.commit_lsn is not null and is_wanted(m.topic, m.data, m.reader, w)
    order by m.seq limit 1;
    return greatest(least(coalesce(next_one - 1, safe), safe), after);
end $$;

-- move_mirror(consumer_id, seq, target_seq, transactions, changes, conflicts, commit_time): Note
-- that the target has everything up to seq.
--
-- The offsets of all partitions move to seq, and never back, so that `lag` shows the mirror as it
-- shows a stream.
-- Locks: the partitions, to the end of the transaction.
create or replace function move_mirror(consumer_id int, seq bigint, target_seq bigint,
                                       transactions bigint, changes bigint, conflicts bigint,
                                       commit_time timestamptz) returns void
language plpgsql volatile as $$
declare
    o offsets;
begin
    for o in select n.* from newest_offsets(move_mirror.consumer_id) n
             where n.seq < move_mirror.seq order by n.partition
    loop
        perform pg_advisory_xact_lock(partition_lock(o.consumer_id, o.partition));
        o := newest_offset(o.consumer_id, o.partition);
        if o.seq < move_mirror.seq then
            perform put_offset(o, move_mirror.seq, o.leased_until);
        end if;
    end loop;
    update mirrors m
    set target_seq = coalesce(move_mirror.target_seq, m.target_seq),
        transactions = m.transactions + move_mirror.transactions,
        changes = m.changes + move_mirror.changes,
        conflicts = m.conflicts + move_mirror.conflicts,
        commit_time = coalesce(move_mirror.commit_time, m.commit_time),
        applied_at = case when move_mirror.changes > 0 then moment() else m.applied_at end,
        error = null, error_at = null
    where m.consumer_id = move_mirror.consumer_id;
end $$;

-- mirror_lock(consumer_id) -> the key of the advisory lock that the process of a mirror holds.
--
-- The lock is shared, so it keeps nobody out. It shows that the process runs.
create or replace function mirror_lock(consumer_id int) returns bigint
language sql stable as $$
    select ('mirrors'::regclass::oid::bigint << 32) | mirror_lock.consumer_id
$$;

-- mirror_runs(consumer_id) -> whether a process applies the mirror.
create or replace function mirror_runs(consumer_id int) returns boolean
language sql stable as $$
    select exists (select from pg_locks l
                   where l.locktype = 'advisory' and l.objsubid = 1
                     and l.database = (select d.oid from pg_database d
                                       where d.datname = current_database())
                     and l.classid = 'mirrors'::regclass and l.objid = mirror_runs.consumer_id::oid)
$$;

-- return_mirror(consumer_id, seq): Let the mirror read again from seq on, because its target or its
-- source has lost what came after it.
--
-- Locks: the partitions, to the end of the transaction.
create or replace function return_mirror(consumer_id int, seq bigint) returns void
language plpgsql volatile as $$
declare
    o offsets;
begin
    for o in select n.* from newest_offsets(return_mirror.consumer_id) n order by n.partition loop
        perform pg_advisory_xact_lock(partition_lock(o.consumer_id, o.partition));
        perform put_offset(newest_offset(o.consumer_id, o.partition), return_mirror.seq,
                           o.leased_until);
    end loop;
    update mirrors m set target_seq = return_mirror.seq
    where m.consumer_id = return_mirror.consumer_id;
end $$;

-- mirror_behind(seq) -> the name of a mirror that has not applied everything below seq, or null.
--
-- Retention keeps these messages, as it keeps those of a queue.
create or replace function mirror_behind(seq bigint) returns text
language sql volatile as $$
    select c.name from consumers c
    where c.mode = 'stream' and c.config ? 'mirror'
      and exists (select from newest_offsets(c.id) o
                  where o.seq < mirror_behind.seq - 1 and o.lost is null)
    order by c.id limit 1
$$;

-- forget_marks(): Delete the notes about transactions that the log does not have any more.
--
-- The newest note about each other database stays, because later transactions have seen that much.
create or replace function forget_marks() returns void
language sql volatile as $$
    delete from transaction_marks t
    where t.commit_lsn < (select m.commit_lsn from messages m where m.commit_lsn is not null
                          order by m.seq limit 1)
      and (t.source is null
           or exists (select from transaction_marks n
                      where n.source = t.source and n.mirror is not distinct from t.mirror
                        and n.commit_lsn > t.commit_lsn
                        and n.commit_lsn < (select m.commit_lsn from messages m
                                            where m.commit_lsn is not null
                                            order by m.seq limit 1)))
$$;

-- seq_of_lsn(lsn) -> the first seq whose transaction committed after the LSN, or null.
--
-- The search halves the log, because commit LSNs rise with the seqs.
create or replace function seq_of_lsn(lsn pg_lsn) returns bigint
language plpgsql stable
set search_path from current set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    low bigint := log_begin();
    high bigint := (select m.seq from messages m where m.commit_lsn is not null
                    order by m.seq desc limit 1) + 1;
    middle bigint;
    found record;
begin
    while low < high loop
        middle := (low + high) / 2;
        select m.seq, m.commit_lsn into found from messages m
        where m.seq >= middle and m.commit_lsn is not null order by m.seq limit 1;
        if found.commit_lsn <= lsn then
            low := found.seq + 1;
        else
            high := middle;
        end if;
    end loop;
    return (select m.seq from messages m where m.seq >= low and m.commit_lsn > lsn
            order by m.seq limit 1);
end $$;

-- own_writes(topic, keys, source, after) -> the last write of each key that was made here.
--
-- The mirror of the other side calls the function, in the store of its target. It reads only the
-- transactions that committed after the LSN `after`, and leaves out those that a mirror applied
-- from `source`. A truncate is a delete of every key. An update that changed a key deletes the old
-- key.
--
-- Parameters:
--   topic   the table, for example public.orders
--   keys    the keys, as messages.key has them; null: all keys that were written
--   source  the identity of the database from which the mirror applies changes
--   after   a commit LSN
-- Returns: one row per key that was written.
--   lsn             the commit LSN of the write
--   effective_time  in microseconds since 2000-01-01 UTC
create or replace function own_writes(topic text, keys text[], source text, after pg_lsn)
returns table (key text, op text, lsn pg_lsn, ordinal int, effective_time bigint, data json)
language plpgsql stable
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    first constant bigint := seq_of_lsn(after);
begin
    return query
        with own as (
            select m.seq, m.key, m.old_key, op_of(m.data) as op, m.commit_lsn, m.ordinal,
                   coalesce(t.effective_time,
                            (extract(epoch from m.commit_time) * 1000000)::bigint
                                - 946684800000000) as at, m.data
            from messages m left join transaction_marks t on t.commit_lsn = m.commit_lsn
            where m.seq >= first and m.topic = own_writes.topic and m.reader is null
              and m.xid is not null and t.source is distinct from own_writes.source
        ), each as (
            select o.seq, o.key, o.op, o.commit_lsn, o.ordinal, o.at, o.data from own o
            where o.key is not null and (keys is null or o.key = any (keys))
            union all
            select o.seq, o.old_key, 'delete', o.commit_lsn, o.ordinal, o.at, o.data from own o
            where o.old_key is not null and o.old_key <> o.key
              and (keys is null or o.old_key = any (keys))
            union all
            select o.seq, k, 'delete', o.commit_lsn, o.ordinal, o.at, o.data
            from own o cross join unnest(keys) k where o.op = 'truncate'
        )
        select distinct on (e.key) e.key, e.op, e.commit_lsn, e.ordinal, e.at, e.data
        from each e order by e.key, e.seq desc;
end $$;
