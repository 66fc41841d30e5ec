-- receive(consumer, max_messages, visibility_timeout) → up to max_messages deliveries.
--
-- Each message is invisible to others for visibility_timeout (default: the consumer's) and carries a fresh receipt
-- for ack, nack and extend. Those whose timeout passed come first, then those given back, then new ones; each of the
-- three in log order, redriven messages behind what waited when they were redriven. A fifo consumer gets messages of a
-- key in log order, several at once if need be, and none while another delivery of the key is in flight.
-- Raises CB001 (unknown consumer), CB002 (a stream), CB004 (bad argument), CB005 (isolation level above READ COMMITTED,
-- where the claim would work on a snapshot older than its locks), CB008 (not this consumer's role). A paused consumer
-- gives a NOTICE and nothing else.
-- Locks: the rows it takes, by SKIP LOCKED, and a share of max_in_flight, to the end of the caller's transaction. So
-- receivers do not wait for each other, and one that stays in its transaction only keeps its own share from others.
-- Planner settings are pinned: missing or stale statistics must never turn a claim into a scan of everything.
create or replace function receive(consumer text, max_messages int default 10, visibility_timeout interval default null)
returns table (receipt text, seq bigint, topic text, key text, data json, deliver_count int,
               not_visible_until timestamptz, commit_lsn pg_lsn, ordinal int, commit_time timestamptz,
               inserted_at timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
    moment timestamptz := moment();
    until timestamptz := moment + coalesce(visibility_timeout,
                                           make_interval(secs => (c.config ->> 'visibility_timeout')::float8));
    claimed bigint;
    taken bigint[];
    fresh boolean; -- all of them are delivered for the first time
    lowest bigint;
    highest bigint;
begin
    perform check_receive(max_messages, visibility_timeout);
    if c.paused then
        raise notice 'consumer % is paused', quote_literal(c.name);
        return;
    end if;
    claimed := draw_token();
    select k.taken, k.fresh into taken, fresh from claim(c, max_messages, claimed, moment, until) k;
    if taken = '{}' then
        return;
    end if;
    select min(t.seq), max(t.seq) into lowest, highest from unnest(taken) as t (seq);
    if fresh and highest - lowest < 4 * cardinality(taken) and not c.config ?| '{columns,key}'
        and not exists (select from redriven r where r.consumer_id = c.id)
    then
        -- All that there is to know stands in the log, and close together: one walk along it.
        return query
            select m.seq || '-' || claimed, m.seq, m.topic, m.key, m.data, 1, until, m.commit_lsn, m.ordinal,
                   m.commit_time, m.inserted_at
            from (select * from messages m where m.seq between lowest and highest offset 0) m
            where case when true then m.seq in (select t from unnest(taken) t) end
            order by m.seq;
        return;
    end if;
    if c.config ? 'columns' then
        perform bury_unprojectable(c, claimed);
    end if;
    return query
        select u.seq || '-' || claimed, u.seq, coalesce(m.topic, r.topic),
               case when l.keys is null then m.key else u.key end,
               case when c.config ? 'columns' then project(coalesce(m.data, r.data), c.config -> 'columns')
                    else coalesce(m.data, r.data) end,
               l.deliver_count, l.not_visible_until, coalesce(m.commit_lsn, r.commit_lsn),
               coalesce(m.ordinal, r.ordinal), coalesce(m.commit_time, r.commit_time),
               coalesce(m.inserted_at, r.inserted_at)
        from leases l
        cross join lateral unnest(l.seqs, l.keys) with ordinality as u (seq, key, n)
        -- Lateral, so that it is a look-up each, whatever the statistics say.
        left join lateral (select * from messages m where m.seq = u.seq and m.seq between lowest and highest limit 1) m
            on true
        left join lateral (select * from redriven r where r.consumer_id = c.id and r.seq = u.seq limit 1) r on true
        where l.consumer_id = c.id and l.token = claimed
          and not exists (select from settled s where s.consumer_id = c.id and s.token = claimed and s.part = l.part
                          and s.seq = u.seq)
        order by l.part, u.n;
end $$;

-- check_receive(max_messages, visibility_timeout): raises what receive() documents of its arguments.
create or replace function check_receive(max_messages int, visibility_timeout interval) returns void
language plpgsql stable as $$
begin
    perform require_read_committed('receive()');
    if max_messages is null or max_messages < 1 then
        raise exception 'max_messages is %; it must be at least 1', coalesce(max_messages::text, 'null')
            using errcode = 'CB004';
    end if;
    if visibility_timeout < interval '0' then
        raise exception 'visibility_timeout is %; it must not be negative', visibility_timeout using errcode = 'CB004';
    end if;
end $$;

-- draw_token() → a new token, registered with the gap guard as draw() does it, but without its lock: the hints that it
-- serves only ever rise.
create or replace function draw_token() returns bigint
language plpgsql volatile as $$
begin
    if current_setting('cdcbridge.claiming', true) is distinct from pg_current_xact_id()::text then
        perform pg_advisory_xact_lock_shared('tokens_seq'::regclass::oid::int,
                                             low_half(coalesce(pg_sequence_last_value('tokens_seq'), 0)));
        perform set_config('cdcbridge.claiming', pg_current_xact_id()::text, true);
    end if;
    return nextval('tokens_seq');
end $$;

-- claim(consumer, wanted, token, moment, until) → the seqs of messages that now have a lease under this token, in order, and
-- whether all are delivered for the first time.
create or replace function claim(consumer consumers, wanted int, token bigint, moment timestamptz, until timestamptz,
                                 out taken bigint[], out fresh boolean)
language plpgsql volatile as $$
declare
    max_in_flight constant int := consumer.config ->> 'max_in_flight';
    hint constant hints := newest_hint(consumer.id);
    slots smallint[] := take_slots(consumer.id, max_in_flight, wanted);
    places smallint[];
    expired boolean;
begin
    taken := '{}';
    fresh := true;
    -- A statement of its own: what is in flight is counted when the slots' locks are held.
    select f.places, f.expired into places, expired
    from free_places(consumer.id, max_in_flight, wanted, slots, hint, moment) f;
    if cardinality(places) < wanted and cardinality(slots) < least(64, max_in_flight) then
        -- Enough slots if nothing were in flight, but something is: the others may have room.
        slots := take_slots(consumer.id, max_in_flight, max_in_flight);
        select f.places, f.expired into places, expired
        from free_places(consumer.id, max_in_flight, wanted, slots, hint, moment) f;
    end if;
    if cardinality(places) = 0 then
        return;
    end if;
    if consumer.mode = 'fifo' then
        select k.taken, k.fresh into taken, fresh
        from claim_in_order(consumer, hint, places, expired, token, moment, until) k;
    else
        if expired then
            taken := claim_expired(consumer, hint, places, token, moment, until);
        end if;
        if cardinality(taken) < cardinality(places)
            and exists (select from delayed d where d.consumer_id = consumer.id and d.visible_at <= moment)
        then
            taken := taken || claim_delayed(consumer.id, places[cardinality(taken) + 1:], cardinality(taken), token,
                                            moment, until);
        end if;
        fresh := taken = '{}';
        if cardinality(taken) < cardinality(places) then
            execute 'select claim_waiting_' || consumer.id || '($1, $2, $3, $4, $5, $6)' into taken
            using hint.waiting_floor, places, taken, token, moment, until;
        end if;
    end if;
    if token >= hint.token_floor + 256 or taken[cardinality(taken)] >= hint.waiting_floor + 4096 then
        perform renew_hint(consumer.id, hint);
    end if;
end $$;

-- take_slots(consumer_id, max_in_flight, wanted) → slots of max_in_flight that are ours until the transaction ends, enough
-- for `wanted` if nothing were in flight, or all that are free.
-- The limit is cut into up to 64 slots: so many receivers can hold their transactions open at once. A slot's leases are
-- counted after its lock is held, so that no two receivers ever fill the same room; the sum of all slots is the limit.
-- Locks: an advisory transaction lock per slot, never waited for.
create or replace function take_slots(consumer_id int, max_in_flight int, wanted int) returns smallint[]
language plpgsql volatile as $$
declare
    slots constant int := least(64, max_in_flight);
    class constant int := 'leases'::regclass::oid::int;
    slot int := floor(random() * slots);
    locked smallint[] := '{}';
begin
    for i in 1 .. slots loop
        slot := (slot + 1) % slots;
        if pg_try_advisory_xact_lock(class, take_slots.consumer_id * 64 + slot) then
            locked := locked || slot::smallint;
        end if;
        exit when cardinality(locked) * (max_in_flight / slots) >= wanted;
    end loop;
    return locked;
end $$;

-- free_places(consumer_id, max_in_flight, wanted, slots, hint, moment) → for each place that is free in these slots, the
-- slot, up to `wanted`; and whether there are leases whose timeout passed.
create or replace function free_places(consumer_id int, max_in_flight int, wanted int, slots smallint[], hint hints,
                                       moment timestamptz, out places smallint[], out expired boolean)
language plpgsql volatile as $$
declare
    number constant int := least(64, max_in_flight);
    used int[] := array_fill(0, array[number], array[0]);
    lease_slots int[];
    sizes int[];
    free int;
begin
    -- Modulo: the limit may have been lowered since.
    select coalesce(bool_or(l.not_visible_until <= moment), false),
           array_agg(l.slot % number) filter (where l.not_visible_until > moment),
           array_agg(cardinality(l.seqs) - (
               select count(*) from settled s where s.consumer_id = l.consumer_id and s.token = l.token
               and s.part = l.part)::int) filter (where l.not_visible_until > moment)
    into expired, lease_slots, sizes
    from live_leases(free_places.consumer_id, hint) l;
    for i in 1 .. coalesce(cardinality(lease_slots), 0) loop
        used[lease_slots[i]] := used[lease_slots[i]] + sizes[i];
    end loop;
    places := '{}';
    for i in 1 .. cardinality(slots) loop
        free := max_in_flight / number + (slots[i] < max_in_flight % number)::int - used[slots[i]];
        places := places || array_fill(slots[i], array[greatest(0, least(free, wanted - cardinality(places)))]);
    end loop;
end $$;
