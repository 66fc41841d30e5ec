-- The common part of nack(), give_back() and extend(): deliveries that become visible at another
-- time.

-- in_flight(consumer_id, receipts, moment) -> those of these deliveries that are in flight, each
-- once.
create or replace function in_flight(consumer_id int, receipts receipt[], moment timestamptz)
returns delivery[]
language sql volatile as $$
    select array(select d
                 from unnest(deliveries_of(consumer_id,
                                           array(select r.claim_id from unnest(receipts) r))) d
                 join (select distinct r.claim_id, r.seq from unnest(receipts) r) g
                      on g.claim_id = d.claim_id and g.seq = d.seq
                 where d.not_visible_until > moment)
$$;

-- settle_deliveries(consumer_id, deliveries, moment) -> those of these deliveries that were in
-- flight and are now settled.
create or replace function settle_deliveries(consumer_id int, deliveries delivery[],
                                             moment timestamptz)
returns delivery[]
language plpgsql volatile as $$
declare
    gone bigint[] := settle(consumer_id, array(select row(d.seq, d.claim_id)::receipt
                                               from unnest(deliveries) d), moment);
begin
    return array(select d from unnest(deliveries) d
                 where case when true then d.seq in (select g from unnest(gone) g) end);
end $$;

-- delay_deliveries(consumer, nacked, delay, moment): Make these deliveries visible again after the
-- delay.
--
-- If the delay is null, the consumer's retry_delay applies. In fifo, the later messages of their
-- keys in the same claim follow them and become visible at the same time.
create or replace function delay_deliveries(consumer consumers, nacked delivery[], delay interval,
                                            moment timestamptz)
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
    insert into delayed (consumer_id, seq, key, deliver_count, last_delivered_at, visible_at,
                         history, inserted_at, ord, tie, barrier, in_order)
    select consumer.id, b.seq, b.key, b.deliver_count, b.last_delivered_at, b.visible_at, b.history,
           b.inserted_at, b.ord, b.tie, b.barrier, consumer.mode = 'fifo'
    from (select n.*, later(moment, coalesce(delay, retry_delay(consumer.config, n.deliver_count)))
                 as visible_at
          from unnest(nacked) n
          union all
          select f.*, (select later(moment, coalesce(delay, retry_delay(consumer.config,
                                                                        n.deliver_count)))
                       from unnest(nacked) n
                       where n.claim_id = f.claim_id and n.key = f.key order by n.ordinal limit 1)
          from unnest(followers) f) b;
end $$;

-- followers_of(consumer_id, nacked) -> the deliveries of the same claims that have the same key and
-- follow the first one that is given back.
create or replace function followers_of(consumer_id int, nacked delivery[]) returns delivery[]
language sql volatile as $$
    select array(
        select d
        from (select n.claim_id, n.key, min(n.ordinal) as ordinal from unnest(nacked) n
              where n.key is not null group by n.claim_id, n.key) earliest
        join unnest(deliveries_of(consumer_id, array(select n.claim_id from unnest(nacked) n))) d
             on d.claim_id = earliest.claim_id and d.key = earliest.key
                 and d.ordinal > earliest.ordinal)
$$;

-- retry_delay(config, deliver_count) -> the delay before the next delivery, which is
-- min(max, initial * factor^(deliver_count - 1)).
create or replace function retry_delay(config jsonb, deliver_count int) returns interval
language sql immutable as $$
    select make_interval(secs => least(maximum, case
        when initial <= 0 then 0
        -- Compared as logarithms first, because the power itself may overflow.
        when ln(initial) + (deliver_count - 1) * ln(factor) >= ln(greatest(maximum, 1e-6))
        then maximum
        else initial * factor ^ (deliver_count - 1) end))
    from (select (config #>> '{retry_delay,initial}')::float8 as initial,
                 (config #>> '{retry_delay,factor}')::float8 as factor,
                 (config #>> '{retry_delay,max}')::float8 as maximum) r
$$;

-- key_mates(consumer_id, deliveries) -> these deliveries and all others of the same claims that
-- have the same keys.
--
-- In fifo they share one visibility timeout.
create or replace function key_mates(consumer_id int, deliveries delivery[]) returns delivery[]
language sql volatile as $$
    select array(
        select d
        from unnest(deliveries_of(consumer_id,
                                  array(select g.claim_id from unnest(deliveries) g))) d
        where (d.claim_id, d.seq) in (select g.claim_id, g.seq from unnest(deliveries) g)
           or (d.claim_id, d.key) in (select g.claim_id, g.key from unnest(deliveries) g
                                   where g.key is not null))
$$;

-- extend_deliveries(consumer_id, deliveries, until): Set the end of the visibility timeout of these
-- deliveries.
--
-- A row of leases whose unsettled messages are all among them is updated in place. From another row
-- each of these deliveries is moved into a row of its own.
create or replace function extend_deliveries(consumer_id int, deliveries delivery[],
                                             until timestamptz)
returns void
language plpgsql volatile as $$
begin
    with named as (
        select d.claim_id, d.part, count(*) as wanted from unnest(deliveries) d
        group by d.claim_id, d.part)
    update leases l set not_visible_until = until from named n
    where l.consumer_id = extend_deliveries.consumer_id and l.claim_id = n.claim_id
        and l.part = n.part
      and n.wanted = cardinality(l.seqs)
                     - (select count(*) from marks_of(l.consumer_id, l.claim_id, l.part));
    with named as (
        select d.claim_id, d.part, count(*) as wanted from unnest(deliveries) d
        group by d.claim_id, d.part
    ), shared as materialized (
        select l.* from leases l join named n on l.claim_id = n.claim_id and l.part = n.part
        where l.consumer_id = extend_deliveries.consumer_id
          and n.wanted < cardinality(l.seqs)
                         - (select count(*) from marks_of(l.consumer_id, l.claim_id, l.part))
    ), marked as (
        insert into settled (consumer_id, claim_id, part, seq)
        select extend_deliveries.consumer_id, d.claim_id, d.part, d.seq
        from unnest(deliveries) d join shared s on s.claim_id = d.claim_id and s.part = d.part
        order by d.claim_id, d.part, d.seq
        on conflict do nothing returning claim_id, part, seq)
    insert into leases (consumer_id, claim_id, part, shard, seqs, keys, barrier, deliver_count,
                        history, last_delivered_at, not_visible_until, inserted_at)
    select s.consumer_id, s.claim_id, -d.ordinal, s.shard, array[d.seq], array[d.key], s.barrier,
           s.deliver_count, s.history, s.last_delivered_at, until, s.inserted_at
    from marked m
    join shared s on s.claim_id = m.claim_id and s.part = m.part
    join unnest(deliveries) d on d.claim_id = m.claim_id and d.part = m.part and d.seq = m.seq;
end $$;

-- give_back_uncounted(consumer, receipts, visible_at) -> the number of messages given back.
--
-- The messages are visible from visible_at on. Their delivery does not count. In fifo the later
-- messages of the same key in the same claim are given back too, and are not in the result.
-- Raises: CB003 if one of the texts is not a receipt.
create or replace function give_back_uncounted(consumer consumers, receipts text[],
                                               visible_at timestamptz)
returns int
language plpgsql volatile as $$
declare
    c alias for consumer;
    given receipt[] := parse_receipts(receipts);
    wanted delivery[];
begin
    wanted := in_flight(c.id, given, moment());
    if c.mode = 'fifo' then
        wanted := wanted || array(
            select f from unnest(followers_of(c.id, wanted)) f
            where not exists (
                select from unnest(wanted) w where w.claim_id = f.claim_id and w.seq = f.seq));
    end if;
    wanted := settle_deliveries(c.id, wanted, moment());
    insert into delayed (consumer_id, seq, key, deliver_count, last_delivered_at, visible_at,
                         history, inserted_at, ord, tie, barrier, in_order)
    select c.id, d.seq, d.key, d.deliver_count - 1, case
               when d.deliver_count > 1 then d.last_delivered_at else '-infinity' end,
           give_back_uncounted.visible_at, d.history, d.inserted_at, d.ord, d.tie, d.barrier,
           c.mode = 'fifo'
    from unnest(wanted) d;
    return (select count(*) from unnest(wanted) d
            where (d.claim_id, d.seq) in (select g.claim_id, g.seq from unnest(given) g));
end $$;
