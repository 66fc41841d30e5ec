-- nack(consumer, receipts, delay, reason, dead): give back deliveries, or make them dead letters.
--
-- The deliveries count: deliver_count keeps its value. (give_back() reduces it, for messages whose
-- handling did not begin.)
--
-- Without delay, the message is visible again after the consumer's retry_delay: the smaller of max
-- and initial * factor^(deliver_count - 1). A message whose last delivery of max_deliveries is
-- nacked becomes a dead letter at once. With dead => true every message does.
--
-- In fifo, giving back a message also gives back the later messages of its key in the same claim.
-- Their deliveries count as well, and their receipts are stale from then on. The result does not
-- include them.
--
-- Parameters:
--   consumer  the name of a queue or fifo consumer
--   receipts  texts of the column receipt of receive(), for example 17-4; null or an empty list
--             changes nothing
--   delay     how long until the message is visible again, at most store.max_retention, or null for
--             the consumer's retry_delay
--   reason    a text for the history of the message, or null for 'no reason given'
--   dead      whether the messages become dead letters, default false
-- Returns: the number of deliveries that were given back or became dead letters.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB003  one of the texts is not a receipt
--   CB004  delay is negative, or longer than store.max_retention
--   CB005  the consumer is fifo, and the isolation level is above READ COMMITTED
--   CB008  the caller may not read this consumer
--   40001  queue consumers above READ COMMITTED: another session acked, gave back, extended or
--          received one of these messages since the transaction's snapshot
--          (sql/internal/isolation.sql). Run the transaction again.
-- Locks: the leases, in the same way as ack().
-- Example:
--   select cdcbridge.nack('billing', array['18-4'], '1 hour', reason => 'printer on fire');
create or replace function nack(consumer text, receipts text[], delay interval default null,
                                reason text default null, dead boolean default false) returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    given receipt[] := parse_receipts(receipts);
    moment timestamptz := moment();
    last_delivery constant int := (c.config ->> 'max_deliveries')::int;
    note constant text := coalesce(reason, 'no reason given');
    nacked delivery[];
begin
    if delay < interval '0' then
        raise exception 'delay is %, but must be at least 0 s', delay
            using errcode = 'CB004',
                  hint = '0 s makes the messages visible at once. null means the retry_delay.';
    elsif delay > interval '0' then
        perform refuse_too_long('delay', delay);
    end if;
    if above_read_committed() then
        if c.mode = 'fifo' then
            perform require_read_committed('nack() in fifo');
        end if;
        perform refuse_changed(c.id, array(select g.claim_id from unnest(given) g));
    end if;
    nacked := settle_deliveries(c.id, in_flight(c.id, given, moment), moment);
    nacked := array(select with_note(d, moment, note) from unnest(nacked) d);
    perform bury(c.id,
                 array(select d from unnest(nacked) d
                       where dead or d.deliver_count >= last_delivery),
                 case when dead then 'nacked: ' || note
                 else format('max_deliveries: nacked after delivery %s of %1$s: %s',
                             last_delivery, note) end);
    perform delay_deliveries(c,
                             array(select d from unnest(nacked) d
                                   where not dead and d.deliver_count < last_delivery),
                             delay, moment);
    return cardinality(nacked);
end $$;
