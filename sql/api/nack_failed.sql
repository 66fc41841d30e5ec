-- nack_failed(consumer, receipt, reason) -> what became of a delivery whose handling failed: the how manieth it was and of how many, and
-- in how many seconds the message is visible again; or the id of the dead letter that it is now. No row where it was not in flight.
-- Does what nack() does. For a worker's log, without a second call.
create or replace function nack_failed(consumer text, receipt text, reason text)
returns table (deliver_count int, max_deliveries int, again_in float8, dead_id bigint)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
    done constant int := nack(consumer, array[receipt], null, reason);
    c constant consumers := queue_named(consumer);
    place constant bigint := split_part(receipt, '-', 1);
    allowed constant int := c.config ->> 'max_deliveries';
begin
    if done = 0 then
        return;
    end if;
    return query select d.deliver_count, allowed, extract(epoch from retry_delay(c.config, d.deliver_count))::float8, null::bigint
                 from delayed d where d.consumer_id = c.id and d.seq = place;
    if not found then
        return query select x.deliver_count, allowed, null::float8, x.id
                     from dead_messages x where x.consumer_id = c.id and x.seq = place order by x.id desc limit 1;
    end if;
end $$;
