-- receive(consumer, max_messages, visibility_timeout) → up to max_messages deliveries.
--
-- Each message is invisible to others for visibility_timeout (default: the consumer's) and carries a fresh receipt
-- for ack, nack and extend. Those whose timeout passed come first, then those given back, then new ones; each of the
-- three in log order, redriven messages behind what waited when they were redriven.
-- Raises CB001 (unknown consumer), CB002 (a stream), CB004 (bad argument), CB005 (isolation level above READ COMMITTED,
-- where the claim would work on a snapshot older than its locks). A paused consumer gives a NOTICE and nothing else.
-- Locks: the rows it takes, by SKIP LOCKED, and a share of max_in_flight, to the end of the caller's transaction. So
-- receivers do not wait for each other, and one that stays in its transaction only keeps its own share from others.
-- Planner settings are pinned: missing or stale statistics must never turn a claim into a scan of everything.
create or replace function receive(consumer text, max_messages int default 10, visibility_timeout interval default null)
returns table (receipt text, seq bigint, topic text, key text, data json, deliver_count int,
               not_visible_until timestamptz, commit_lsn pg_lsn, ordinal int, commit_time timestamptz,
               inserted_at timestamptz)
language plpgsql volatile set search_path from current set jit = off set enable_seqscan = off as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
    moment timestamptz := clock_timestamp();
    until timestamptz;
    taken bigint[];
begin
    perform check_receive(max_messages, visibility_timeout);
    if c.paused then
        raise notice 'consumer % is paused', quote_literal(c.name);
        return;
    end if;
    until := moment + coalesce(visibility_timeout, config_interval(c.config, 'visibility_timeout'));
    taken := claim(c, take_places(c.id, (c.config ->> 'max_in_flight')::int, max_messages, moment), moment, until);
    if c.config ? 'columns' then
        perform bury_unprojectable(c, taken);
    end if;
    return query
        select l.seq || '-' || l.token, l.seq, coalesce(m.topic, r.topic), l.key,
               project(coalesce(m.data, r.data), c.config -> 'columns'), l.deliver_count, l.not_visible_until,
               coalesce(m.commit_lsn, r.commit_lsn), coalesce(m.ordinal, r.ordinal),
               coalesce(m.commit_time, r.commit_time), coalesce(m.inserted_at, r.inserted_at)
        from unnest(taken) with ordinality as t (seq, n)
        join leases l on l.consumer_id = c.id and l.seq = t.seq
        left join messages m on m.seq = t.seq
        left join redriven r on r.consumer_id = c.id and r.seq = t.seq
        order by t.n;
end $$;

-- check_receive(max_messages, visibility_timeout): raises what receive() documents of its arguments.
create or replace function check_receive(max_messages int, visibility_timeout interval) returns void
language plpgsql stable set search_path from current as $$
begin
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise exception 'receive() cannot work in a % transaction', upper(current_setting('transaction_isolation'))
            using errcode = 'CB005', hint = 'Call it in READ COMMITTED.';
    end if;
    if max_messages is null or max_messages < 1 then
        raise exception 'max_messages is %; it must be at least 1', coalesce(max_messages::text, 'null')
            using errcode = 'CB004';
    end if;
    if visibility_timeout < interval '0' then
        raise exception 'visibility_timeout is %; it must not be negative', visibility_timeout using errcode = 'CB004';
    end if;
end $$;

-- take_places(consumer_id, max_in_flight, wanted, moment) → up to `wanted` places among the messages in flight that are
-- ours until the transaction ends: for each the slot that it counts against.
-- The limit is cut into up to 64 slots: so many receivers can hold their transactions open at once. A slot's leases are
-- counted after its lock is held, so that no two receivers ever fill the same room; the sum of all slots is the limit.
-- Locks: an advisory transaction lock per slot, never waited for.
create or replace function take_places(consumer_id int, max_in_flight int, wanted int, moment timestamptz)
returns smallint[]
language plpgsql volatile set search_path from current as $$
declare
    slots constant int := least(64, max_in_flight);
    start constant int := floor(random() * slots);
    slot int;
    locked smallint[] := '{}';
    places smallint[] := '{}';
begin
    for i in 0 .. slots - 1 loop
        slot := (start + i) % slots;
        if pg_try_advisory_xact_lock('leases'::regclass::oid::int, take_places.consumer_id * 64 + slot) then
            locked := locked || slot::smallint;
        end if;
        -- Counted when there are as many as would do if nothing were in flight: in one statement for all of them.
        if cardinality(places) + cardinality(locked) * (max_in_flight / slots) >= wanted or i = slots - 1 then
            places := places || free_places(consumer_id, max_in_flight, locked, moment);
            exit when cardinality(places) >= wanted;
            locked := '{}';
        end if;
    end loop;
    return places[:wanted];
end $$;

-- free_places(consumer_id, max_in_flight, slots, moment) → the slot of each place that is free in these slots. A function of
-- its own, called when their locks are held: its snapshot is younger than the locks.
create or replace function free_places(consumer_id int, max_in_flight int, slots smallint[], moment timestamptz)
returns smallint[]
language plpgsql volatile set search_path from current set enable_seqscan = off as $$
declare
    number constant int := least(64, max_in_flight);
begin
    return (
        with in_flight as (
            -- Modulo: the limit may have been lowered since.
            select l.slot % number as slot, count(*) as leases
            from leases l
            where l.consumer_id = free_places.consumer_id and l.not_visible_until > moment
            group by 1)
        select coalesce(array_agg(s.slot), '{}')
        from unnest(slots) as s (slot)
        left join in_flight f using (slot)
        cross join generate_series(1, max_in_flight / number + (s.slot < max_in_flight % number)::int
                                      - coalesce(f.leases, 0)));
end $$;

-- claim(consumer, places, moment, until) → the seqs of messages that now have a lease, at most one for each place.
create or replace function claim(consumer consumers, places smallint[], moment timestamptz, until timestamptz)
returns bigint[]
language plpgsql volatile set search_path from current set jit = off set enable_seqscan = off as $$
declare
    room constant int := cardinality(places);
    taken bigint[] := '{}';
begin
    if room > 0 then
        taken := claim_expired(consumer, places, moment, until);
    end if;
    if cardinality(taken) < room then
        taken := taken || claim_delayed(consumer.id, places[cardinality(taken) + 1:], moment, until);
    end if;
    if cardinality(taken) < room then
        taken := taken || claim_waiting(consumer.id, places[cardinality(taken) + 1:], moment, until);
    end if;
    return taken;
end $$;

-- claim_expired(…) → seqs whose timeout passed, delivered anew. Those that had their last delivery die.
create or replace function claim_expired(consumer consumers, places smallint[], moment timestamptz, until timestamptz)
returns bigint[]
language plpgsql volatile set search_path from current set jit = off set enable_seqscan = off as $$
declare
    expired bigint[];
    taken bigint[];
begin
    select coalesce(array_agg(picked.seq), '{}') into expired
    -- Not what this very call has claimed with a timeout of zero.
    from (select l.seq from leases l where l.consumer_id = consumer.id and l.not_visible_until <= moment
            and l.last_delivered_at < moment
          order by l.seq limit cardinality(places) for update skip locked) picked;
    if expired = '{}' then
        return expired;
    end if;
    perform bury(consumer.id, array_agg(l.seq), 'max_deliveries: visibility timeout passed after delivery ' ||
                 (consumer.config ->> 'max_deliveries') || ' of ' || (consumer.config ->> 'max_deliveries'))
    from leases l
    where l.consumer_id = consumer.id and l.seq = any (expired)
      and l.deliver_count >= (consumer.config ->> 'max_deliveries')::int
    having count(*) > 0;
    with renewed as (
        update leases l
        set token = nextval('tokens_seq'), slot = places[e.n], deliver_count = l.deliver_count + 1,
            last_delivered_at = moment, not_visible_until = until,
            history = l.history || jsonb_build_object('at', moment, 'deliver_count', l.deliver_count,
                                                      'reason', 'visibility timeout passed')
        from unnest(expired) with ordinality as e (seq, n)
        where l.consumer_id = consumer.id and l.seq = e.seq
        returning l.seq)
    select coalesce(array_agg(seq order by seq), '{}') into taken from renewed;
    return taken;
end $$;

-- claim_delayed(…) → seqs given back by nack whose delay is over.
create or replace function claim_delayed(consumer_id int, places smallint[], moment timestamptz, until timestamptz)
returns bigint[]
language sql volatile set search_path from current set jit = off set enable_seqscan = off as $$
    with due as materialized (
        select d.seq from delayed d
        where d.consumer_id = claim_delayed.consumer_id and d.visible_at <= moment
        order by d.visible_at, d.seq limit cardinality(places) for update skip locked
    ), gone as (
        delete from delayed d using due
        where d.consumer_id = claim_delayed.consumer_id and d.seq = due.seq returning d.*
    ), leased as (
        insert into leases (consumer_id, seq, key, token, slot, deliver_count, last_delivered_at, not_visible_until,
                            history, inserted_at)
        select g.consumer_id, g.seq, g.key, nextval('tokens_seq'), places[row_number() over ()], g.deliver_count + 1,
               moment, until, g.history, g.inserted_at
        from gone g
        returning seq)
    select coalesce(array_agg(seq order by seq), '{}') from leased
$$;

-- claim_waiting(…) → seqs of messages that are delivered for the first time (or anew after a redrive).
-- Takes whole rows of `waiting`, and the front of the last one.
create or replace function claim_waiting(consumer_id int, places smallint[], moment timestamptz, until timestamptz)
returns bigint[]
language plpgsql volatile set search_path from current set jit = off set enable_seqscan = off as $$
declare
    waiting_table constant text := 'waiting_' || consumer_id;
    taken bigint[] := '{}';
    part bigint[];
    exhausted boolean;
begin
    loop
        -- As many rows as should do, going by the first one's size: a row that is locked and not needed is kept from
        -- other receivers. Planned anew each time, so one statement for all.
        execute format($query$
            with wanted as materialized (
                select greatest(1, $2 / (select cardinality(w.seqs) from %1$I w where w.consumer_id = $1
                                         order by w.ord, w.tie limit 1)) as rows
            ), picked as materialized (
                select w.ord, w.tie, w.seqs, w.keys, w.inserted_at from %1$I w
                where w.consumer_id = $1 order by w.ord, w.tie limit (select rows from wanted)
                for update skip locked
            ), spread as materialized (
                select p.*, cardinality(p.seqs) as size,
                       coalesce(sum(cardinality(p.seqs)) over (order by p.ord, p.tie
                                rows between unbounded preceding and 1 preceding), 0)::int as before
                from picked p
            ), emptied as (
                delete from %1$I w using spread s where w.consumer_id = $1 and w.ord = s.ord and w.tie = s.tie and s.before + s.size <= $2
            ), trimmed as (
                update %1$I w set seqs = s.seqs[$2 - s.before + 1:], keys = s.keys[$2 - s.before + 1:]
                from spread s
                where w.consumer_id = $1 and w.ord = s.ord and w.tie = s.tie and s.before < $2 and s.before + s.size > $2
            ), leased as (
                insert into leases (consumer_id, seq, key, token, slot, deliver_count, last_delivered_at,
                                    not_visible_until, inserted_at)
                select $1, u.seq, case when s.keys is null then m.key else u.key end, nextval('tokens_seq'),
                       $3[s.before + u.n], 1, $4, $5, s.inserted_at
                from spread s
                cross join lateral unnest(s.seqs, s.keys) with ordinality as u (seq, key, n)
                left join messages m on s.keys is null and m.seq = u.seq
                where s.before + u.n <= $2
                order by s.before + u.n
                returning seq)
            select coalesce(array_agg(seq), '{}'), (select count(*) from picked) < coalesce((select rows from wanted), 1)
            from leased
            $query$, waiting_table)
        into part, exhausted
        using consumer_id, cardinality(places), places, moment, until;
        taken := taken || part;
        places := places[cardinality(part) + 1:];
        exit when exhausted or cardinality(places) = 0;
    end loop;
    return taken;
end $$;
