-- follow_stream(consumer, after, place, max_messages): read a stream without moving its offsets.
--
-- The messages are in order of seq, over all partitions, so one number is the whole position of a
-- reader. Any number of readers may follow a stream. Each gets all messages that the group wants.
-- No message is missed: the call stops before a seq that an open transaction may still commit.
--
-- The last row has a seq alone: the next call passes it as `after`. One call looks at 100,000
-- messages at most, so it can return that row alone although wanted messages follow. For a paused
-- consumer it always does.
-- Internal: the HTTP API calls it.
--
-- Parameters:
--   consumer      the name of a stream consumer
--   after         the position: the seq of the last message that the reader has seen or passed
--   place         where to begin if after is null, as the target of seek()
--   max_messages  the most messages to return, at least 1, default 100
-- Returns: the messages, and a row with a seq alone.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is not a stream, or is a mirror
--   CB004  max_messages is null or below 1, place is not a valid target of seek(), or the position
--          is after the end of the log
--   CB005  the isolation level is above READ COMMITTED
--   CB008  the caller may not read this consumer
--   CB009  retention may have dropped messages after the position
-- Locks: none, except the draw lock of max_safe_seq() during the call.
-- Example:
--   select seq, data from cdcbridge.follow_stream('audit', 1742);
create or replace function follow_stream(consumer text, after bigint default null,
                                         place text default 'latest', max_messages int default 100)
returns table (partition int, seq bigint, topic text, key text, data json, commit_lsn pg_lsn,
               ordinal int, commit_time timestamptz, inserted_at timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    most constant int := 100000;
    c constant consumers := stream_named(consumer);
    w constant stream_wish := wish_of(c);
    safe constant bigint := max_safe_seq();
    -- Only the bridge writes changes of tables, in the order of their seqs, so all that are visible
    -- may be shown.
    reach constant bigint := case when w.topics = '{}' then 9223372036854775807 else safe end;
    from_seq constant bigint := coalesce(after, seq_before(place, compacts(c.config)));
    window_end bigint;
    passed bigint;
    shown int := 0;
begin
    perform require_read_committed('follow_stream()');
    perform check_max_messages(max_messages);
    if from_seq < log_begin() - 1 and not compacts(c.config) then
        raise exception 'seq % of consumer % is before the beginning of the log, which is seq %',
            from_seq, quote_literal(c.name), log_begin()
            using errcode = 'CB009', hint = 'Begin again with a later place.';
    elsif from_seq > greatest(safe, coalesce(pg_sequence_last_value('messages_seq'), 0)) then
        raise exception 'seq % is after the end of the log', from_seq using errcode = 'CB004',
            hint = 'It may be a position in another log.';
    end if;
    seq := from_seq;
    if c.paused then
        return next;
        return;
    end if;
    -- In a statement after max_safe_seq(), so that all messages up to `safe` are visible.
    window_end := coalesce((select m.seq from messages m where m.seq > from_seq and m.seq <= reach
                            order by m.seq offset most - 1 limit 1), reach);
    passed := greatest(from_seq, least(window_end, safe));
    for partition, seq, topic, key, data, commit_lsn, ordinal, commit_time, inserted_at in
        select m.partition, m.seq, m.topic, m.key, m.data, m.commit_lsn, m.ordinal, m.commit_time,
               m.inserted_at
        from messages m
        where m.seq > from_seq and m.seq <= window_end and is_wanted(m.topic, m.data, m.reader, w)
        order by m.seq limit max_messages
    loop
        shown := shown + 1;
        passed := case when shown = max_messages then seq else greatest(passed, seq) end;
        return next;
    end loop;
    partition := null;
    seq := passed;
    topic := null;
    key := null;
    data := null;
    commit_lsn := null;
    ordinal := null;
    commit_time := null;
    inserted_at := null;
    return next;
end $$;
