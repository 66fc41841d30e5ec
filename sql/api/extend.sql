-- extend(consumer, receipts, visibility_timeout) -> how many deliveries were prolonged, counted from now.
-- Zero makes them visible at once. In fifo all that the claim holds of their keys goes with them.
-- Raises CB001, CB002, CB003, CB004, CB005 (isolation level above READ COMMITTED), CB008. Locks: the leases.
create or replace function extend(consumer text, receipts text[], visibility_timeout interval) returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    given record := parse_receipts(receipts);
    moment timestamptz := moment();
    wanted delivery[];
begin
    perform require_read_committed('extend()');
    if visibility_timeout is null or visibility_timeout < interval '0' then
        raise exception 'visibility_timeout is %; it must not be negative', coalesce(visibility_timeout::text, 'null')
            using errcode = 'CB004';
    end if;
    perform refuse_too_long('visibility_timeout', visibility_timeout);
    -- First the locks, in one order, then what there is.
    perform from (select distinct t as token from unnest(given.tokens) t order by t) t cross join lateral (
        select from leases l where l.consumer_id = c.id and l.token = t.token and l.not_visible_until > moment
        order by l.part for no key update) l;
    wanted := in_flight(c.id, given.tokens, given.seqs, moment);
    if c.mode = 'fifo' then
        perform extend_deliveries(c.id, key_mates(c.id, wanted), later(moment, visibility_timeout));
    else
        perform extend_deliveries(c.id, wanted, later(moment, visibility_timeout));
    end if;
    return cardinality(wanted);
end $$;
