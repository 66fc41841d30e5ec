-- peek_stream(consumer, max_messages, place, newest) -> messages that the group reads, in order of seq, with the columns of
-- read_stream(); receipt is null. place: as seek() takes it; null = from the group's offsets on. newest: the last ones.
-- Raises CB001, CB002, CB004 (a bad place), CB008. Moves no offset, and locks nothing.
create or replace function peek_stream(consumer text, max_messages int default 10, place text default null, newest boolean default false)
returns table (receipt text, partition int, seq bigint, topic text, key text, data json, commit_lsn pg_lsn,
               ordinal int, commit_time timestamptz, inserted_at timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
    c constant consumers := stream_named(consumer);
    w constant stream_wish := wish_of(c);
    -- A statement of its own, before those that look into the log.
    safe constant bigint := case when w.topics <> '{}' then max_safe_seq() else 9223372036854775807 end;
    spots offsets[] := array(select n from newest_offsets(c.id) n where place is null order by n.partition);
    after bigint := case when place is null then (select min(s.seq) from unnest(spots) s) else seq_before(place, compacts(c.config)) end;
begin
    if newest then
        return query
            select null::text, m.partition, m.seq, m.topic, m.key, m.data, m.commit_lsn, m.ordinal, m.commit_time, m.inserted_at
            from (select * from messages m where m.seq > coalesce(case when place is not null then after end, 0) and m.seq <= safe
                    and is_wanted(m.topic, m.data, m.reader, w) order by m.seq desc limit max_messages) m
            order by m.seq;
        return;
    end if;
    return query
        select null::text, m.partition, m.seq, m.topic, m.key, m.data, m.commit_lsn, m.ordinal, m.commit_time, m.inserted_at
        from messages m
        where m.seq > after and m.seq <= safe and is_wanted(m.topic, m.data, m.reader, w)
          and (place is not null or m.seq > (select s.seq from unnest(spots) s where s.partition = m.partition))
        order by m.seq limit max_messages;
end $$;
