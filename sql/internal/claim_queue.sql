-- How the messages of a queue consumer are claimed: deliveries whose visibility timeout has passed,
-- messages that were given back, and new messages.
--
-- Every function that inserts leases returns the seqs of these messages, in order. They carry the
-- token of the claim. If the token is null, a function draws one as soon as there is a message to
-- take. Therefore a receive that finds nothing costs no transaction id.

-- claim_expired(...): Claim deliveries whose visibility timeout has passed.
--
-- A message whose last allowed delivery has expired becomes a dead letter.
create or replace function claim_expired(consumer consumers, hint hints, places smallint[],
                                         token bigint, moment timestamptz, until timestamptz)
returns bigint[]
language plpgsql volatile as $$
declare
    expired delivery[];
    alive delivery[];
    taken bigint[] := '{}';
begin
    loop -- again if some became dead letters, because other deliveries can have their places
        expired := (lock_expired(consumer.id, hint, cardinality(places), 0, token,
                                 moment))[:cardinality(places)];
        perform remove_locked(consumer.id, expired);
        alive := bury_last(consumer, expired);
        token := coalesce(token, draw_token());
        taken := taken || insert_leases(consumer.id, alive, places, cardinality(taken), token,
                                        moment, until);
        places := places[cardinality(alive) + 1:];
        exit when cardinality(alive) = cardinality(expired) or places = '{}';
    end loop;
    return taken;
end $$;

-- lock_expired(consumer_id, hint, wanted, at_least, claimed, moment) -> deliveries whose visibility
-- timeout has passed, the oldest first.
--
-- Returns up to `wanted` deliveries or a few more. All were delivered at least `at_least` times,
-- and none was delivered by the claim with the token `claimed`.
-- Locks: their rows of leases, by SKIP LOCKED.
create or replace function lock_expired(consumer_id int, hint hints, wanted int, at_least int,
                                        claimed bigint, moment timestamptz)
returns delivery[]
language plpgsql volatile as $$
declare
    tokens bigint[];
    parts int[];
begin
    -- A row holds at least one message, so `wanted` rows suffice.
    select array_agg(l.token), array_agg(l.part) into tokens, parts
    from (select v.token, v.part from live_leases(lock_expired.consumer_id, hint) v
          where v.not_visible_until <= moment and v.deliver_count >= at_least
            and v.token is distinct from claimed
          order by v.token, abs(v.part) limit wanted) v
    cross join lateral (
        select l.token, l.part from leases l
        where l.consumer_id = lock_expired.consumer_id and l.token = v.token and l.part = v.part
          and l.not_visible_until <= moment
        for update skip locked) l;
    return array(select d from unnest(deliveries_of(consumer_id, tokens)) d
                 where (d.token, d.part) in (select t.token, t.part
                                             from unnest(tokens, parts) as t (token, part))
                 order by d.token, d.ordinal);
end $$;

-- deliveries_of(consumer_id, tokens) -> the deliveries of these claims that are not settled, in the
-- order of the claims.
--
-- The function is stable, so it uses the snapshot of the statement that calls it. If that statement
-- also reads other tables, no message moves between the two.
create or replace function deliveries_of(consumer_id int, tokens bigint[]) returns delivery[]
language plpgsql stable as $$
begin
    return array(
        select row(l.token, l.part, abs(l.part) + u.n::int - 1, u.seq,
                   case when l.keys is null then m.key else u.key end,
                   l.barrier, l.deliver_count, l.history, l.last_delivered_at, l.not_visible_until,
                   l.inserted_at, coalesce(r.ord, u.seq), coalesce(r.tie, 0))::delivery
        from leases_of(deliveries_of.consumer_id, tokens) l
        cross join lateral unnest(l.seqs, l.keys) with ordinality as u (seq, key, n)
        left join lateral (select m.key from messages m
                           where l.keys is null and m.seq = u.seq limit 1) m on true
        left join lateral (select r.ord, r.tie from redriven r
                           where r.consumer_id = l.consumer_id and r.seq = u.seq limit 1) r on true
        where not exists (select from settled s
                          where s.consumer_id = l.consumer_id and s.token = l.token
                            and s.part = l.part and s.seq = u.seq)
        order by l.token, abs(l.part) + u.n);
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

-- insert_leases(consumer_id, deliveries, places, offset_, token, moment, until): Deliver each
-- message once more.
--
-- offset_ is the number of messages that the claim has taken before. Returns the seqs.
create or replace function insert_leases(consumer_id int, deliveries delivery[], places smallint[],
                                         offset_ int, token bigint, moment timestamptz,
                                         until timestamptz)
returns bigint[]
language plpgsql volatile as $$
begin
    -- One row for consecutive deliveries with the same slot, barrier, deliver_count and history.
    insert into leases (consumer_id, token, part, slot, seqs, keys, barrier, deliver_count, history,
                        last_delivered_at, not_visible_until, inserted_at)
    with numbered as (
        select d.*, row_number() over () as n from unnest(deliveries) d
    ), placed as (
        select d.*, places[d.n] as slot, d.n - row_number() over (
                   partition by places[d.n], d.barrier, d.deliver_count, d.history
                   order by d.n) as island
        from numbered d)
    select insert_leases.consumer_id, insert_leases.token, offset_ + min(d.n), d.slot,
           array_agg(d.seq order by d.n), array_agg(d.key order by d.n), d.barrier,
           d.deliver_count + 1, d.history, moment, until, min(d.inserted_at)
    from placed d
    group by d.slot, d.barrier, d.deliver_count, d.history, d.island;
    return array(select d.seq from unnest(deliveries) d);
end $$;

-- claim_delayed(...): Claim messages in `delayed` that are due.
--
-- They were given back, or published for later.
-- Locks: their rows of delayed, by SKIP LOCKED.
create or replace function claim_delayed(consumer_id int, places smallint[], offset_ int,
                                         token bigint, moment timestamptz, until timestamptz)
returns bigint[]
language plpgsql volatile as $$
declare
    due delivery[];
begin
    with locked as materialized (
        select d.seq from delayed d
        where d.consumer_id = claim_delayed.consumer_id and d.visible_at > '-infinity'
          and d.visible_at <= moment
        order by d.visible_at, d.seq limit cardinality(places) for update skip locked
    ), gone as (
        -- With an array PostgreSQL uses the primary key, even if statistics are wrong. With a join
        -- it could compare all pairs.
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
    return insert_leases(consumer_id, due, places, offset_, coalesce(token, draw_token()), moment,
                         until);
end $$;

-- insert_claimed(...) -> `taken`, followed by the seqs of these messages.
--
-- Inserts leases for messages that are delivered for the first time, one row for each slot.
create or replace function insert_claimed(consumer_id int, claimed bigint, places smallint[],
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
        if places[last] <> places[low] then
            high := low;
            while places[high + 1] = places[low] loop
                high := high + 1;
            end loop;
        end if;
        insert into leases (consumer_id, token, part, slot, seqs, keys, deliver_count,
                            last_delivered_at, not_visible_until, inserted_at)
        values (consumer_id, claimed, low, places[low],
                seqs[low - cardinality(taken):high - cardinality(taken)],
                keys[low - cardinality(taken):high - cardinality(taken)], 1, moment, until, since);
        low := high + 1;
    end loop;
    return taken || seqs;
end $$;
