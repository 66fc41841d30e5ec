-- nack_failed(consumer, receipt, reason): nack a failed delivery and describe the result.
--
-- The call does the same as nack() with one receipt and no delay. A worker can write the result to
-- its log without a second call.
--
-- Parameters:
--   consumer  the name of a queue or fifo consumer
--   receipt   the receipt of the delivery, for example 17-4
--   reason    a text for the history of the message
-- Returns: one row, or none if the delivery was not in flight.
--   deliver_count   which delivery it was, from 1
--   max_deliveries  how many deliveries the consumer allows
--   again_in        in how many seconds the message is visible again, or null for a dead letter
--   dead_id         the id of the dead letter that the message has become, or null if it has not
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB003  the text is not a receipt
--   CB005  the consumer is fifo, and the isolation level is above READ COMMITTED
--   CB008  the caller may not read this consumer
--   40001  as in nack()
-- Locks: the leases, in the same way as ack().
create or replace function nack_failed(consumer text, receipt text, reason text)
returns table (deliver_count int, max_deliveries int, again_in float8, dead_id bigint)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
as $$
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
    return query select d.deliver_count, allowed,
                        extract(epoch from retry_delay(c.config, d.deliver_count))::float8,
                        null::bigint
                 from delayed d where d.consumer_id = c.id and d.seq = place;
    if not found then
        return query select x.deliver_count, allowed, null::float8, x.id
                     from dead_messages x where x.consumer_id = c.id and x.seq = place
                     order by x.id desc limit 1;
    end if;
end $$;
