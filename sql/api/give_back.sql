-- give_back(consumer, receipts): give back deliveries whose handling has not begun.
--
-- Such a delivery does not count: deliver_count is reduced to its value before the delivery. For
-- example, a client takes ten messages and is stopped while it handles the first one. It gives nine
-- back, however often that happens. The messages are visible at once, and waiting receivers are
-- woken.
--
-- In fifo the later messages of the same key in the same claim are given back too. Their deliveries
-- do not count either. A stale receipt is skipped and not counted. Internal: the Python clients
-- call it. Applications use nack() and extend().
--
-- Parameters:
--   consumer  the name of a queue or fifo consumer
--   receipts  texts of the column receipt of receive(), for example 17-4
-- Returns: the number of these receipts whose messages were given back.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB003  one of the texts is not a receipt
--   CB005  the isolation level is above READ COMMITTED
--   CB008  the caller may not read this consumer
-- Locks: the leases, in the same way as ack().
create or replace function give_back(consumer text, receipts text[]) returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    given_back int;
begin
    perform require_read_committed('give_back()');
    given_back := give_back_uncounted(c, receipts, moment());
    if given_back > 0 then
        perform pg_notify(store_schema(), c.id::text);
    end if;
    return given_back;
end $$;
