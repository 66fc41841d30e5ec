-- What a receiver does with its deliveries. A receipt is good for one delivery, until its visibility timeout passes.

-- ack(consumer, receipts, strict) → how many messages are finished.
-- A stale receipt (expired, redelivered, or acked before) counts 0. With strict it raises CB006 instead, so that
-- the transaction which holds the message's effect rolls back with it.
-- Raises CB001, CB002, CB003 (no receipt), CB006. Locks: the leases it removes.
create or replace function ack(consumer text, receipts text[], strict boolean default false) returns int
language plpgsql volatile set search_path from current set jit = off set enable_seqscan = off as $$
declare
    c consumers := queue_named(consumer);
    moment timestamptz := clock_timestamp();
    acked bigint[];
    given int := (select count(*) from parse_receipts(receipts));
begin
    with gone as (
        delete from leases l using parse_receipts(receipts) r
        where l.consumer_id = c.id and l.seq = r.seq and l.token = r.token and l.not_visible_until > moment
        returning l.seq)
    select coalesce(array_agg(seq), '{}') into acked from gone;
    if strict and cardinality(acked) < given then
        perform refuse_stale(consumer, receipts, acked);
    end if;
    delete from redriven d where d.consumer_id = c.id and d.seq = any (acked);
    return cardinality(acked);
end $$;

-- refuse_stale(consumer, receipts, acked): raises CB006 and names the receipts that were not among the acked.
create or replace function refuse_stale(consumer text, receipts text[], acked bigint[]) returns void
language plpgsql stable set search_path from current as $$
declare
    stale text := (select string_agg(r.seq || '-' || r.token, ', ' order by r.seq) from parse_receipts(receipts) r
                   where not r.seq = any (acked));
begin
    raise exception 'stale receipt for consumer %: %', quote_literal(consumer), stale
        using errcode = 'CB006',
              hint = 'The delivery''s visibility timeout passed, or it was acked or given back before.';
end $$;

-- nack(consumer, receipts, delay, reason, dead) → how many were given back, or became dead letters.
-- delay null: min(max, initial × factor^(deliver_count − 1)) of the consumer's retry_delay. The last of max_deliveries
-- kills at once, and so does dead.
-- Raises CB001, CB002, CB003, CB004 (negative delay). Locks: the leases it removes.
create or replace function nack(consumer text, receipts text[], delay interval default null, reason text default null,
                                dead boolean default false) returns int
language plpgsql volatile set search_path from current set jit = off set enable_seqscan = off as $$
declare
    c consumers := queue_named(consumer);
    moment timestamptz := clock_timestamp();
    last_delivery constant int := (c.config ->> 'max_deliveries')::int;
    given bigint[];
    killed bigint[];
    note text := coalesce(reason, 'no reason given');
begin
    if delay < interval '0' then
        raise exception 'delay is %; it must not be negative', delay using errcode = 'CB004';
    end if;
    with valid as materialized (
        select l.seq from leases l join parse_receipts(receipts) r on l.seq = r.seq and l.token = r.token
        where l.consumer_id = c.id and l.not_visible_until > moment
        for update of l
    ), noted as (
        update leases l
        set history = l.history || jsonb_build_object('at', moment, 'deliver_count', l.deliver_count, 'reason', note)
        from valid v where l.consumer_id = c.id and l.seq = v.seq
        returning l.seq, l.deliver_count)
    select coalesce(array_agg(seq), '{}'),
           coalesce(array_agg(seq) filter (where dead or deliver_count >= last_delivery), '{}')
    into given, killed from noted;
    perform bury(c.id, killed, case when dead then 'nacked: ' || note
                 else format('max_deliveries: nacked after delivery %s of %s: %s', last_delivery, last_delivery, note) end);
    with back as (
        delete from leases l where l.consumer_id = c.id and l.seq = any (given) returning l.*)
    insert into delayed (consumer_id, seq, key, deliver_count, last_delivered_at, visible_at, history, inserted_at)
    select b.consumer_id, b.seq, b.key, b.deliver_count, b.last_delivered_at,
           moment + coalesce(delay, retry_delay(c.config, b.deliver_count)), b.history, b.inserted_at
    from back b;
    return cardinality(given);
end $$;

-- retry_delay(config, deliver_count) → min(max, initial × factor^(deliver_count − 1)).
create or replace function retry_delay(config jsonb, deliver_count int) returns interval
language sql immutable set search_path from current as $$
    select make_interval(secs => least(maximum, case
        when initial <= 0 then 0
        -- In logarithms first: the power itself may overflow.
        when ln(initial) + (deliver_count - 1) * ln(factor) >= ln(greatest(maximum, 1e-6)) then maximum
        else initial * factor ^ (deliver_count - 1) end))
    from (select (config #>> '{retry_delay,initial}')::float8 as initial,
                 (config #>> '{retry_delay,factor}')::float8 as factor,
                 (config #>> '{retry_delay,max}')::float8 as maximum) r
$$;

-- extend(consumer, receipts, visibility_timeout) → how many deliveries were prolonged, counted from now.
-- Zero makes them visible at once. Raises CB001, CB002, CB003, CB004. Locks: the leases.
create or replace function extend(consumer text, receipts text[], visibility_timeout interval) returns int
language plpgsql volatile set search_path from current set jit = off set enable_seqscan = off as $$
declare
    c consumers := queue_named(consumer);
    moment timestamptz := clock_timestamp();
    extended int;
begin
    if visibility_timeout is null or visibility_timeout < interval '0' then
        raise exception 'visibility_timeout is %; it must not be negative', coalesce(visibility_timeout::text, 'null')
            using errcode = 'CB004';
    end if;
    update leases l set not_visible_until = moment + visibility_timeout
    from parse_receipts(receipts) r
    where l.consumer_id = c.id and l.seq = r.seq and l.token = r.token and l.not_visible_until > moment;
    get diagnostics extended = row_count;
    return extended;
end $$;

-- bury(consumer_id, seqs, reason) → how many leases became dead letters.
create or replace function bury(consumer_id int, seqs bigint[], reason text) returns int
language plpgsql volatile set search_path from current set jit = off set enable_seqscan = off as $$
declare
    buried int;
begin
    with gone as (
        delete from leases l where l.consumer_id = bury.consumer_id and l.seq = any (seqs) returning l.*
    ), revived as (
        delete from redriven r where r.consumer_id = bury.consumer_id and r.seq = any (seqs) returning r.*)
    insert into dead_messages (consumer_id, seq, topic, key, data, deliver_count, reason, history, commit_lsn, ordinal,
                               commit_time, inserted_at)
    select g.consumer_id, g.seq, coalesce(m.topic, r.topic), g.key, coalesce(m.data, r.data), g.deliver_count,
           bury.reason, g.history::json, coalesce(m.commit_lsn, r.commit_lsn), coalesce(m.ordinal, r.ordinal),
           coalesce(m.commit_time, r.commit_time), coalesce(m.inserted_at, r.inserted_at)
    from gone g left join messages m on m.seq = g.seq left join revived r on r.seq = g.seq
    order by g.seq;
    get diagnostics buried = row_count;
    return buried;
end $$;

-- bury_unprojectable(consumer, taken): leases whose data cannot be cut down to the consumer's columns (a json value with
-- \u0000, say) become dead letters: columns that are kept from it must not reach it.
create or replace function bury_unprojectable(consumer consumers, taken bigint[]) returns void
language plpgsql volatile set search_path from current set jit = off as $$
declare
    found_seqs bigint[];
begin
    select array_agg(t.seq) into found_seqs
    from unnest(taken) as t (seq)
    left join messages m on m.seq = t.seq
    left join redriven r on r.consumer_id = consumer.id and r.seq = t.seq
    where project(coalesce(m.data, r.data), consumer.config -> 'columns') is null;
    if found_seqs is not null then
        perform bury(consumer.id, found_seqs, 'undecodable: its columns cannot be separated');
    end if;
end $$;

-- bury_expired() → how many messages died: those whose last delivery expired. The running bridge calls it.
-- Locks: the leases it removes, by SKIP LOCKED.
create or replace function bury_expired() returns int
language plpgsql volatile set search_path from current set jit = off set enable_seqscan = off as $$
declare
    total int := 0;
    found_one record;
begin
    for found_one in
        select c.id, array_agg(l.seq) as seqs, c.config ->> 'max_deliveries' as last_delivery
        from consumers c cross join lateral (
            select l.seq from leases l
            where l.consumer_id = c.id and l.not_visible_until <= clock_timestamp()
              and l.deliver_count >= (c.config ->> 'max_deliveries')::int
            order by l.seq limit 1000 for update skip locked) l
        group by c.id
    loop
        total := total + bury(found_one.id, found_one.seqs, format(
            'max_deliveries: visibility timeout passed after delivery %s of %1$s', found_one.last_delivery));
    end loop;
    return total;
end $$;
