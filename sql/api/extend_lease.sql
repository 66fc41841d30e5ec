-- extend_lease(consumer, partition, receipt, lease): the lease ends so long from now; the receipt stays good.
-- Raises CB001, CB002, CB003, CB004, CB006, CB008. Locks: the partition.
create or replace function extend_lease(consumer text, partition int, receipt text, lease interval) returns void
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c constant consumers := stream_named(consumer);
    at offsets;
begin
    perform check_read(1, lease);
    at := locked_offset(c, partition);
    if at.id is distinct from fence_of(receipt, partition) or at.leased_until <= moment() then
        perform refuse_lease(c.name, partition, receipt);
    end if;
    update offsets o set leased_until = later(moment(), extend_lease.lease)
    where o.consumer_id = at.consumer_id and o.partition = at.partition and o.id = at.id;
end $$;
