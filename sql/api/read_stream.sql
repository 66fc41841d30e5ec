-- read_stream(consumer, max_messages, lease) -> up to max_messages of the least recently read free partition that has something
-- to return, in order of seq, behind the group's offset.
-- lease null: the partition is the caller's until its transaction ends; commit_offset() in the same transaction makes
-- reading, effect and offset one. With a lease it is the holder's of the receipt until the time is over.
-- A second call in a transaction takes another partition. No rows: nothing is held.
-- A group that takes published topics stops before what could still commit a smaller seq (max_safe_seq).
-- Raises CB001 (unknown consumer), CB002 (not a stream), CB004 (bad argument), CB005 (isolation level above READ COMMITTED),
-- CB008 (not this consumer's role), CB009 (retention dropped what the group had not read). Paused: a NOTICE and no rows.
-- Locks: the partition, never waited for.
create or replace function read_stream(consumer text, max_messages int default 100, lease interval default null)
returns table (receipt text, partition int, seq bigint, topic text, key text, data json, commit_lsn pg_lsn,
               ordinal int, commit_time timestamptz, inserted_at timestamptz)
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
        raise notice 'consumer % is paused', quote_literal(c.name);
        return;
    end if;
    -- A statement of its own, before those that look into the log.
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
        -- A statement of its own: another member may have read it meanwhile.
        o := newest_offset(c.id, o.partition);
        continue when o.id is null or o.leased_until > moment; -- the consumer was removed; or leased
        if o.lost is not null then
            perform refuse_lost(c.name, o);
        end if;
        if lease is not null then
            o := put_offset(o, o.seq, later(moment, lease));
            receipt_ := o.partition || '-' || o.id;
        end if;
        return query
            select receipt_, m.partition, m.seq, m.topic, m.key, m.data, m.commit_lsn, m.ordinal, m.commit_time, m.inserted_at
            from messages m
            where m.partition = o.partition and m.seq > o.seq and m.seq <= upper_end and is_wanted(m.topic, m.data, m.reader, w)
            order by m.seq limit max_messages;
        if found then
            perform set_partitions_read(c.id, held || o.partition);
            return;
        end if;
        if lease is not null then -- another member took it all between the look and the lock
            perform put_offset(o, o.seq, null);
        end if;
    end loop;
end $$;
