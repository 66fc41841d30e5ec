-- peek_stream(consumer, max_messages, place, newest): show messages of a stream.
--
-- The call shows only messages that the group reads. It moves no offset.
--
-- Parameters:
--   consumer      the name of a stream consumer
--   max_messages  the most rows to return, default 10
--   place         where to begin, as the target of seek(). Null: after the group's offsets.
--   newest        whether to show the last messages after place, or of the whole log if place is
--                 null, default false
-- Returns: one row per message, in order of seq, with the columns of read_stream(). The receipt is
-- null.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is not a stream
--   CB004  place is not a valid target of seek()
--   CB008  the caller may not read this consumer
-- Locks: none, except the draw lock of max_safe_seq() during the call if the group reads published
-- topics.
-- Example:
--   select partition, seq, data from cdcbridge.peek_stream('audit', 5, place => '-1h');
create or replace function peek_stream(consumer text, max_messages int default 10,
                                       place text default null, newest boolean default false)
returns table (receipt text, partition int, seq bigint, topic text, key text, data json,
               commit_lsn pg_lsn, ordinal int, commit_time timestamptz, inserted_at timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    c constant consumers := stream_named(consumer, mirrors => true);
    w constant stream_wish := wish_of(c);
    -- Read in a statement of its own, before the statements that read the log.
    safe constant bigint := case when w.topics <> '{}' then max_safe_seq()
                            else 9223372036854775807 end;
    spots offsets[] := array(select n from newest_offsets(c.id) n
                             where place is null order by n.partition);
    after bigint := case when place is null then (select min(s.seq) from unnest(spots) s)
                    else seq_before(place, compacts(c.config)) end;
begin
    if newest then
        return query
            select null::text, m.partition, m.seq, m.topic, m.key, m.data, m.commit_lsn, m.ordinal,
                   m.commit_time, m.inserted_at
            from (select * from messages m
                  where m.seq > coalesce(case when place is not null then after end, 0)
                    and m.seq <= safe and is_wanted(m.topic, m.data, m.reader, w)
                  order by m.seq desc limit max_messages) m
            order by m.seq;
        return;
    end if;
    return query
        select null::text, m.partition, m.seq, m.topic, m.key, m.data, m.commit_lsn, m.ordinal,
               m.commit_time, m.inserted_at
        from messages m
        where m.seq > after and m.seq <= safe and is_wanted(m.topic, m.data, m.reader, w)
          and (place is not null
               or m.seq > (select s.seq from unnest(spots) s where s.partition = m.partition))
        order by m.seq limit max_messages;
end $$;
