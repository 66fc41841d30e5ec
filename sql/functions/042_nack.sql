-- Giving back, keeping longer, burying.

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

-- nack_failed(consumer, receipt, reason) -> what became of a delivery whose handling failed: the how manieth it was and of how many, and
-- in how many seconds the message is visible again; or the id of the dead letter that it is now. No row where it was not in flight.
-- Does what nack() does. For a worker's log, without a second call.
create or replace function nack_failed(consumer text, receipt text, reason text)
returns table (deliver_count int, max_deliveries int, again_in float8, dead_id bigint)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
    done constant int := nack(consumer, array[receipt], null, reason);
    c constant consumers := queue_named(consumer);
    place constant bigint := split_part(receipt, '-', 1);
    allowed constant int := c.config ->> 'max_deliveries';
begin
    if done = 0 then
        return;
    end if;
    return query select d.deliver_count, allowed, extract(epoch from retry_delay(c.config, d.deliver_count))::float8, null::bigint
                 from delayed d where d.consumer_id = c.id and d.seq = place;
    if not found then
        return query select x.deliver_count, allowed, null::float8, x.id
                     from dead_messages x where x.consumer_id = c.id and x.seq = place order by x.id desc limit 1;
    end if;
end $$;

-- in_flight(consumer_id, tokens, seqs, moment) -> those deliveries among them that are in flight, each once.
create or replace function in_flight(consumer_id int, tokens bigint[], seqs bigint[], moment timestamptz)
returns delivery[]
language sql volatile as $$
    select array(select d from unnest(deliveries_of(consumer_id, tokens)) d
                 join (select distinct * from unnest(tokens, seqs)) as g (token, seq) on g.token = d.token and g.seq = d.seq
                 where d.not_visible_until > moment)
$$;

-- settle_deliveries(consumer_id, deliveries, moment) -> those that were in flight and now are not.
create or replace function settle_deliveries(consumer_id int, deliveries delivery[], moment timestamptz) returns delivery[]
language plpgsql volatile as $$
declare
    gone bigint[] := settle(consumer_id, array(select d.token from unnest(deliveries) d),
                            array(select d.seq from unnest(deliveries) d), moment);
begin
    return array(select d from unnest(deliveries) d where case when true then d.seq in (select g from unnest(gone) g) end);
end $$;

-- delay_deliveries(consumer, nacked, delay, moment): visible again after the delay, or by the consumer's back-off. In fifo
-- with all that the same claim holds of their keys behind them.
create or replace function delay_deliveries(consumer consumers, nacked delivery[], delay interval, moment timestamptz)
returns void
language plpgsql volatile as $$
declare
    followers delivery[] := '{}';
begin
    if nacked = '{}' then
        return;
    end if;
    if consumer.mode = 'fifo' then
        followers := settle_deliveries(consumer.id, followers_of(consumer.id, nacked), moment);
    end if;
    insert into delayed (consumer_id, seq, key, deliver_count, last_delivered_at, visible_at, history, inserted_at, ord,
                         tie, barrier, in_order)
    select consumer.id, b.seq, b.key, b.deliver_count, b.last_delivered_at, b.visible_at, b.history, b.inserted_at,
           b.ord, b.tie, b.barrier, consumer.mode = 'fifo'
    from (select n.*, later(moment, coalesce(delay, retry_delay(consumer.config, n.deliver_count))) as visible_at
          from unnest(nacked) n
          union all
          select f.*, (select later(moment, coalesce(delay, retry_delay(consumer.config, n.deliver_count))) from unnest(nacked) n
                       where n.token = f.token and n.key = f.key order by n.ordinal limit 1)
          from unnest(followers) f) b;
end $$;

-- followers_of(consumer_id, nacked) -> what the same claims hold of the same keys behind the first one given back.
create or replace function followers_of(consumer_id int, nacked delivery[]) returns delivery[]
language sql volatile as $$
    select array(
        select d
        from (select n.token, n.key, min(n.ordinal) as ordinal from unnest(nacked) n
              where n.key is not null group by n.token, n.key) earliest
        join unnest(deliveries_of(consumer_id, array(select n.token from unnest(nacked) n))) d
             on d.token = earliest.token and d.key = earliest.key and d.ordinal > earliest.ordinal)
$$;

-- retry_delay(config, deliver_count) -> min(max, initial * factor^(deliver_count - 1)).
create or replace function retry_delay(config jsonb, deliver_count int) returns interval
language sql immutable as $$
    select make_interval(secs => least(maximum, case
        when initial <= 0 then 0
        -- In logarithms first: the power itself may overflow.
        when ln(initial) + (deliver_count - 1) * ln(factor) >= ln(greatest(maximum, 1e-6)) then maximum
        else initial * factor ^ (deliver_count - 1) end))
    from (select (config #>> '{retry_delay,initial}')::float8 as initial,
                 (config #>> '{retry_delay,factor}')::float8 as factor,
                 (config #>> '{retry_delay,max}')::float8 as maximum) r
$$;

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

-- key_mates(consumer_id, deliveries) -> they, and what the same claims hold of the same keys: these share their visibility.
create or replace function key_mates(consumer_id int, deliveries delivery[]) returns delivery[]
language sql volatile as $$
    select array(
        select d from unnest(deliveries_of(consumer_id, array(select g.token from unnest(deliveries) g))) d
        where (d.token, d.seq) in (select g.token, g.seq from unnest(deliveries) g)
           or (d.token, d.key) in (select g.token, g.key from unnest(deliveries) g where g.key is not null))
$$;

-- extend_deliveries(consumer_id, deliveries, until): whole rows of leases are changed in place; out of others these
-- deliveries are taken into rows of their own.
create or replace function extend_deliveries(consumer_id int, deliveries delivery[], until timestamptz) returns void
language plpgsql volatile as $$
begin
    with named as (
        select d.token, d.part, count(*) as wanted from unnest(deliveries) d group by d.token, d.part)
    update leases l set not_visible_until = until from named n
    where l.consumer_id = extend_deliveries.consumer_id and l.token = n.token and l.part = n.part
      and n.wanted = cardinality(l.seqs) - (select count(*) from settled s where s.consumer_id = l.consumer_id
                                            and s.token = l.token and s.part = l.part);
    with named as (
        select d.token, d.part, count(*) as wanted from unnest(deliveries) d group by d.token, d.part
    ), shared as materialized (
        select l.* from leases l join named n on l.token = n.token and l.part = n.part
        where l.consumer_id = extend_deliveries.consumer_id
          and n.wanted < cardinality(l.seqs) - (select count(*) from settled s where s.consumer_id = l.consumer_id
                                                and s.token = l.token and s.part = l.part)
    ), marked as (
        insert into settled (consumer_id, token, part, seq)
        select extend_deliveries.consumer_id, d.token, d.part, d.seq
        from unnest(deliveries) d join shared s on s.token = d.token and s.part = d.part
        order by d.token, d.part, d.seq
        on conflict do nothing returning token, part, seq)
    insert into leases (consumer_id, token, part, slot, seqs, keys, barrier, deliver_count, history, last_delivered_at,
                        not_visible_until, inserted_at)
    select s.consumer_id, s.token, -d.ordinal, s.slot, array[d.seq], array[d.key], s.barrier, s.deliver_count, s.history,
           s.last_delivered_at, until, s.inserted_at
    from marked m
    join shared s on s.token = m.token and s.part = m.part
    join unnest(deliveries) d on d.token = m.token and d.part = m.part and d.seq = m.seq;
end $$;

-- bury(consumer_id, deliveries, reason) -> how many became dead letters.
create or replace function bury(consumer_id int, deliveries delivery[], reason text) returns int
language plpgsql volatile as $$
declare
    buried int;
begin
    if coalesce(cardinality(deliveries), 0) = 0 then
        return 0;
    end if;
    with revived as (
        delete from redriven r using unnest(deliveries) d where r.consumer_id = bury.consumer_id and r.seq = d.seq
        returning r.*)
    insert into dead_messages (consumer_id, seq, topic, key, data, deliver_count, reason, history, commit_lsn, ordinal,
                               commit_time, inserted_at)
    select bury.consumer_id, d.seq, coalesce(m.topic, r.topic), d.key, coalesce(r.data, m.data), d.deliver_count,
           bury.reason, d.history::json, coalesce(m.commit_lsn, r.commit_lsn), coalesce(m.ordinal, r.ordinal),
           coalesce(m.commit_time, r.commit_time), coalesce(m.inserted_at, r.inserted_at)
    from unnest(deliveries) d
    left join messages m on m.seq = d.seq and m.seq between (select min(x.seq) from unnest(deliveries) x)
                                                        and (select max(x.seq) from unnest(deliveries) x)
    left join revived r on r.seq = d.seq
    order by d.seq;
    get diagnostics buried = row_count;
    return buried;
end $$;

-- bury_unprojectable(consumer, token): deliveries of a claim whose data cannot be cut down to the consumer's columns (a
-- json value with \u0000, say) become dead letters: columns that are kept from it must not reach it.
create or replace function bury_unprojectable(consumer consumers, token bigint) returns void
language plpgsql volatile as $$
declare
    bad delivery[];
begin
    select array_agg(d) into bad
    from unnest(deliveries_of(consumer.id, array[token])) d
    left join messages m on m.seq = d.seq
    left join redriven r on r.consumer_id = consumer.id and r.seq = d.seq
    where project(coalesce(r.data, m.data), consumer.config -> 'columns') is null;
    if bad is not null then
        perform remove_locked(consumer.id, bad);
        perform bury(consumer.id, bad, 'undecodable: its columns cannot be separated');
    end if;
end $$;

-- bury_expired() -> how many messages died: those whose last delivery expired. The running bridge calls it.
-- Locks: the leases it removes, by SKIP LOCKED.
create or replace function bury_expired() returns int
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    total int := 0;
    c consumers;
    expired delivery[];
begin
    perform require_read_committed('bury_expired()');
    for c in select * from consumers where mode <> 'stream' loop
        expired := lock_expired(c.id, newest_hint(c.id), 1000, (c.config ->> 'max_deliveries')::int, 0, moment());
        perform remove_locked(c.id, expired);
        perform bury_last(c, expired);
        total := total + cardinality(expired);
    end loop;
    return total;
end $$;
