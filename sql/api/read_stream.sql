-- read_stream(consumer, max_messages, lease): return the next messages of one free partition.
--
-- The partition is the least recently read one that is free and has messages after the group's
-- offset. A second call in the same transaction takes another partition. Without rows, the caller
-- has taken no partition. A paused consumer raises a NOTICE and returns no rows.
--
-- Without a lease, the partition belongs to the caller until its transaction ends. With
-- commit_offset() in the same transaction, reading, effect and offset are one. With a lease, the
-- partition belongs to the holder of the receipt until the time has passed.
--
-- A group that reads published topics gets only messages up to max_safe_seq(). An open transaction
-- could still commit a smaller seq, which the group would otherwise miss.
--
-- Parameters:
--   consumer      the name of a stream consumer
--   max_messages  the most messages to return, at least 1, default 100
--   lease         how long the partition belongs to the caller, at most store.max_retention. Null:
--                 until the transaction ends.
-- Returns: the messages, in order of seq.
--   receipt    the receipt for commit_offset() and extend_lease(), or null without a lease
--   partition  the partition that all these messages are in
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is not a stream, or is a mirror
--   CB004  max_messages is null or below 1, or lease is not positive or longer than
--          store.max_retention
--   CB005  the isolation level is above READ COMMITTED
--   CB008  the caller may not read this consumer
--   CB009  retention dropped messages that the group had not read. Use seek() to continue without
--          them.
-- Locks: the partition. The call never waits for it.
-- Example:
--   begin;
--   select partition, seq, data from cdcbridge.read_stream('audit', 500);
--   select cdcbridge.commit_offset('audit', 3, 1742);
--   commit;
create or replace function read_stream(consumer text, max_messages int default 100,
                                       lease interval default null)
returns table (receipt text, partition int, seq bigint, topic text, key text, data json,
               commit_lsn pg_lsn, ordinal int, commit_time timestamptz, inserted_at timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set random_page_cost = 0 set seq_page_cost = 0
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    c constant consumers := stream_named(consumer);
    w constant stream_wish := wish_of(c);
    held constant int[] := partitions_read(c.id);
    moment constant timestamptz := moment();
    upper_end bigint;
    safe bigint;
    o offsets;
    receipt_ text;
    spots offsets[];
begin
    perform check_read(max_messages, lease);
    if c.paused then
        raise notice 'consumer % is paused', quote_literal(c.name)
            using hint = format('`cdcbridge consumers resume %s` ends the pause.', c.name);
        return;
    end if;
    -- Read in a statement of its own, before the statements that read the log.
    safe := case when w.topics <> '{}' then max_safe_seq() end;
    spots := array(select n from newest_offsets(c.id) n order by n.id);
    upper_end := least(coalesce(safe, 9223372036854775807), end_of_era(w, spots));
    foreach o in array spots loop
        continue when o.partition = any (held) or o.leased_until > moment;
        if o.lost is not null then
            perform refuse_lost(c.name, o);
        end if;
        if not exists (select from messages m
                       where m.partition = o.partition and m.seq > o.seq and m.seq <= upper_end
                         and is_wanted(m.topic, m.data, m.reader, w))
        then
            perform pass_over(c.id, w, o, upper_end);
            continue;
        end if;
        continue when not pg_try_advisory_xact_lock(partition_lock(c.id, o.partition));
        -- A statement of its own: another member may have read the partition before the lock.
        o := newest_offset(c.id, o.partition);
        -- The consumer was removed, or the partition is leased.
        continue when o.id is null or o.leased_until > moment;
        if o.lost is not null then
            perform refuse_lost(c.name, o);
        end if;
        if lease is not null then
            o := put_offset(o, o.seq, later(moment, lease));
            receipt_ := o.partition || '-' || o.id;
        end if;
        return query
            select receipt_, m.partition, m.seq, m.topic, m.key, m.data, m.commit_lsn, m.ordinal,
                   m.commit_time, m.inserted_at
            from messages m
            where m.partition = o.partition and m.seq > o.seq and m.seq <= upper_end
              and is_wanted(m.topic, m.data, m.reader, w)
            order by m.seq limit max_messages;
        if found then
            perform set_partitions_read(c.id, held || o.partition);
            return;
        end if;
        if lease is not null then -- another member read all of it before the lock: end the lease
            perform put_offset(o, o.seq, null);
        end if;
    end loop;
end $$;
