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
    perform count_acked(c.id, cardinality(done));
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
--   CB004  visibility_timeout is longer than store.max_retention
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
    perform refuse_too_long('visibility_timeout', visibility_timeout);
    perform from (select distinct g.claim_id from unnest(given) g order by g.claim_id) t
    cross join lateral (
        select from leases l
        where l.consumer_id = c.id and l.claim_id = t.claim_id
        order by l.part for no key update) l;
    wanted := in_flight(c.id, given, '-infinity');
    perform extend_deliveries(c.id, wanted, later(moment(), visibility_timeout));
    return cardinality(wanted);
end $$;

-- publish_batch(topic, keys, records, sqs, dedup_ids, delays) -> the seqs of messages that are
-- published to a topic, in the order of the arrays.
--
-- publish() describes the values. The planner settings are those of publish().
-- Parameters:
--   sqs     for each message, what the endpoint keeps with it
--   delays  seconds, or null
-- Locks: as publish(), and an advisory lock for each deduplication id, in the order of their keys.
-- Without it, two batches with the same ids in different orders would wait for each other.
create or replace function publish_batch(topic text, keys text[], records text[], sqs text[],
                                         dedup_ids text[], delays float8[]) returns bigint[]
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    seqs bigint[] := '{}';
begin
    perform pg_advisory_xact_lock('published'::regclass::oid::int, o.lock)
    from (select distinct hashtext(publish_batch.topic || ' ' || d) as lock
          from unnest(dedup_ids) d where d is not null order by lock) o;
    for i in 1 .. cardinality(records) loop
        seqs := seqs || publish_document(topic, keys[i], records[i]::json, sqs[i]::json, null,
                                         dedup_ids[i], make_interval(secs => delays[i]));
    end loop;
    return seqs;
end $$;

-- read_letters(consumer, max_messages, visibility_timeout) -> dead letters, the oldest first.
--
-- These are letters that nobody has read, and those whose timeout has passed, the longest ago
-- first.
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
language plpgsql volatile
set search_path from current set jit = off
set enable_seqscan = off set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
    c consumers := letters_named(consumer);
    moment timestamptz := moment();
    until timestamptz := later(moment, coalesce(
        visibility_timeout, make_interval(secs => (c.config ->> 'visibility_timeout')::float8)));
begin
    perform refuse_too_long('visibility_timeout', visibility_timeout);
    return query
        -- Each part has an index of its own, so that no letter which is invisible is looked at.
        with unread as materialized (
            select d.id from dead_messages d
            where d.consumer_id = c.id and d.not_visible_until is null
            order by d.id limit max_messages for update skip locked
        ), back as materialized (
            select d.id from dead_messages d
            where d.consumer_id = c.id and d.not_visible_until <= moment
            order by d.not_visible_until limit max_messages for update skip locked
        ), chosen as (
            select u.id from unread u union all select b.id from back b
            order by id limit max_messages
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
    perform refuse_too_long('visibility_timeout', visibility_timeout);
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

-- purge_messages(consumer, at_most) -> how many messages were finished without a delivery, and
-- whether some are left.
--
-- These are messages that wait, messages that were given back or published for later, and messages
-- in flight, at most so many rows of each. Call it until none is left. If it purged none and some
-- are left, another session has locked their rows. A paused consumer is purged too.
-- Locks: the rows that it deletes, by SKIP LOCKED.
create or replace function purge_messages(consumer text, at_most int, out purged int,
                                          out rest boolean)
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    gone bigint[];
    returned bigint[];
begin
    -- In the direction in which messages move, so that a later step finds what an earlier one
    -- missed.
    with chosen as materialized (
        select w.ord, w.tie from waiting w where w.consumer_id = c.id
        order by w.ord, w.tie limit at_most for update skip locked
    ), removed as (
        delete from waiting w using chosen o
        where w.consumer_id = c.id and w.ord = o.ord and w.tie = o.tie
        returning w.seqs)
    select coalesce(array_agg(u.seq), '{}') into gone
    from removed r cross join lateral unnest(r.seqs) as u (seq);
    with chosen as materialized (
        select d.seq from delayed d where d.consumer_id = c.id
        order by d.seq limit at_most for update skip locked
    ), removed as (
        delete from delayed d using chosen o where d.consumer_id = c.id and d.seq = o.seq
        returning d.seq)
    select coalesce(array_agg(r.seq), '{}') into returned from removed r;
    gone := gone || returned || purge_leases(c.id, at_most);
    perform forget_redriven(c.id, gone);
    purged := cardinality(gone);
    rest := exists (select from waiting w where w.consumer_id = c.id)
         or exists (select from delayed d where d.consumer_id = c.id)
         or exists (select from leases l where l.consumer_id = c.id);
end $$;

-- purge_leases(consumer_id, at_most) -> the messages of up to so many rows of leases, which are
-- deleted with their marks. Messages that were settled before are not among them.
--
-- Locks: the rows, by SKIP LOCKED. A session that settles one message of a row also locks the row.
create or replace function purge_leases(consumer_id int, at_most int) returns bigint[]
language plpgsql volatile as $$
declare
    gone bigint[];
    whole lease_id[];
begin
    with chosen as materialized (
        select l.claim_id, l.part from leases l where l.consumer_id = purge_leases.consumer_id
        order by l.claim_id, l.part limit at_most for update skip locked
    ), removed as (
        delete from leases l using chosen o
        where l.consumer_id = purge_leases.consumer_id and l.claim_id = o.claim_id
            and l.part = o.part
        returning l.claim_id, l.part, l.seqs)
    select array_agg(row(r.claim_id, r.part)::lease_id),
           (select coalesce(array_agg(u.seq), '{}')
            from removed r cross join lateral unnest(r.seqs) as u (seq))
    into whole, gone from removed r;
    return case when whole is null then '{}' else clear_marks(consumer_id, whole, gone) end;
end $$;

-- purge_all_letters(consumer, at_most) -> how many dead letters were deleted for good, at most so
-- many, and whether some are left.
--
-- Call it until none is left. If it purged none and some are left, another session has locked them.
-- Locks: the letters that it deletes, by SKIP LOCKED.
create or replace function purge_all_letters(consumer text, at_most int, out purged int,
                                             out rest boolean)
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := letters_named(consumer);
begin
    with chosen as materialized (
        select d.id from dead_messages d where d.consumer_id = c.id
        order by d.id limit at_most for update skip locked)
    delete from dead_messages d using chosen o where d.consumer_id = c.id and d.id = o.id;
    get diagnostics purged = row_count;
    rest := exists (select from dead_messages d where d.consumer_id = c.id);
end $$;
