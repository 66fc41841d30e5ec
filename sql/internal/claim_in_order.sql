-- How the messages of a fifo consumer are claimed.
--
-- A message may be delivered while nothing else holds its key: no other lease, no message that was
-- given back, and no message that waits before it. There is no stored list of held keys that could
-- become wrong. Instead, a claim first locks rows (SKIP LOCKED). Then it looks, in a statement of
-- its own, at all rows that it did not lock. Another session may be about to change those rows, but
-- its changes are not committed, so the claim sees the messages where they were. Each move of a
-- message between waiting, leases and delayed is one transaction. Therefore the claim sees each
-- message in one of these tables, or the message is finished.
--
-- Each look-up in `delayed` has an index fence. A look-up by key contains `consumer_id + 0` (index
-- delayed_key), and one by time contains `visible_at > '-infinity'` (index delayed_visible_at). A
-- look-up by seq contains neither and uses the primary key.

-- claim_in_order(...) -> the result of claim() for a fifo consumer.
create or replace function claim_in_order(consumer consumers, hint hints, capacity smallint[],
                                          expired boolean, own_claim bigint, moment timestamptz,
                                          until timestamptz, out taken bigint[], out plain boolean)
language plpgsql volatile as $$
declare
    room constant int := cardinality(capacity);
    safe bigint;
begin
    taken := '{}';
    if expired then
        taken := claim_expired_in_order(consumer, hint, capacity, own_claim, moment, until);
        own_claim := claim_id_drawn(own_claim, taken);
    end if;
    if cardinality(taken) < room
        and exists (select from delayed d where d.consumer_id = consumer.id)
    then
        taken := taken || claim_delayed_in_order(consumer, hint, capacity[cardinality(taken) + 1:],
                                                 cardinality(taken), own_claim, moment, until);
        own_claim := claim_id_drawn(own_claim, taken);
    end if;
    plain := taken = '{}';
    if cardinality(taken) < room then
        -- Published messages may commit out of order: take none after one that can still appear.
        safe := case when jsonb_array_length(consumer.config -> 'topics') > 0
                     then max_safe_seq('messages_seq') end;
        taken := claim_waiting_in_order(consumer.id, hint, capacity, taken, own_claim, moment,
                                        until, safe);
    end if;
    -- Checked after the claim, because messages that were redriven in the meantime may be part of
    -- it.
    plain := plain and taken = array(select t from unnest(taken) t order by t)
        and not exists (select from redriven r where r.consumer_id = consumer.id);
end $$;

-- claim_expired_in_order(...): Claim deliveries whose visibility timeout has passed and whose keys
-- are free according to free_expired().
--
-- A message whose last allowed delivery has expired becomes a dead letter.
-- Locks: their rows of leases, by SKIP LOCKED.
create or replace function claim_expired_in_order(consumer consumers, hint hints,
                                                  capacity smallint[], own_claim bigint,
                                                  moment timestamptz, until timestamptz)
returns bigint[]
language plpgsql volatile as $$
declare
    wanted delivery[];
    locked lease_id[];
    alive delivery[];
    taken bigint[] := '{}';
begin
    loop -- again if some became dead letters, because other deliveries can have their capacity
        wanted := free_expired(consumer.id, hint, own_claim, moment, null,
                               cardinality(capacity));
        exit when wanted = '{}';
        select array_agg(row(l.claim_id, l.part)::lease_id) into locked
        from (select distinct w.claim_id, w.part from unnest(wanted) w
              order by w.claim_id, w.part) w
        cross join lateral (
            select l.claim_id, l.part from leases l
            where l.consumer_id = consumer.id and l.claim_id = w.claim_id and l.part = w.part
              and l.not_visible_until <= moment
            for update skip locked) l;
        exit when locked is null;
        -- A statement of its own, so that its snapshot is newer than the locks.
        wanted := free_expired(consumer.id, hint, own_claim, moment, locked,
                               cardinality(capacity));
        exit when wanted = '{}';
        perform remove_locked(consumer.id, wanted);
        alive := bury_last(consumer, wanted);
        own_claim := coalesce(own_claim, draw_claim_id());
        taken := taken || insert_leases(consumer.id, alive, capacity, cardinality(taken), own_claim,
                                        moment, until);
        capacity := capacity[cardinality(alive) + 1:];
        exit when cardinality(alive) = cardinality(wanted) or capacity = '{}';
    end loop;
    return taken;
end $$;

-- free_expired(consumer_id, hint, own_claim, moment, among, wanted) -> up to `wanted` deliveries
-- whose visibility timeout has passed, in order, if their keys are free.
--
-- A key is free if no other delivery of it is in flight, and no other lease and no row of `delayed`
-- holds an earlier message of it. The claim `own_claim` is left out.
-- Parameters:
--   among  the rows of leases to choose from, or null for all rows
create or replace function free_expired(consumer_id int, hint hints, own_claim bigint,
                                        moment timestamptz, among lease_id[], wanted int)
returns delivery[]
language plpgsql volatile as $$
begin
    return (
        with every as materialized (
            select d, d.key, d.ord, d.tie, d.not_visible_until > moment as in_flight,
                   d.not_visible_until <= moment and (among is null or (d.claim_id, d.part) in (
                       select a.claim_id, a.part from unnest(among) a)) as mine
            from unnest(deliveries_of(free_expired.consumer_id, array(
                select l.claim_id from live_leases(free_expired.consumer_id, hint) l
                where l.claim_id is distinct from own_claim))) d
        ), free as (
            select c.d, c.ord, c.tie from every c
            where c.mine
              and (c.key is null
                   -- A hash fence.
                   or case when c.key in (select o.key from every o
                                          where not o.mine and o.key is not null)
                      then not exists (select from every o where o.key = c.key and not o.mine
                                       and (o.in_flight or (o.ord, o.tie) < (c.ord, c.tie)))
                      else true end
                      and not exists (select from delayed e
                                      where e.consumer_id + 0 = free_expired.consumer_id
                                        and e.in_order and e.key = c.key
                                        and hashtextextended(e.key, e.consumer_id)
                                          = hashtextextended(c.key, free_expired.consumer_id)
                                        and (e.ord, e.tie) < (c.ord, c.tie)))
            order by c.ord, c.tie limit wanted)
        select coalesce(array_agg(f.d order by f.ord, f.tie), '{}') from free f);
end $$;

-- claim_delayed_in_order(...): Claim messages in `delayed` that are due and whose keys are free
-- according to free_delayed().
--
-- Locks: their rows of delayed, by SKIP LOCKED.
create or replace function claim_delayed_in_order(consumer consumers, hint hints,
                                                  capacity smallint[], offset_ int,
                                                  own_claim bigint, moment timestamptz,
                                                  until timestamptz)
returns bigint[]
language plpgsql volatile as $$
declare
    wanted bigint[] := free_delayed(consumer.id, hint, own_claim, moment, null,
                                    cardinality(capacity));
    due delivery[];
begin
    -- A look-up fence.
    wanted := array(select d.seq from unnest(wanted) as w (seq) cross join lateral (
                        select d.seq from delayed d
                        where d.consumer_id = consumer.id and d.seq = w.seq
                          and d.visible_at <= moment
                        for update skip locked) d);
    if wanted <> '{}' then
        -- A statement of its own, so that its snapshot is newer than the locks.
        wanted := free_delayed(consumer.id, hint, own_claim, moment, wanted, cardinality(capacity));
    end if;
    if wanted = '{}' then
        return '{}';
    end if;
    with gone as (
        delete from delayed d where d.consumer_id = consumer.id and d.seq = any (wanted)
        returning d.*)
    select array_agg(row(null, null, null, g.seq, g.key, g.barrier, g.deliver_count, g.history,
                         g.last_delivered_at, g.visible_at, g.inserted_at, g.ord, g.tie)::delivery
                     order by g.ord, g.tie)
    into due from gone g;
    return insert_leases(consumer.id, due, capacity, offset_, coalesce(own_claim, draw_claim_id()),
                         moment, until);
end $$;

-- free_delayed(consumer_id, hint, own_claim, moment, seqs, wanted) -> up to `wanted` messages in
-- `delayed` that are due, if their keys are free.
--
-- A key is free if no delivery of it is in flight, and no lease and no row of `delayed` holds an
-- earlier message of it. The claim `own_claim` is left out.
-- Parameters:
--   seqs  the messages to choose from, or null for all
create or replace function free_delayed(consumer_id int, hint hints, own_claim bigint,
                                        moment timestamptz, seqs bigint[], wanted int)
returns bigint[]
language plpgsql volatile as $$
begin
    return (
        with held as materialized (
            select o.key, o.ord, o.tie, o.not_visible_until > moment as in_flight
            from unnest(deliveries_of(free_delayed.consumer_id, array(
                select l.claim_id from live_leases(free_delayed.consumer_id, hint) l
                where l.claim_id is distinct from own_claim))) o
        )
        select coalesce(array_agg(f.seq), '{}') from (
            select d.seq from delayed d
            where d.consumer_id = free_delayed.consumer_id and d.visible_at > '-infinity'
              and d.visible_at <= moment
              and (seqs is null or d.seq in (select s from unnest(seqs) s))
              and (d.key is null
                   -- A hash fence.
                   or case when d.key in (select h.key from held h
                                          where h.in_flight and h.key is not null) then false
                      when d.key in (select h.key from held h where h.key is not null)
                      then not exists (select from held h where h.key = d.key
                                       and (h.ord, h.tie) < (d.ord, d.tie))
                      else true end
                      -- An earlier message of the key that is due as well does no harm if this
                      -- claim takes it first.
                      and not exists (select from delayed e
                                      where e.consumer_id + 0 = free_delayed.consumer_id
                                        and e.in_order and e.key = d.key
                                        and hashtextextended(e.key, e.consumer_id)
                                          = hashtextextended(d.key, free_delayed.consumer_id)
                                        and (e.ord, e.tie) < (d.ord, d.tie)
                                        and not (e.visible_at <= d.visible_at
                                                 and (seqs is null
                                                      or e.seq in (select s
                                                                   from unnest(seqs) s)))))
            order by d.visible_at, d.ord, d.tie limit wanted) f);
end $$;
