-- ack(consumer, receipts, strict): finish the deliveries with these receipts.
--
-- A receipt is stale when its visibility timeout has passed, or when its message was delivered
-- again, acked or given back before. A stale receipt is not counted. With strict it raises CB006
-- instead, so that the transaction that contains the message's effect rolls back together with the
-- ack.
--
-- Parameters:
--   consumer  the name of a queue or fifo consumer
--   receipts  texts of the column receipt of receive(), for example 17-4
--   strict    whether a stale receipt raises CB006, default false
-- Returns: the number of messages that this call finished.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB003  one of the texts is not a receipt
--   CB005  the consumer is fifo, and the isolation level is above READ COMMITTED
--   CB006  strict, and a receipt is stale
--   CB008  the caller may not read this consumer
--   40001  queue consumers above READ COMMITTED: another session acked, gave back, extended or
--          received one of these messages since the transaction's snapshot
--          (sql/internal/isolation.sql). Run the transaction again.
-- Locks: the leases that it removes. A lease of which it finishes only some messages is locked FOR
-- KEY SHARE.
-- Example:
--   begin;
--   insert into invoices (order_id) values (17);
--   select cdcbridge.ack('billing', array['17-4'], strict => true);
--   commit;
create or replace function ack(consumer text, receipts text[], strict boolean default false)
returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    given receipt[];
    acked bigint[];
    rest bigint[];
begin
    if above_read_committed() then
        if c.mode = 'fifo' then
            perform require_read_committed('ack() in fifo');
        end if;
        acked := '{}'; -- settle() below finishes all of them, by marks
    else
        acked := coalesce(settle_claim(c.id, receipts, moment()), '{}');
    end if;
    if cardinality(acked) < cardinality(receipts) then
        given := parse_receipts(receipts);
        rest := settle(c.id, given, moment());
        perform forget_redriven(c.id, rest);
        acked := acked || rest;
    end if;
    if strict and cardinality(acked) < cardinality(receipts) then
        given := parse_receipts(receipts);
        perform refuse_stale(consumer, given, acked);
    end if;
    if count_acked(c.id, cardinality(acked)) is null then
        null;
    end if;
    return cardinality(acked);
end $$;
