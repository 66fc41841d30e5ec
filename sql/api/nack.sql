-- nack(consumer, receipts, delay, reason, dead) -> how many were given back, or became dead letters.
-- delay null: min(max, initial * factor^(deliver_count - 1)) of the consumer's retry_delay. The last of max_deliveries
-- kills at once, and so does dead. In fifo the later messages of the same key in the same claim go back with the first
-- one that was given back, and their receipts are stale from then on; they are not counted here.
-- Raises CB001, CB002, CB003, CB004 (a delay that is negative, or longer than store.max_retention), CB005 (fifo above READ COMMITTED),
-- CB008; 40001 as ack() does.
-- Locks: the leases, as ack() does.
create or replace function nack(consumer text, receipts text[], delay interval default null, reason text default null,
                                dead boolean default false) returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    given record := parse_receipts(receipts);
    moment timestamptz := moment();
    last_delivery constant int := (c.config ->> 'max_deliveries')::int;
    note constant text := coalesce(reason, 'no reason given');
    nacked delivery[];
begin
    if delay < interval '0' then
        raise exception 'delay is %; it must not be negative', delay using errcode = 'CB004';
    elsif delay > interval '0' then
        perform refuse_too_long('delay', delay);
    end if;
    if above_read_committed() then
        if c.mode = 'fifo' then
            perform require_read_committed('nack() in fifo');
        end if;
        perform refuse_changed(c.id, given.tokens);
    end if;
    nacked := settle_deliveries(c.id, in_flight(c.id, given.tokens, given.seqs, moment), moment);
    nacked := array(select with_note(d, moment, note) from unnest(nacked) d);
    perform bury(c.id, array(select d from unnest(nacked) d where dead or d.deliver_count >= last_delivery),
                 case when dead then 'nacked: ' || note
                 else format('max_deliveries: nacked after delivery %s of %1$s: %s', last_delivery, note) end);
    perform delay_deliveries(c, array(select d from unnest(nacked) d
                                      where not dead and d.deliver_count < last_delivery), delay, moment);
    return cardinality(nacked);
end $$;
