-- peek(consumer, max_messages, delayed): show messages without delivering them.
--
-- By default these are the messages that receive() could return now. With delayed they are the
-- messages that wait for their time, the next one first: given back by nack(), or published for
-- later.
--
-- Parameters:
--   consumer      the name of a queue or fifo consumer
--   max_messages  the most rows to return, default 10
--   delayed       whether to show the messages that wait for their time, default false
-- Returns: one row per message with the columns of receive(). The receipt is null. With delayed,
-- not_visible_until is the time for which the message waits.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB008  the caller may not read this consumer
-- Locks: none.
-- Example:
--   select seq, topic, key, data from cdcbridge.peek('billing', 5);
create or replace function peek(consumer text, max_messages int default 10,
                                delayed boolean default false)
returns table (receipt text, seq bigint, topic text, key text, data json, deliver_count int,
               not_visible_until timestamptz, commit_lsn pg_lsn, ordinal int,
               commit_time timestamptz, inserted_at timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
begin
    return query execute format($query$
        select null::text, v.seq, coalesce(m.topic, r.topic),
               case when v.log_key then m.key else v.key end,
               project(coalesce(r.data, m.data), $3), v.deliver_count, v.not_visible_until,
               coalesce(m.commit_lsn, r.commit_lsn), coalesce(m.ordinal, r.ordinal),
               coalesce(m.commit_time, r.commit_time), coalesce(m.inserted_at, r.inserted_at)
        from %I($2) v
        left join messages m on m.seq = v.seq
        left join redriven r on r.consumer_id = $1 and r.seq = v.seq
        order by v.rank
        $query$, case when delayed then 'delayed_' else 'visible_' end || c.id)
    using c.id, max_messages, c.config -> 'columns';
end $$;
