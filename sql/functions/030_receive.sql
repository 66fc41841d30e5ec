-- receive(consumer, max_messages, visibility_timeout) -> up to max_messages deliveries.
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
    until timestamptz := later(moment, coalesce(visibility_timeout,
                                                make_interval(secs => (c.config ->> 'visibility_timeout')::float8)));
    claimed bigint;
    suffix text; -- of their receipts
    k record;    -- the claim
    lowest bigint;
    highest bigint;
begin
    if c.paused or coalesce(max_messages, 0) < 1 or visibility_timeout < interval '0'
        or current_setting('transaction_isolation') <> 'read committed'
    then
        perform check_receive(max_messages, visibility_timeout);
        if c.paused then
            raise notice 'consumer % is paused', quote_literal(c.name);
            return;
        end if;
    end if;
    claimed := draw_token();
    suffix := '-' || claimed;
    k := claim(c, max_messages, claimed, moment, until);
    if k.taken = '{}' then
        return;
    end if;
    if k.plain and not c.config ?| '{columns,key}' then
        -- All that there is to know stands in the log, in this order. Where there is no other message between: one walk along it.
        lowest := k.taken[1];
        highest := k.taken[cardinality(k.taken)];
        if highest - lowest = cardinality(k.taken) - 1 then
            return query
                select m.seq::text || suffix, m.seq, m.topic, m.key, m.data, 1, until, m.commit_lsn, m.ordinal,
                       m.commit_time, m.inserted_at
                from messages m where m.seq between lowest and highest order by m.seq;
            return;
        elsif highest - lowest < 4 * cardinality(k.taken) then
            return query
                select m.seq::text || suffix, m.seq, m.topic, m.key, m.data, 1, until, m.commit_lsn, m.ordinal,
                       m.commit_time, m.inserted_at
                from (select * from messages m where m.seq between lowest and highest order by m.seq offset 0) m
                where m.seq in (select t from unnest(k.taken) t);
            return;
        end if;
    end if;
    select min(t.seq), max(t.seq) into lowest, highest from unnest(k.taken) as t (seq);
    if c.config ? 'columns' then
        perform bury_unprojectable(c, claimed);
    end if;
    return query
        select u.seq::text || suffix, u.seq, coalesce(m.topic, r.topic),
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

-- draw_token() -> a new token, registered with the gap guard as draw() does it, but without its lock: the hints that it
-- serves only ever rise.
create or replace function draw_token() returns bigint
language plpgsql volatile as $$
begin
    -- Conditions, which are expressions, where a PERFORM each would be a statement. Nobody ever takes the lock alone.
    if current_setting('cdcbridge.claiming', true) is distinct from pg_current_xact_id()::text
        and (not pg_try_advisory_xact_lock_shared('tokens_seq'::regclass::oid::int,
                                                  low_half(coalesce(pg_sequence_last_value('tokens_seq'), 0)))
             or set_config('cdcbridge.claiming', pg_current_xact_id()::text, true) is null)
    then
        raise exception 'the advisory lock class of tokens_seq is in use by others' using errcode = 'lock_not_available';
    end if;
    return nextval('tokens_seq');
end $$;

-- claim(consumer, wanted, token, moment, until) -> the seqs of messages that now have a lease under this token, in order; plain:
-- all are delivered for the first time, none is redriven, and the order is the log's.
create or replace function claim(consumer consumers, wanted int, token bigint, moment timestamptz, until timestamptz,
                                 out taken bigint[], out plain boolean)
language plpgsql volatile as $$
declare
    max_in_flight constant int := consumer.config ->> 'max_in_flight';
    slots smallint[] := '{}';
    number int;
    hint constant hints := newest_hint(consumer.id);
    look record;
    fresh record;
begin
    taken := '{}';
    plain := true;
    for i in 0 .. 3 loop
        number := cardinality(slots);
        slots := take_slots(consumer.id, max_in_flight, least(wanted, max_in_flight) << 2 * i, slots);
        look := survey(consumer.id, hint, max_in_flight, wanted, slots, moment);
        -- Enough slots if nothing were in flight, but something is: more of them, and not at once all that others need.
        exit when cardinality(look.places) >= wanted or cardinality(slots) = number;
    end loop;
    if cardinality(look.places) = 0 then
        return;
    end if;
    if consumer.mode = 'fifo' then
        select k.taken, k.plain into taken, plain
        from claim_in_order(consumer, hint, look.places, look.expired, token, moment, until) k;
    else
        if look.expired then
            taken := claim_expired(consumer, hint, look.places, token, moment, until);
        end if;
        if look.due and cardinality(taken) < cardinality(look.places) then
            taken := taken || claim_delayed(consumer.id, look.places[cardinality(taken) + 1:], cardinality(taken), token,
                                            moment, until);
        end if;
        if cardinality(taken) < cardinality(look.places) then
            fresh := claim_waiting(consumer.id, hint, look.places, taken, token, moment, until);
            taken := fresh.all_taken;
            plain := fresh.plain;
        else
            plain := false;
        end if;
    end if;
    if token >= hint.token_floor + 128 or taken[cardinality(taken)] >= hint.waiting_floor + 4096 then
        perform renew_hint(consumer.id, hint, coalesce(taken[cardinality(taken)], 0));
    end if;
end $$;

-- take_slots(consumer_id, max_in_flight, wanted, slots) -> `slots`, and more of max_in_flight that are ours until the
-- transaction ends: together enough for `wanted` if nothing were in flight, or all that are free.
-- The limit is cut into up to 64 slots: so many receivers can hold their transactions open at once. A slot's leases are
-- counted after its lock is held, so that no two receivers ever fill the same room; the sum of all slots is the limit.
-- Locks: an advisory transaction lock per slot, never waited for.
create or replace function take_slots(consumer_id int, max_in_flight int, wanted int, slots smallint[]) returns smallint[]
language plpgsql volatile as $$
declare
    number constant int := least(64, max_in_flight);
    class constant int := 'leases'::regclass::oid::int;
    slot int := floor(random() * number);
begin
    for i in 1 .. number loop
        if slot <> all (slots) and pg_try_advisory_xact_lock(class, take_slots.consumer_id * 64 + slot) then
            slots := slots || slot::smallint;
        end if;
        exit when cardinality(slots) * (max_in_flight / number) >= wanted;
        slot := (slot + 1) % number;
    end loop;
    return slots;
end $$;

-- survey(consumer_id, hint, max_in_flight, wanted, slots, moment) -> for each place that is free in these slots, the slot, up to
-- `wanted`; whether there are leases whose timeout passed, or messages given back whose time has come.
-- Called when the slots' locks are held: its snapshot is younger.
create or replace function survey(consumer_id int, hint hints, max_in_flight int, wanted int, slots smallint[],
                                  moment timestamptz, out places smallint[], out expired boolean, out due boolean)
language plpgsql volatile as $$
declare
    number constant int := least(64, max_in_flight);
    used int[] := array_fill(0, array[number], array[0]);
    l record;
    free int;
begin
    for l in
        -- Modulo: the limit may have been lowered since.
        select v.slot % number as slot,
               case when v.not_visible_until > moment then cardinality(v.seqs) - (
                   select count(*) from settled s where s.consumer_id = v.consumer_id and s.token = v.token
                   and s.part = v.part)::int end as size
        from live_leases(survey.consumer_id, hint) v
        union all
        (select null, null from delayed d where d.consumer_id = survey.consumer_id and d.visible_at <= moment limit 1)
    loop
        if l.size is not null then
            used[l.slot] := used[l.slot] + l.size;
        elsif l.slot is not null then
            expired := true;
        else
            due := true;
        end if;
    end loop;
    places := '{}';
    for i in 1 .. cardinality(slots) loop
        free := max_in_flight / number + (slots[i] < max_in_flight % number)::int - used[slots[i]];
        places := places || array_fill(slots[i], array[greatest(0, least(free, wanted - cardinality(places)))]);
    end loop;
end $$;
