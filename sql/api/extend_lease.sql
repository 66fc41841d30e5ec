-- extend_lease(consumer, partition, receipt, lease): restart the lease of a partition.
--
-- The new lease counts from now. The receipt stays valid.
--
-- Parameters:
--   consumer   the name of a stream consumer
--   partition  the number of the partition, as read_stream() returned it
--   receipt    the receipt of read_stream()
--   lease      how long from now the partition stays leased, at most store.max_retention
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is not a stream, or is a mirror
--   CB003  the text is not a receipt of this partition
--   CB004  lease is null, not positive or longer than store.max_retention, or the log has no such
--          partition
--   CB005  the isolation level is above READ COMMITTED
--   CB006  the receipt is missing or stale
--   CB008  the caller may not read this consumer
-- Locks: the partition. The call waits for a transaction that reads it.
-- Example:
--   select cdcbridge.extend_lease('audit', 3, '3-1207', '30 s');
create or replace function extend_lease(consumer text, partition int, receipt text, lease interval)
returns void
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c constant consumers := stream_named(consumer);
    at offsets;
begin
    perform require_read_committed('extend_lease()');
    if lease is null then
        raise exception 'lease is null, but must be more than 0 s' using errcode = 'CB004';
    end if;
    perform check_read(1, lease);
    at := locked_offset(c, partition);
    if at.id is distinct from fence_of(receipt, partition) or at.leased_until <= moment() then
        perform refuse_lease(c.name, partition, receipt);
    end if;
    update offsets o set leased_until = later(moment(), extend_lease.lease)
    where o.consumer_id = at.consumer_id and o.partition = at.partition and o.id = at.id;
end $$;
