-- extend(consumer, receipts, visibility_timeout): restart the visibility timeout of deliveries.
--
-- The new timeout counts from now. Zero makes the messages visible at once. In fifo it applies to
-- all messages of the same keys in the same claim. A stale receipt is skipped and not counted.
--
-- Parameters:
--   consumer            the name of a queue or fifo consumer
--   receipts            texts of the column receipt of receive(), for example 17-4
--   visibility_timeout  how long from now the messages stay invisible, at most store.max_retention
-- Returns: the number of receipts whose deliveries were extended.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB003  one of the texts is not a receipt
--   CB004  visibility_timeout is null, negative, or longer than store.max_retention
--   CB005  the isolation level is above READ COMMITTED
--   CB008  the caller may not read this consumer
-- Locks: the leases of these claims.
-- Example:
--   select cdcbridge.extend('billing', array['17-4'], '10 min');
create or replace function extend(consumer text, receipts text[], visibility_timeout interval)
returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    given receipt[] := parse_receipts(receipts);
    moment timestamptz := moment();
    wanted delivery[];
begin
    perform require_read_committed('extend()');
    if visibility_timeout is null or visibility_timeout < interval '0' then
        raise exception 'visibility_timeout is %, but must be at least 0 s',
            coalesce(visibility_timeout::text, 'null')
            using errcode = 'CB004', hint = '0 s makes the messages visible at once.';
    end if;
    perform refuse_too_long('visibility_timeout', visibility_timeout);
    -- Lock the leases first, always in the same order, and only then read them.
    perform from (select distinct g.claim_id from unnest(given) g order by g.claim_id) t
    cross join lateral (
        select from leases l
        where l.consumer_id = c.id and l.claim_id = t.claim_id and l.not_visible_until > moment
        order by l.part for no key update) l;
    wanted := in_flight(c.id, given, moment);
    if c.mode = 'fifo' then
        perform extend_deliveries(c.id, key_mates(c.id, wanted), later(moment, visibility_timeout));
    else
        perform extend_deliveries(c.id, wanted, later(moment, visibility_timeout));
    end if;
    return cardinality(wanted);
end $$;
