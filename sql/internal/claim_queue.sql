-- How the messages of a queue consumer are claimed: deliveries whose visibility timeout has passed,
-- messages that were given back, and new messages.
--
-- Every function that inserts leases returns the seqs of these messages, in order. The leases carry
-- the claim_id `own_claim`. If it is null, a function draws one as soon as there is a message to
-- take. Therefore a receive that finds nothing costs no transaction id.

-- claim_expired(...): Claim deliveries whose visibility timeout has passed.
--
-- A message whose last allowed delivery has expired becomes a dead letter.
create or replace function claim_expired(consumer consumers, hint hints, capacity smallint[],
                                         own_claim bigint, moment timestamptz, until timestamptz)
returns bigint[]
language plpgsql volatile as $$
declare
    expired delivery[];
    alive delivery[];
    taken bigint[] := '{}';
begin
    loop -- again if some became dead letters, because other deliveries can have their capacity
        expired := (lock_expired(consumer.id, hint, cardinality(capacity), 0, own_claim,
                                 moment))[:cardinality(capacity)];
        perform remove_locked(consumer.id, expired);
        alive := bury_last(consumer, expired);
        own_claim := coalesce(own_claim, draw_claim_id());
        taken := taken || insert_leases(consumer.id, alive, capacity, cardinality(taken), own_claim,
                                        moment, until);
        capacity := capacity[cardinality(alive) + 1:];
        exit when cardinality(alive) = cardinality(expired) or capacity = '{}';
    end loop;
    return taken;
end $$;

-- lock_expired(consumer_id, hint, wanted, at_least, own_claim, moment) -> deliveries whose
-- visibility timeout has passed, the oldest first.
--
-- Returns up to `wanted` deliveries or a few more. All were delivered at least `at_least` times,
-- and none was delivered by the claim `own_claim`.
-- Locks: their rows of leases, by SKIP LOCKED.
create or replace function lock_expired(consumer_id int, hint hints, wanted int, at_least int,
                                        own_claim bigint, moment timestamptz)
returns delivery[]
language plpgsql volatile as $$
declare
    locked lease_id[];
begin
    -- A row holds at least one message, so `wanted` rows suffice.
    select array_agg(row(l.claim_id, l.part)::lease_id) into locked
    from (select v.claim_id, v.part from live_leases(lock_expired.consumer_id, hint) v
          where v.not_visible_until <= moment and v.deliver_count >= at_least
            and v.claim_id is distinct from own_claim
          order by v.claim_id, abs(v.part) limit wanted) v
    cross join lateral (
        select l.claim_id, l.part from leases l
        where l.consumer_id = lock_expired.consumer_id and l.claim_id = v.claim_id
            and l.part = v.part
          and l.not_visible_until <= moment
        for update skip locked) l;
    return array(select d
                 from unnest(deliveries_of(consumer_id,
                                           array(select l.claim_id from unnest(locked) l))) d
                 where (d.claim_id, d.part) in (select l.claim_id, l.part from unnest(locked) l)
                 order by d.claim_id, d.ordinal);
end $$;

-- deliveries_of(consumer_id, claim_ids) -> the deliveries of these claims that are not settled, in
-- the order of the claims.
--
-- The function is stable, so it uses the snapshot of the statement that calls it. If that statement
-- also reads other tables, no message moves between the two.
create or replace function deliveries_of(consumer_id int, claim_ids bigint[]) returns delivery[]
language plpgsql stable as $$
begin
    return array(
        select row(l.claim_id, l.part, abs(l.part) + u.n::int - 1, u.seq,
                   case when l.keys is null then m.key else u.key end,
                   l.barrier, l.deliver_count, l.history, l.last_delivered_at, l.not_visible_until,
                   l.inserted_at, coalesce(r.ord, u.seq), coalesce(r.tie, 0))::delivery
        from leases_of(deliveries_of.consumer_id, claim_ids) l
        cross join lateral unnest(l.seqs, l.keys) with ordinality as u (seq, key, n)
        left join lateral (select m.key from messages m
                           where l.keys is null and m.seq = u.seq limit 1) m on true
        left join lateral (select r.ord, r.tie from redriven r
                           where r.consumer_id = l.consumer_id and r.seq = u.seq limit 1) r on true
        where not exists (select from settled s
                          where s.consumer_id = l.consumer_id and s.claim_id = l.claim_id
                            and s.part = l.part and s.seq = u.seq)
        order by l.claim_id, abs(l.part) + u.n);
end $$;

-- with_note(delivery, at, reason) -> the delivery with one more line in its history.
--
-- The history keeps the first 5 lines and the last 20. A line between them, for example
-- {"left_out": 7}, counts the lines that were dropped. A line keeps 2,000 characters of its reason.
create or replace function with_note(delivery delivery, at timestamptz, reason text)
returns delivery
language plpgsql immutable as $$
declare
    lines constant int := jsonb_array_length(delivery.history);
    left_out constant bigint := (delivery.history #>> '{5,left_out}')::bigint;
begin
    if lines - (left_out is not null)::int >= 25 then
        delivery.history := jsonb_path_query_array(delivery.history, '$[0 to 4]')
            || jsonb_build_object(
                   'left_out', coalesce(left_out, 0) + lines - (left_out is not null)::int - 24)
            || jsonb_path_query_array(delivery.history, '$[last - 18 to last]');
    end if;
    delivery.history := delivery.history || jsonb_build_object(
        'at', time_text(at), 'deliver_count', delivery.deliver_count,
        'reason', left(reason, 2000) || case when length(reason) > 2000 then '...' else '' end);
    return delivery;
end $$;

-- bury_last(consumer, expired) -> the deliveries that may be delivered again, in their order.
--
-- The others have been delivered max_deliveries times and become dead letters.
create or replace function bury_last(consumer consumers, expired delivery[]) returns delivery[]
language plpgsql volatile as $$
declare
    last_delivery constant int := (consumer.config ->> 'max_deliveries')::int;
begin
    perform bury(consumer.id,
                 array(select d from unnest(expired) d where d.deliver_count >= last_delivery),
                 format('max_deliveries: visibility timeout passed after delivery %s of %1$s',
                        last_delivery));
    return array(select with_note(d, moment(), 'visibility timeout passed') from unnest(expired) d
                 where d.deliver_count < last_delivery);
end $$;

-- insert_leases(consumer_id, deliveries, capacity, offset_, own_claim, moment, until): Deliver each
-- message once more.
--
-- offset_ is the number of messages that the claim has taken before. Returns the seqs.
create or replace function insert_leases(consumer_id int, deliveries delivery[],
                                         capacity smallint[], offset_ int, own_claim bigint,
                                         moment timestamptz, until timestamptz)
returns bigint[]
language plpgsql volatile as $$
begin
    -- One row for consecutive deliveries with the same shard, barrier, deliver_count and history.
    insert into leases (consumer_id, claim_id, part, shard, seqs, keys, barrier, deliver_count,
                        history, last_delivered_at, not_visible_until, inserted_at)
    with numbered as (
        select d.*, row_number() over () as n from unnest(deliveries) d
    ), placed as (
        select d.*, capacity[d.n] as shard, d.n - row_number() over (
                   partition by capacity[d.n], d.barrier, d.deliver_count, d.history
                   order by d.n) as island
        from numbered d)
    select insert_leases.consumer_id, insert_leases.own_claim, offset_ + min(d.n), d.shard,
           array_agg(d.seq order by d.n), array_agg(d.key order by d.n), d.barrier,
           d.deliver_count + 1, d.history, moment, until, min(d.inserted_at)
    from placed d
    group by d.shard, d.barrier, d.deliver_count, d.history, d.island;
    return array(select d.seq from unnest(deliveries) d);
end $$;

-- claim_delayed(...): Claim messages in `delayed` that are due.
--
-- They were given back, or published for later.
-- Locks: their rows of delayed, by SKIP LOCKED.
create or replace function claim_delayed(consumer_id int, capacity smallint[], offset_ int,
                                         own_claim bigint, moment timestamptz, until timestamptz)
returns bigint[]
language plpgsql volatile as $$
declare
    due delivery[];
begin
    with locked as materialized (
        select d.seq from delayed d
        where d.consumer_id = claim_delayed.consumer_id and d.visible_at > '-infinity'
          and d.visible_at <= moment
        order by d.visible_at, d.seq limit cardinality(capacity) for update skip locked
    ), gone as (
        -- An array fence.
        delete from delayed d
        where d.consumer_id = claim_delayed.consumer_id
          and d.seq = any (array(select l.seq from locked l))
        returning d.*)
    select array_agg(row(null, null, null, g.seq, g.key, g.barrier, g.deliver_count, g.history,
                         g.last_delivered_at, g.visible_at, g.inserted_at, g.ord, g.tie)::delivery
                     order by g.visible_at, g.seq)
    into due from gone g;
    if due is null then
        return '{}';
    end if;
    return insert_leases(consumer_id, due, capacity, offset_, coalesce(own_claim, draw_claim_id()),
                         moment, until);
end $$;

-- insert_claimed(...) -> `taken`, followed by the seqs of these messages.
--
-- Inserts leases for messages that are delivered for the first time, one row for each shard.
create or replace function insert_claimed(consumer_id int, own_claim bigint, capacity smallint[],
                                          taken bigint[], seqs bigint[], keys text[],
                                          moment timestamptz, until timestamptz, since timestamptz)
returns bigint[]
language plpgsql volatile as $$
declare
    low int := cardinality(taken) + 1;
    last constant int := cardinality(taken) + cardinality(seqs);
    high int;
begin
    while low <= last loop
        high := last;
        if capacity[last] <> capacity[low] then
            high := low;
            while capacity[high + 1] = capacity[low] loop
                high := high + 1;
            end loop;
        end if;
        insert into leases (consumer_id, claim_id, part, shard, seqs, keys, deliver_count,
                            last_delivered_at, not_visible_until, inserted_at)
        values (consumer_id, own_claim, low, capacity[low],
                seqs[low - cardinality(taken):high - cardinality(taken)],
                keys[low - cardinality(taken):high - cardinality(taken)], 1, moment, until, since);
        low := high + 1;
    end loop;
    return taken || seqs;
end $$;
