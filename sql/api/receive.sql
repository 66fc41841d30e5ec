-- receive(consumer, max_messages, visibility_timeout) -> up to max_messages deliveries.
--
-- Each message is invisible to others for visibility_timeout (default: the consumer's) and carries a fresh receipt
-- for ack, nack and extend. Those whose timeout passed come first, then those given back, then new ones; each of the
-- three in log order, redriven messages behind what waited when they were redriven. A fifo consumer gets messages of a
-- key in log order, several at once if need be, and none while another delivery of the key is in flight.
-- Raises CB001 (unknown consumer), CB002 (a stream), CB004 (bad argument), CB005 (isolation level above READ COMMITTED,
-- where the claim would work on a snapshot older than its locks), CB008 (not this consumer's role). A paused consumer
-- gives a NOTICE and nothing else.
-- Locks: the rows it takes, by SKIP LOCKED, and places within max_in_flight (internal/places.sql), to the end of the caller's transaction. So
-- receivers do not wait for each other, and one that stays in its transaction only keeps from others the places that it uses.
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
    if c.paused or coalesce(max_messages, 0) < 1 or visibility_timeout < interval '0' or visibility_timeout > interval '1 min'
        or current_setting('transaction_isolation') <> 'read committed'
    then
        perform check_receive(max_messages, visibility_timeout);
        if c.paused then
            raise notice 'consumer % is paused', quote_literal(c.name);
            return;
        end if;
    end if;
    k := claim(c, max_messages, moment, until);
    if k.taken = '{}' then
        return;
    end if;
    claimed := currval('tokens_seq'); -- the claim's
    suffix := '-' || claimed;
    if k.plain and not c.config ?| '{columns,key,on_leave}' then
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
               case when c.config ? 'columns' then project(coalesce(r.data, m.data), c.config -> 'columns')
                    else coalesce(r.data, m.data) end,
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
