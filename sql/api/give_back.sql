-- give_back(consumer, receipts): give back deliveries whose handling has not begun.
--
-- Such a delivery does not count: deliver_count is reduced to its value before the delivery. For
-- example, a client takes ten messages and is stopped while it handles the first one. It gives nine
-- back, however often that happens. The messages are visible at once, and waiting receivers are
-- woken.
--
-- In fifo the later messages of the same key in the same claim are given back too. Their deliveries
-- do not count either. A stale receipt is skipped and not counted. Internal: the Python clients
-- call it. Applications use nack() and extend().
--
-- Parameters:
--   consumer  the name of a queue or fifo consumer
--   receipts  texts of the column receipt of receive(), for example 17-4
-- Returns: the number of these receipts whose messages were given back.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB003  one of the texts is not a receipt
--   CB005  the isolation level is above READ COMMITTED
--   CB008  the caller may not read this consumer
-- Locks: the leases, in the same way as ack().
create or replace function give_back(consumer text, receipts text[]) returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    given record := parse_receipts(receipts);
    moment timestamptz := moment();
    wanted delivery[];
begin
    perform require_read_committed('give_back()');
    wanted := in_flight(c.id, given.claim_ids, given.seqs, moment);
    if c.mode = 'fifo' then
        wanted := wanted || array(
            select f from unnest(followers_of(c.id, wanted)) f
            where not exists (
                select from unnest(wanted) w where w.claim_id = f.claim_id and w.seq = f.seq));
    end if;
    wanted := settle_deliveries(c.id, wanted, moment);
    if wanted = '{}' then
        return 0;
    end if;
    insert into delayed (consumer_id, seq, key, deliver_count, last_delivered_at, visible_at,
                         history, inserted_at, ord, tie, barrier, in_order)
    select c.id, d.seq, d.key, d.deliver_count - 1, case
               when d.deliver_count > 1 then d.last_delivered_at else '-infinity' end,
           moment, d.history, d.inserted_at, d.ord, d.tie, d.barrier, c.mode = 'fifo'
    from unnest(wanted) d;
    perform pg_notify(store_schema(), c.id::text);
    return (select count(*) from unnest(wanted) d
            where (d.claim_id, d.seq) in (
                select g.claim_id, g.seq
                from unnest(given.claim_ids, given.seqs) as g (claim_id, seq)));
end $$;
