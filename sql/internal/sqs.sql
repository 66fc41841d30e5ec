-- Functions of the SQS endpoint: receipts that outlive their timeout as in SQS, and dead letters as
-- a queue.
--
-- A dead letter that was read has a receipt such as 17-2: its id, and how often it was read. The
-- receipt is valid until the letter is read again.

-- ack_late(consumer, receipts) -> how many messages were finished.
--
-- As ack(), but a receipt is valid until its message is delivered again, even if its visibility
-- timeout has passed. It is for consumers of mode queue.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB003  one of the texts is not a receipt
--   CB008  the caller may not read this consumer
-- Locks: as ack().
create or replace function ack_late(consumer text, receipts text[]) returns int
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    done bigint[] := coalesce(settle_claim(c.id, receipts, '-infinity'), '{}');
    rest bigint[];
begin
    if cardinality(done) < cardinality(receipts) then
        rest := settle(c.id, parse_receipts(receipts), '-infinity');
        perform forget_redriven(c.id, rest);
        done := done || rest;
    end if;
    return cardinality(done);
end $$;

-- extend_late(consumer, receipts, visibility_timeout) -> the number of receipts whose messages are
-- invisible for the timeout, counted from now.
--
-- As extend(), but a receipt is valid until its message is delivered again. It is for consumers of
-- mode queue.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB003  one of the texts is not a receipt
--   CB008  the caller may not read this consumer
-- Locks: as extend().
create or replace function extend_late(consumer text, receipts text[], visibility_timeout interval)
returns int
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    given receipt[] := parse_receipts(receipts);
    wanted delivery[];
begin
    perform from (select distinct g.claim_id from unnest(given) g order by g.claim_id) t
    cross join lateral (
        select from leases l
        where l.consumer_id = c.id and l.claim_id = t.claim_id
        order by l.part for no key update) l;
    wanted := in_flight(c.id, given, '-infinity');
    perform extend_deliveries(c.id, wanted, later(moment(), visibility_timeout));
    return cardinality(wanted);
end $$;

-- read_letters(consumer, max_messages, visibility_timeout) -> dead letters, the oldest first.
--
-- Each stays invisible to other readers for the timeout. deliver_count is how often the letter was
-- read.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream without a sink
--   CB008  the caller may not read this consumer
-- Locks: the letters, with SKIP LOCKED.
create or replace function read_letters(consumer text, max_messages int,
                                        visibility_timeout interval)
returns table (receipt text, seq bigint, topic text, key text, data json, deliver_count int,
               commit_lsn pg_lsn, inserted_at timestamptz)
language plpgsql volatile set search_path from current set jit = off as $$
#variable_conflict use_column
declare
    c consumers := letters_named(consumer);
    moment timestamptz := moment();
    until timestamptz := later(moment, coalesce(
        visibility_timeout, make_interval(secs => (c.config ->> 'visibility_timeout')::float8)));
begin
    return query
        with chosen as materialized (
            select d.id from dead_messages d
            where d.consumer_id = c.id
              and (d.not_visible_until is null or d.not_visible_until <= moment)
            order by d.id limit max_messages for update skip locked
        ), taken as (
            update dead_messages d
            set not_visible_until = until, read_count = d.read_count + 1
            from chosen where d.consumer_id = c.id and d.id = chosen.id
            returning d.*)
        select t.id || '-' || t.read_count, t.seq, t.topic, t.key, t.data, t.read_count,
               t.commit_lsn, t.inserted_at
        from taken t order by t.id;
end $$;

-- give_back_letters(consumer, receipts): Make dead letters visible again, as if they had not been
-- read.
create or replace function give_back_letters(consumer text, receipts text[]) returns void
language plpgsql volatile set search_path from current as $$
declare
    c consumers := letters_named(consumer);
begin
    update dead_messages d set not_visible_until = null, read_count = d.read_count - 1
    from unnest(parse_receipts(receipts)) g (id, times)
    where d.consumer_id = c.id and d.id = g.id and d.read_count = g.times;
end $$;

-- extend_letters(consumer, receipts, visibility_timeout) -> how many dead letters stay invisible
-- for the timeout, counted from now.
create or replace function extend_letters(consumer text, receipts text[],
                                          visibility_timeout interval) returns int
language plpgsql volatile set search_path from current as $$
declare
    c consumers := letters_named(consumer);
    moment timestamptz := moment();
    extended int;
begin
    update dead_messages d set not_visible_until = later(moment, visibility_timeout)
    from unnest(parse_receipts(receipts)) g (id, times)
    where d.consumer_id = c.id and d.id = g.id and d.read_count = g.times
      and d.not_visible_until > moment;
    get diagnostics extended = row_count;
    return extended;
end $$;

-- purge_letters(consumer, receipts) -> how many dead letters were deleted for good.
create or replace function purge_letters(consumer text, receipts text[]) returns int
language plpgsql volatile set search_path from current as $$
declare
    c consumers := letters_named(consumer);
    purged int;
begin
    delete from dead_messages d
    using unnest(parse_receipts(receipts)) g (id, times)
    where d.consumer_id = c.id and d.id = g.id and d.read_count = g.times;
    get diagnostics purged = row_count;
    return purged;
end $$;

-- purge_queue(consumer, at_most) -> how many messages were finished without a delivery.
--
-- These are messages in flight, messages that were given back or published for later, and messages
-- that wait, at most so many of each. Call it until it returns 0.
-- Locks: as receive() and ack().
create or replace function purge_queue(consumer text, at_most int) returns int
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    done int := 0;
    receipts text[];
    gone bigint[];
begin
    receipts := array(select s || '-' || l.claim_id
                      from leases l cross join lateral unnest(l.seqs) s
                      where l.consumer_id = c.id limit at_most);
    if receipts <> '{}' then
        done := ack_late(consumer, receipts);
    end if;
    with removed as (
        delete from delayed d
        where d.consumer_id = c.id
          and d.seq = any (array(select o.seq from delayed o where o.consumer_id = c.id
                                 limit at_most for update skip locked))
        returning d.seq)
    select coalesce(array_agg(r.seq), '{}') into gone from removed r;
    perform forget_redriven(c.id, gone);
    receipts := array(select r.receipt from receive(consumer, at_most, interval '1 min') r);
    if receipts <> '{}' then
        done := done + ack(consumer, receipts);
    end if;
    return done + cardinality(gone);
end $$;
