-- ack(consumer, receipts, strict) -> how many messages are finished.
-- A stale receipt (expired, redelivered, or acked before) counts 0. With strict it raises CB006 instead, so that
-- the transaction which holds the message's effect rolls back with it.
-- Raises CB001, CB002, CB003 (no receipt), CB005 (fifo above READ COMMITTED), CB006, CB008; 40001 in a queue above READ
-- COMMITTED (internal/isolation.sql). Locks: the leases it removes, or shares of those that it removes a part of.
create or replace function ack(consumer text, receipts text[], strict boolean default false) returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    given record;
    acked bigint[];
    rest bigint[];
begin
    if above_read_committed() then
        if c.mode = 'fifo' then
            perform require_read_committed('ack() in fifo');
        end if;
        acked := '{}'; -- settle() marks them
    else
        acked := coalesce(settle_claim(c.id, receipts, moment()), '{}');
    end if;
    if cardinality(acked) < cardinality(receipts) then
        given := parse_receipts(receipts);
        rest := settle(c.id, given.tokens, given.seqs, moment());
        perform forget_redriven(c.id, rest);
        acked := acked || rest;
    end if;
    if strict and cardinality(acked) < cardinality(receipts) then
        given := parse_receipts(receipts);
        perform refuse_stale(consumer, given.tokens, given.seqs, acked);
    end if;
    return cardinality(acked);
end $$;
