-- next_readable(consumer): return in how many seconds a stream client should read again.
--
-- No notification is sent when a lease ends, or when a transaction ends that read a partition or
-- held messages back. A client that got no rows therefore waits for a notification, but at most for
-- this time. It is the time until the first lease ends, or 0.1 if a partition with unread messages
-- has no lease, because its reader's transaction may end at any time.
--
-- Parameters:
--   consumer  the name of a stream consumer
-- Returns: seconds from now, at least 0.1 while unread messages exist, and 1 if the consumer is
-- paused. Null if the group has read everything.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is not a stream, or is a mirror
--   CB008  the caller may not read this consumer
-- Example:
--   select cdcbridge.next_readable('audit');
create or replace function next_readable(consumer text) returns float8
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set random_page_cost = 0 set seq_page_cost = 0 as $$
declare
    c constant consumers := stream_named(consumer);
    w constant stream_wish := wish_of(c);
begin
    return (select case when c.paused then 1
                   else greatest(0.1, extract(epoch from
                                          min(coalesce(o.leased_until, moment())) - moment())) end
            from newest_offsets(c.id) o
            -- Lateral: a look-up per partition. An EXISTS may become a join with the whole log.
            cross join lateral (select from messages m
                                where m.partition = o.partition and m.seq > o.seq
                                  and is_wanted(m.topic, m.data, m.reader, w) limit 1) m
            having count(*) > 0);
end $$;
