-- dead_ids(consumer, topic, key, reason): find dead letters by topic, key or reason.
--
-- A filter that is null matches every dead letter.
--
-- Parameters:
--   consumer  the name of a queue or fifo consumer
--   topic     only dead letters of this topic
--   key       only dead letters with this key
--   reason    only dead letters whose reason begins with this text
-- Returns: one row per dead letter, in log order.
--   id             the id of the dead letter
--   filter_failed  true: the consumer's filter failed on the message, so it was never compared
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB008  the caller may not read this consumer
-- Example:
--   select id from cdcbridge.dead_ids('billing', reason => 'max_deliveries:');
create or replace function dead_ids(consumer text, topic text default null, key text default null,
                                    reason text default null)
returns table (id bigint, filter_failed boolean)
language plpgsql volatile security definer set search_path from current set jit = off as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
begin
    return query
        select d.id, starts_with(d.reason, 'filter_error:') from dead_messages d
        where d.consumer_id = c.id and ($2 is null or d.topic = $2) and ($3 is null or d.key = $3)
          and ($4 is null or starts_with(d.reason, $4))
        order by d.seq, d.id;
end $$;
