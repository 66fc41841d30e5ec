-- group_lag(consumer): report the offset of a group in each partition, and the unread messages.
--
-- The function counts rows, so it is for people and monitors, not for every message.
--
-- Parameters:
--   consumer  the name of a stream consumer
-- Returns: one row per partition.
--   seq           the offset: the group has finished all messages up to this seq
--   messages      how many messages after the offset the group wants
--   seconds       the age of the oldest of them, or null if there is none
--   leased_until  the end of the current lease, or null if the partition is not leased
--   lost          how many messages retention dropped before the group had read them, or null if
--                 none
--   updated_at    when the offset last moved, or a lease was last taken or released
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is not a stream
--   CB008  the caller may not read this consumer
-- Example:
--   select partition, seq, messages, seconds from cdcbridge.group_lag('audit');
create or replace function group_lag(consumer text)
returns table (partition int, seq bigint, messages bigint, seconds float8, leased_until timestamptz,
               lost bigint, updated_at timestamptz)
language plpgsql volatile security definer set search_path from current as $$
#variable_conflict use_column
declare
    c constant consumers := stream_named(consumer, mirrors => true);
begin
    return query select * from group_lag_of(c.id, wish_of(c));
end $$;
